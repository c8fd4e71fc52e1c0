"""Record a language model once into a memory-mapped store, then ask the store.

    import workbench as wb

    model = wb.load_model("gpt2")
    store = wb.record(model, "stories.jsonl", sites=["resid_post"], out="runs/gpt2.acts")
    store["resid_post", 3]                                   # activations, memory-mapped
    store.where("token = ' Monday'")["resid_post", 3]        # of the tokens that SQL selects

Probes live in the package `probes`. Names are loaded when first used: this import needs neither torch nor
transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_PUBLIC = {
    "load_model": "workbench.models",
    "Model": "workbench.models",
    "demo_corpus": "workbench.embedded",
    "load_sae": "workbench.sae.load",
    "Sae": "workbench.sae.load",
    "sae_metrics": "workbench.sae.metrics",
    "extract_features": "workbench.sae.extract",
    "open_features": "workbench.sae.features",
    "Features": "workbench.sae.features",
    "feature_statistics": "workbench.sae.questions",
    "feature_histogram": "workbench.sae.questions",
    "active_rows": "workbench.sae.questions",
    "best_features": "workbench.sae.questions",
    "coactivation": "workbench.sae.questions",
    "feature_page": "workbench.sae.page",
    "export_delphi": "workbench.sae.export",
    "export_neuronpedia": "workbench.sae.export",
    "nearest_features": "workbench.sae.decoder",
    "promoted_tokens": "workbench.sae.decoder",
    "record": "workbench.recorder",
    "RayWorkers": "workbench.distributed",
    "Share": "workbench.distributed",
    "plan": "workbench.sizing",
    "Recording": "workbench.settings",
    "open_store": "workbench.store.reader",
    "Store": "workbench.store.reader",
    "ActivationArray": "workbench.store.reader",
    "Rows": "workbench.store.reader",
    "compare": "workbench.comparison",
    "TokenView": "workbench.token_view",
    "Result": "workbench.result",
    "load_result": "workbench.result",
    "export": "workbench.export",
    "Probe": "workbench.probe",
    "WorkbenchError": "workbench.errors",
    "RequestError": "workbench.errors",
    "DataError": "workbench.errors",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'workbench' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


if TYPE_CHECKING:
    from workbench.comparison import compare
    from workbench.distributed import RayWorkers, Share
    from workbench.embedded import demo_corpus
    from workbench.errors import DataError, RequestError, WorkbenchError
    from workbench.export import export
    from workbench.models import Model, load_model
    from workbench.probe import Probe
    from workbench.recorder import record
    from workbench.result import Result, load_result
    from workbench.sae.decoder import nearest_features, promoted_tokens
    from workbench.sae.export import export_delphi, export_neuronpedia
    from workbench.sae.extract import extract_features
    from workbench.sae.features import Features, open_features
    from workbench.sae.load import Sae, load_sae
    from workbench.sae.metrics import sae_metrics
    from workbench.sae.page import feature_page
    from workbench.sae.questions import (
        active_rows,
        best_features,
        coactivation,
        feature_histogram,
        feature_statistics,
    )
    from workbench.settings import Recording
    from workbench.sizing import plan
    from workbench.store.reader import ActivationArray, Rows, Store, open_store
    from workbench.token_view import TokenView
