"""Record a language model once into a memory-mapped store, then query the store.

    import workbench as wb

    model = wb.load_model("gpt2")
    store = wb.record(model, "stories.jsonl", sites=["resid_post"], out="runs/gpt2.acts")
    store["resid_post", 3]                                   # activations, memory-mapped
    store.where("token = ' Monday'")["resid_post", 3]        # of the tokens that SQL selects

Probes live in `workbench.probes`. Names are loaded when first used: this import needs neither torch nor
transformers.
"""

TYPE_CHECKING = False  # not from typing: the command line handles an interrupt before anything is imported

_PUBLIC = {
    "load_model": "workbench.model.load",
    "Model": "workbench.model.load",
    "demo_corpus": "workbench.embedded",
    "planted_corpus": "workbench.embedded.planted",
    "load_sae": "workbench.sae.load",
    "Sae": "workbench.sae.autoencoder",
    "neuron_dictionary": "workbench.sae.neuron_dictionary",
    "sae_metrics": "workbench.sae.metrics",
    "with_sparsity": "workbench.sae.ruled",
    "Direction": "workbench.model.direction",
    "load_direction": "workbench.model.direction",
    "mean_difference": "workbench.analysis.directions",
    "principal_directions": "workbench.analysis.directions",
    "intervene": "workbench.model.intervene",
    "Tokens": "workbench.model.token_choice",
    "Set": "workbench.model.row_records",
    "Zero": "workbench.model.row_records",
    "Add": "workbench.model.row_records",
    "Project": "workbench.model.row_records",
    "Mean": "workbench.model.stored_rows",
    "Resample": "workbench.model.stored_rows",
    "Patch": "workbench.model.stored_rows",
    "EmbedTokens": "workbench.model.embedding_records",
    "ScaleAttention": "workbench.model.attention_records",
    "BiasAttention": "workbench.model.attention_records",
    "RedistributeAttention": "workbench.model.attention_records",
    "FreezePattern": "workbench.model.stored_attention",
    "SkipBlock": "workbench.model.block_records",
    "SwapBlocks": "workbench.model.block_records",
    "Feature": "workbench.sae.feature_record",
    "LogProbability": "workbench.model.logit_metrics",
    "LogitDifference": "workbench.model.logit_metrics",
    "NextTokenLoss": "workbench.model.logit_metrics",
    "extract_features": "workbench.features.extract",
    "open_features": "workbench.features.feature_store",
    "Features": "workbench.features.feature_store",
    "feature_statistics": "workbench.features.queries",
    "feature_histogram": "workbench.features.queries",
    "active_rows": "workbench.features.queries",
    "best_features": "workbench.features.queries",
    "coactivation": "workbench.features.queries",
    "coactive_pairs": "workbench.features.pairs",
    "match_features": "workbench.features.matching",
    "feature_splits": "workbench.features.matching",
    "feature_absorption": "workbench.analysis.absorption",
    "feature_contributions": "workbench.analysis.logit_contributions",
    "feature_effect": "workbench.analysis.feature_effect",
    "sparse_probe": "workbench.analysis.sparse_probe",
    "import_labels": "workbench.features.label_files",
    "feature_card": "workbench.pages.feature_page",
    "feature_index": "workbench.pages.feature_index",
    "feature_page": "workbench.pages.feature_page",
    "feature_pages": "workbench.pages.feature_index",
    "export_delphi": "workbench.features.other_formats",
    "export_neuronpedia": "workbench.features.other_formats",
    "nearest_features": "workbench.sae.decoder",
    "promoted_tokens": "workbench.features.promoted",
    "patchscope": "workbench.analysis.patchscope",
    "Patchscope": "workbench.analysis.patchscope",
    "substitution_texts": "workbench.corpus.substitutions",
    "prompt_pairs": "workbench.corpus.task_suites",
    "check_pairs": "workbench.corpus.prompt_pairs",
    "PromptPair": "workbench.corpus.prompt_pairs",
    "PromptPairs": "workbench.corpus.prompt_pairs",
    "random_repeats": "workbench.corpus.repeats",
    "serve": "workbench.pages.serve",
    "shuffled_blocks": "workbench.corpus.repeats",
    "record": "workbench.recording.record",
    "generate": "workbench.recording.generation",
    "RayWorkers": "workbench.parallel.ray",
    "Share": "workbench.parallel.share",
    "plan": "workbench.recording.estimate",
    "Recording": "workbench.sites.settings",
    "open_store": "workbench.store.reader",
    "Store": "workbench.store.reader",
    "RowArray": "workbench.store.row_array",
    "ActivationArray": "workbench.store.reader",
    "LayeredArray": "workbench.store.reader",
    "Rows": "workbench.store.selected_rows",
    "ComputedArray": "workbench.store.computed",
    "head_results": "workbench.model.head_results",
    "attn_scores": "workbench.model.score_arrays",
    "RowDataset": "workbench.store.datasets",
    "to_hf_dataset": "workbench.store.datasets",
    "merge": "workbench.store.merged_store",
    "pack": "workbench.store.packed_copy",
    "remove": "workbench.features.removal",
    "compare": "workbench.analysis.comparison",
    "combine": "workbench.results.combine",
    "TrainedLens": "workbench.analysis.trained_lens",
    "TrainedFutureLens": "workbench.analysis.trained_future",
    "TrainedErasure": "workbench.analysis.trained_erasure",
    "load_lens": "workbench.analysis.trained_lens",
    "HeadAtlas": "workbench.pages.head_atlas",
    "head_atlas": "workbench.pages.head_atlas",
    "TokenView": "workbench.pages.token_view",
    "Result": "workbench.results.result",
    "load_result": "workbench.results.result",
    "export": "workbench.pages.figure_export",
    "Probe": "workbench.results.probe",
    "WorkbenchError": "workbench.io.errors",
    "RequestError": "workbench.io.errors",
    "DataError": "workbench.io.errors",
}

