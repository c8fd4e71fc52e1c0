"""Processes of their own that import nothing first: forks of one server, which imports what they work with, once."""

from __future__ import annotations

import multiprocessing

PRELOADED = (
    "transformers.models.llama.modeling_llama",
    "sae_lens",
    "workbench.recording.record",
    "workbench.model.discovery",
    "workbench.parallel.share",
    "workbench.store.reader",
    "workbench.features.extract",
    "workbench.features.other_formats",
    "workbench.sae.load",
    "workbench.runs.sweep",
    "workbench.pages.figure_export",
)


def fork_context() -> multiprocessing.context.ForkServerContext:
    """Returns the context whose `Process` is such a fork. Its server starts with the first of them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    return context
