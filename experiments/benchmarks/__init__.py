"""Speed and memory of the workbench against other libraries, both measured in the same run.

`python -m workbench.experiments.benchmarks [NAME ...] [--SIZE ...] [--write docs/benchmarks.md]`
"""
