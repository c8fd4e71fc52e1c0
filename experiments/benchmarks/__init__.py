"""Speed and memory of the workbench beside what one would use instead, both measured in the same run.

python -m workbench.experiments.benchmarks [NAME ...] [--quick] [--write docs/benchmarks.md]
"""
