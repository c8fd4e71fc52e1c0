"""Sparse autoencoders: loading, encoding, decoder directions, and metrics."""