__all__ = sorted(_PUBLIC)  # pyright: ignore[reportUnsupportedDunderAll]  # the table is the one list of names


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version  # milliseconds

        return version("interp-workbench")
    from workbench.io.lazy import lazy_names  # not above: see TYPE_CHECKING

    return lazy_names(__name__, _PUBLIC)(name)


def __dir__() -> list[str]:
    return __all__


if TYPE_CHECKING:
    __version__: str

    from workbench.analysis.absorption import feature_absorption
    from workbench.analysis.comparison import compare
    from workbench.analysis.directions import mean_difference, principal_directions
    from workbench.analysis.feature_effect import feature_effect
    from workbench.analysis.logit_contributions import feature_contributions
    from workbench.analysis.patchscope import Patchscope, patchscope
    from workbench.analysis.sparse_probe import sparse_probe
    from workbench.analysis.trained_erasure import TrainedErasure
    from workbench.analysis.trained_future import TrainedFutureLens
    from workbench.analysis.trained_lens import TrainedLens, load_lens
    from workbench.corpus.prompt_pairs import PromptPair, PromptPairs, check_pairs
    from workbench.corpus.repeats import random_repeats, shuffled_blocks
    from workbench.corpus.substitutions import substitution_texts
    from workbench.corpus.task_suites import prompt_pairs
    from workbench.embedded import demo_corpus
    from workbench.embedded.planted import planted_corpus
    from workbench.features.extract import extract_features
    from workbench.features.feature_store import Features, open_features
    from workbench.features.label_files import import_labels
    from workbench.features.matching import feature_splits, match_features
    from workbench.features.other_formats import export_delphi, export_neuronpedia
    from workbench.features.pairs import coactive_pairs
    from workbench.features.promoted import promoted_tokens
    from workbench.features.queries import (
        active_rows,
        best_features,
        coactivation,
        feature_histogram,
        feature_statistics,
    )
    from workbench.features.removal import remove
    from workbench.io.errors import DataError, RequestError, WorkbenchError
    from workbench.model.attention_records import BiasAttention, RedistributeAttention, ScaleAttention
    from workbench.model.block_records import SkipBlock, SwapBlocks
    from workbench.model.direction import Direction, load_direction
    from workbench.model.embedding_records import EmbedTokens
    from workbench.model.head_results import head_results
    from workbench.model.intervene import intervene
    from workbench.model.load import Model, load_model
    from workbench.model.logit_metrics import LogitDifference, LogProbability, NextTokenLoss
    from workbench.model.row_records import Add, Project, Set, Zero
    from workbench.model.score_arrays import attn_scores
    from workbench.model.stored_attention import FreezePattern
    from workbench.model.stored_rows import Mean, Patch, Resample
    from workbench.model.token_choice import Tokens
    from workbench.pages.feature_index import feature_index, feature_pages
    from workbench.pages.feature_page import feature_card, feature_page
    from workbench.pages.figure_export import export
    from workbench.pages.head_atlas import HeadAtlas, head_atlas
    from workbench.pages.serve import serve
    from workbench.pages.token_view import TokenView
    from workbench.parallel.ray import RayWorkers
    from workbench.parallel.share import Share
    from workbench.recording.estimate import plan
    from workbench.recording.generation import generate
    from workbench.recording.record import record
    from workbench.results.combine import combine
    from workbench.results.probe import Probe
    from workbench.results.result import Result, load_result
    from workbench.sae.autoencoder import Sae
    from workbench.sae.decoder import nearest_features
    from workbench.sae.feature_record import Feature
    from workbench.sae.load import load_sae
    from workbench.sae.metrics import sae_metrics
    from workbench.sae.neuron_dictionary import neuron_dictionary
    from workbench.sae.ruled import with_sparsity
    from workbench.sites.settings import Recording
    from workbench.store.computed import ComputedArray
    from workbench.store.datasets import RowDataset, to_hf_dataset
    from workbench.store.merged_store import merge
    from workbench.store.packed_copy import pack
    from workbench.store.reader import ActivationArray, LayeredArray, Store, open_store
    from workbench.store.row_array import RowArray
    from workbench.store.selected_rows import Rows
