"""From samples to micro-batches: the order of an epoch, batch sizes, masks and weights, and who reads ahead."""
