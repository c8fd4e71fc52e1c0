"""Differences between the runs of two stores: the models, their interventions, the metric of their gradients."""

from __future__ import annotations

from workbench.store.manifest import Manifest
from workbench.store.stored_changes import metric_name


def run_difference(a: Manifest, b: Manifest) -> str | None:
    """Returns what differs between two runs as one phrase: model, interventions, gradients; None if nothing does.

    A store without gradients differs in nothing from one with some: the sites that both have are compared.
    """
    model = a.model.difference(b.model)
    return "; ".join(filter(None, (model, _interventions(a, b), _gradients(a, b)))) or None


def _interventions(a: Manifest, b: Manifest) -> str | None:
    changes_a, changes_b = a.interventions, b.interventions
    if (changes_a and changes_a.digest) == (changes_b and changes_b.digest):
        return None
    names = [", ".join(changes.names) if changes else "without interventions" for changes in (changes_a, changes_b)]
    return f"the first store ran {names[0]}, the second {names[1]}"


def _gradients(a: Manifest, b: Manifest) -> str | None:
    metric_a, metric_b = a.gradient_of, b.gradient_of
    if metric_a is None or metric_b is None or metric_a == metric_b:
        return None
    return f"gradients are of {metric_name(metric_a)} in the first store, of {metric_name(metric_b)} in the second"
