"""The probes: one question each, one file each, run on a store. Each is loaded when first used."""

from typing import TYPE_CHECKING

from workbench.io.lazy import lazy_names

if __name__ != "workbench.probes":
    raise ImportError("the probes are installed inside the package: write `from workbench.probes import ...`")

_PUBLIC = {
    "ActivationPatching": "workbench.probes.activation_patching",
    "ActiveDormant": "workbench.probes.active_dormant",
    "AttentionCalibration": "workbench.probes.attention_calibration",
    "AttentionSinks": "workbench.probes.attention_sinks",
    "AttributionPatching": "workbench.probes.attribution_patching",
    "DirectLogitAttribution": "workbench.probes.direct_logit_attribution",
    "FunctionVectors": "workbench.probes.function_vectors",
    "EdgeAttribution": "workbench.probes.edge_attribution",
    "FeedForwardMaps": "workbench.probes.feed_forward_maps",
    "FiberBundle": "workbench.probes.fiber_bundle",
    "FutureLens": "workbench.probes.future_lens",
    "FuturePrompts": "workbench.probes.future_prompts",
    "HeadAblation": "workbench.probes.named_heads",
    "HiddenSinks": "workbench.probes.hidden_sinks",
    "InductionHeads": "workbench.probes.induction_heads",
    "JacobianLens": "workbench.probes.jacobian_lens",
    "LinearProbes": "workbench.probes.linear_probes",
    "LogitLens": "workbench.probes.logit_lens",
    "MaskedSinks": "workbench.probes.masked_sinks",
    "MassiveActivations": "workbench.probes.massive_activations",
    "Neurons": "workbench.probes.neurons",
    "MaskPositions": "workbench.probes.mask_positions",
    "NextTokenLaw": "workbench.probes.next_token_law",
    "OverSquashing": "workbench.probes.over_squashing",
    "PathPatching": "workbench.probes.path_patching",
    "RelativeContextualization": "workbench.probes.relative_contextualization",
    "RepresentationHijacking": "workbench.probes.representation_hijacking",
    "ResidualUncertainty": "workbench.probes.residual_uncertainty",
    "SemanticAxes": "workbench.probes.semantic_axes",
    "Similarity": "workbench.probes.similarity",
    "Stages": "workbench.probes.stages",
    "Steering": "workbench.probes.steering",
    "SuccessorHeads": "workbench.probes.successor_heads",
    "TokenCharacters": "workbench.probes.token_characters",
    "TokenErasure": "workbench.probes.token_erasure",
    "TokenGeometry": "workbench.probes.token_geometry",
    "TokenMicroscope": "workbench.probes.token_microscope",
    "TunedLens": "workbench.probes.tuned_lens",
    "ValueAwareImportance": "workbench.probes.value_aware_importance",
    "UnderTrainedTokens": "workbench.probes.under_trained_tokens",
    "VocabularyKeys": "workbench.probes.vocabulary_keys",
    "ZeroTuning": "workbench.probes.zero_tuning",
}

__all__ = sorted(_PUBLIC)  # pyright: ignore[reportUnsupportedDunderAll]  # the table is the one list of names
__getattr__ = lazy_names(__name__, _PUBLIC)


if TYPE_CHECKING:
    from workbench.probes.activation_patching import ActivationPatching
    from workbench.probes.active_dormant import ActiveDormant
    from workbench.probes.attention_calibration import AttentionCalibration
    from workbench.probes.attention_sinks import AttentionSinks
    from workbench.probes.attribution_patching import AttributionPatching
    from workbench.probes.direct_logit_attribution import DirectLogitAttribution
    from workbench.probes.edge_attribution import EdgeAttribution
    from workbench.probes.feed_forward_maps import FeedForwardMaps
    from workbench.probes.fiber_bundle import FiberBundle
    from workbench.probes.function_vectors import FunctionVectors
    from workbench.probes.future_lens import FutureLens
    from workbench.probes.future_prompts import FuturePrompts
    from workbench.probes.hidden_sinks import HiddenSinks
    from workbench.probes.induction_heads import InductionHeads
    from workbench.probes.jacobian_lens import JacobianLens
    from workbench.probes.linear_probes import LinearProbes
    from workbench.probes.logit_lens import LogitLens
    from workbench.probes.mask_positions import MaskPositions
    from workbench.probes.masked_sinks import MaskedSinks
    from workbench.probes.massive_activations import MassiveActivations
    from workbench.probes.named_heads import HeadAblation
    from workbench.probes.neurons import Neurons
    from workbench.probes.next_token_law import NextTokenLaw
    from workbench.probes.over_squashing import OverSquashing
    from workbench.probes.path_patching import PathPatching
    from workbench.probes.relative_contextualization import RelativeContextualization
    from workbench.probes.representation_hijacking import RepresentationHijacking
    from workbench.probes.residual_uncertainty import ResidualUncertainty
    from workbench.probes.semantic_axes import SemanticAxes
    from workbench.probes.similarity import Similarity
    from workbench.probes.stages import Stages
    from workbench.probes.steering import Steering
    from workbench.probes.successor_heads import SuccessorHeads
    from workbench.probes.token_characters import TokenCharacters
    from workbench.probes.token_erasure import TokenErasure
    from workbench.probes.token_geometry import TokenGeometry
    from workbench.probes.token_microscope import TokenMicroscope
    from workbench.probes.tuned_lens import TunedLens
    from workbench.probes.under_trained_tokens import UnderTrainedTokens
    from workbench.probes.value_aware_importance import ValueAwareImportance
    from workbench.probes.vocabulary_keys import VocabularyKeys
    from workbench.probes.zero_tuning import ZeroTuning
