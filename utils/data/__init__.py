"""From folders of pictures and clips to micro-batches: sources, buckets, encoding, cache, order."""
