"""Pure tensor mathematics of diffusion training: timesteps, paths, losses.  No config, device or rank in here."""
