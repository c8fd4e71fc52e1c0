"""Analyses that several probes share: rows, lens readings, bootstrap, linear and softmax probes, comparison."""
