"""TOML files to frozen, typed values; every problem reported at once."""
