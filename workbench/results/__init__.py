"""Results, the contracts of probes and experiments, and the registry of plugins."""
