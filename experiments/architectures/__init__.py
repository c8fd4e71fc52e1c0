"""Recordings of a tiny model of every causal language model type in transformers, checked against references."""
