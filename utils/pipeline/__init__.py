"""Layers over stages: the stream between layers, its packing at a stage boundary, and the DeepSpeed engine."""
