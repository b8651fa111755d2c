"""From the dataset file to samples: what lies where, what belongs together, what is trained at which size."""
