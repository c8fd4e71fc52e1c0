"""Every causal language model type in transformers, tiny: what a recorder meets in each."""
