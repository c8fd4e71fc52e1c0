"""Pictures of the README: `python -m workbench.experiments.pictures`."""
