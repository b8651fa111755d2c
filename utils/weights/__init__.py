"""A model's weights by their diffusers names: key maps, and reading files in whatever layout the user has."""
