"""Findings of every probe on small models, as a page of the docs: `python -m workbench.experiments.findings`."""
