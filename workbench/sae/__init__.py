"""Sparse autoencoders: loading one, extracting its features from a store, and asking the features."""
