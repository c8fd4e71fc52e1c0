"""Experiments: papers' pictures for any model, each a module with a config, a run and figures."""

if __name__ != "workbench.experiments":
    raise ImportError(
        "the experiments are installed inside the package: write `from workbench.experiments import ...`, "
        "or `python -m workbench.experiments.NAME`"
    )
