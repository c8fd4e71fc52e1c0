"""Run folders and sweeps of experiments."""
