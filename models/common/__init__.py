"""What several families share: text encoders, latent encoders, token packing."""
