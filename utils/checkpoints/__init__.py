"""What a run needs to continue: written behind training, whole or not at all, found and kept."""
