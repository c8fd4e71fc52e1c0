"""The declared surface for authors of probes: what our probes are made of, and nothing else of the workbench.

    from workbench.probing import Result, Variable, dataset, provenance, recorded_layers, selected_rows

`docs/own-probe.md` shows a whole probe. Names are loaded when first used, so that this import needs neither torch nor
plotly. A name here keeps its meaning; the module that it comes from may move.

The names are those of the imports below, which type checkers read and nothing executes.
"""

from typing import TYPE_CHECKING

from workbench.io.lazy import declared_names, lazy_names

if TYPE_CHECKING:
    from workbench.analysis.ablated_heads import ABLATION_VARIABLES, ablated_heads, ablation_text
    from workbench.analysis.ablated_logits import AblatedPart, AblatedRuns, ablated_logit_text, ablation_effects
    from workbench.analysis.attribution import Attribution, at_place, correlations, some_pairs
    from workbench.analysis.attribution_figures import attribution_bars, attribution_grid, attribution_heads
    from workbench.analysis.attribution_patching_figures import ablation_bars, correlation_lines, estimate_scatter
    from workbench.analysis.axis_effects import axis_effects
    from workbench.analysis.causal import require_causal
    from workbench.analysis.change_effects import (
        MEASURES,
        Change,
        ChangeEffects,
        MeasuredRows,
        change_effects,
        document_halves,
        predicting_rows,
    )
    from workbench.analysis.continuations import continue_steered, random_direction
    from workbench.analysis.copying import copying_scores
    from workbench.analysis.detection import clustered_auc
    from workbench.analysis.digits import NUMBERS, digit_readings, strict_argmax
    from workbench.analysis.domains import compare_domains, permuted_gap
    from workbench.analysis.edge_figures import faithfulness_curve, strongest_edges
    from workbench.analysis.edge_graph import EdgeGraph
    from workbench.analysis.edge_runs import EdgeRuns
    from workbench.analysis.erasure_figures import erasure_curves, segment_bars, vocabulary_bars
    from workbench.analysis.feed_forward import BlockParts, block_parts, contributions
    from workbench.analysis.first_key import first_key_rows, scaled_entropy, temperature_curve
    from workbench.analysis.frozen_norm import norm_bias, read_directions, single_tokens, token_id
    from workbench.analysis.future_figures import (
        LEARNED,
        future_calibration,
        prompt_precision,
        prompt_ranks,
        regime_name,
        short_prompt,
    )
    from workbench.analysis.future_maps import FutureMap, fit_direct, fit_linear
    from workbench.analysis.future_task import (
        FutureSplit,
        FutureTask,
        choose_layer,
        load_future_task,
        note_few_documents,
        note_own_output,
        own_output,
        precision_table,
    )
    from workbench.analysis.future_view import future_title, future_view, tokens_ahead
    from workbench.analysis.head_ablation import AblatedHeads, head_ablation, random_heads
    from workbench.analysis.importance import rank_correlation, removal_effects, top_overlap
    from workbench.analysis.jacobian import affordable_prompts, mean_jacobians
    from workbench.analysis.labelled_rows import LabelledRows, control_task, labelled_rows, shuffle_labels
    from workbench.analysis.least_squares import FoldedLeastSquares, document_folds
    from workbench.analysis.lens import LENS_VARIABLES, kl_slope, log_probabilities, read_lens
    from workbench.analysis.lens_figures import lens_curves, lens_depth, lens_grid, mean_curves
    from workbench.analysis.linear_probe import (
        ProbeFit,
        Scored,
        Standardised,
        fit_probe,
        intervals_of,
        majority,
        most_informative,
        recalls,
        token_identity,
    )
    from workbench.analysis.logistic import LogisticFit, fit_classes, second_moments
    from workbench.analysis.logit_decomposition import Decomposition, SplitTerm, SumChecks, TermName, TermSums
    from workbench.analysis.logit_targets import LogitTargets
    from workbench.analysis.massive import CHANGES, MassivePlaces, find_massive, massive_changes, mean_norms
    from workbench.analysis.neuron_activity import NeuronActivity, layer_neurons, neuron_activity
    from workbench.analysis.neuron_moments import vocabulary_moments
    from workbench.analysis.norms import (
        massive_activation,
        massive_shares,
        massive_text,
        ratio,
        residual_norms,
        residual_site,
        stack_value_norms,
        value_norms,
        value_site,
    )
    from workbench.analysis.patch_pairs import OTHER, PatchPair, of_usual_length, pairs_of, recorded_pairs
    from workbench.analysis.patching import METRIC_UNITS, METRICS, Runs, other_pair, shuffled_positions
    from workbench.analysis.patching_figures import patching_lines, patching_map, patching_spread
    from workbench.analysis.patchscope import IDENTITY_PROMPT, first_token, random_states, read_states, target_prompt
    from workbench.analysis.path_runs import PathRuns
    from workbench.analysis.point_clouds import (
        distinct,
        gaussian_like,
        gride,
        mean_cosine,
        nearest_neighbours,
        neighbourhood_overlap,
        two_nn_first_fifth,
    )
    from workbench.analysis.poles import read_poles
    from workbench.analysis.position_patterns import non_relative, non_relative_share, simulated_scores, slope_of_keys
    from workbench.analysis.prompted import Prompted
    from workbench.analysis.read_layers import choose_layers, layers_of, layers_text, require_any
    from workbench.analysis.received import (
        attention_sites,
        attention_source,
        read_alpha,
        read_attention,
        stack_heads,
        stack_layers,
        strongest_patterns,
    )
    from workbench.analysis.recorded_intervals import error_bars_of, recorded_ends
    from workbench.analysis.repetition import repetition_probabilities
    from workbench.analysis.row_similarity import (
        Principal,
        matching_rows,
        principal,
        subspace_overlap,
        svcca,
        unbiased_cka,
    )
    from workbench.analysis.rows import (
        ROWS_PER_DIMENSION,
        blocks,
        next_tokens,
        note_few_rows,
        note_missing,
        recorded_layers,
        selected_rows,
        split_by_document,
        tokens_at,
    )
    from workbench.analysis.score_excess import conditional_excess, marginal_excess
    from workbench.analysis.segmentation import SCORED, erasure_scores, segment, segment_agreement, text_segments
    from workbench.analysis.sequences import Sequences, received_sequences, select_sequences
    from workbench.analysis.sink_changes import Received, change_keys, read_received
    from workbench.analysis.softmax_probe import SoftmaxFit, SoftmaxProbes, fit_softmax
    from workbench.analysis.store_probe import LOST_VARIABLES, LayerProbe, StoreProbe, model_label, with_note
    from workbench.analysis.stream_terms import SUBLAYERS, Parts, StreamTerm, check_sum, plan_terms
    from workbench.analysis.successions import direct_effects, find_places, shares_of_wins
    from workbench.analysis.successor_tasks import CASES, SPACES, TASKS, Chain, find_chains, make_pairs, shuffled_null
    from workbench.analysis.task_vectors import TaskVectors, answers_after, questions_alone
    from workbench.analysis.token_attention import (
        TOKEN_MEASURES,
        Occurrences,
        Queries,
        RaggedSequences,
        TokenAttention,
        counted_queries,
        recorded_sums,
        token_keys,
        whole_sequences,
    )
    from workbench.analysis.token_classes import TOKEN_CLASSES, token_classes
    from workbench.analysis.trained_erasure import TrainedErasure
    from workbench.analysis.trained_future import TrainedFutureLens, pack_future_lens
    from workbench.analysis.trained_lens import TrainedLens, kept_lens
    from workbench.analysis.value_outputs import for_query_heads, output_maps, written_norms
    from workbench.analysis.weights_probe import Vocabulary, WeightsProbe, read_vocabulary
    from workbench.analysis.words import Words, find_words
    from workbench.corpus.prompt_pairs import PromptPairs
    from workbench.corpus.tokenizer import token_of_text, token_texts
    from workbench.figures.attention_map import head_attention
    from workbench.figures.colour_limits import colour_limits
    from workbench.figures.error_bars import band_traces, error_bars
    from workbench.figures.group_intervals import group_intervals
    from workbench.figures.head_grid import head_grid, head_hover, head_name, with_side_panel
    from workbench.figures.labelled_points import category_points, labelled_histogram, labelled_scatter
    from workbench.figures.layer_bands import Band, layer_bands
    from workbench.figures.layer_curves import layer_curves
    from workbench.figures.layer_grid import layer_grid
    from workbench.figures.layer_panels import Curve, Panel, layer_panels
    from workbench.figures.log_axis import log_axis
    from workbench.figures.position_bars import position_bars
    from workbench.figures.safe_text import axis_title, label
    from workbench.figures.theme import CATEGORIES, MONOSPACE, NEUTRAL, PROBABILITY, SIGNED, TEMPLATE, colour_bar
    from workbench.figures.themed import ThemedFigure
    from workbench.figures.ticks import integer_step
    from workbench.figures.token_grid import MAX_TOKENS, count_shown, token_grid
    from workbench.figures.token_strip import token_strip
    from workbench.io.checks import check, check_fields, check_kind
    from workbench.io.counted import counted
    from workbench.io.errors import RequestError, nearest
    from workbench.io.progress import progress, with_progress
    from workbench.io.torch_state import plain_torch, usable_device
    from workbench.model.attention import Columns, row_entropy
    from workbench.model.attention_records import RedistributeAttention, ScaleAttention
    from workbench.model.attention_scores import attention_scores, layer_rule, recorded_rules, score_rules
    from workbench.model.block_records import SkipBlock, SwapBlocks
    from workbench.model.capture import capture
    from workbench.model.circuits import (
        FirstMlp,
        HeadOutput,
        check_added,
        direct_logits,
        first_mlp,
        head_outputs,
        mlp_outputs,
        ov_logits,
        writes_of,
    )
    from workbench.model.direction import Direction, load_direction
    from workbench.model.embedding_records import token_embeddings
    from workbench.model.frozen_output import FrozenOutput
    from workbench.model.in_dtype import in_dtype
    from workbench.model.load import Model, check_model
    from workbench.model.prompted_run import run_prompted
    from workbench.model.random_copy import random_copy
    from workbench.model.reload import recorded_model
    from workbench.model.row_records import Add, Set
    from workbench.model.unembed import Unembed, final_norm, load_unembed, measure_unembed, normalise
    from workbench.results.bootstrap import (
        GroupMeans,
        Interval,
        binned_ends,
        central,
        clustered_ends,
        clustered_interval,
        clustered_means,
        group_means,
        interval_suffix,
        interval_text,
        intervals,
        points_text,
        resampled_means,
        value_text,
        wilson,
    )
    from workbench.results.result import Result, provenance
    from workbench.results.variable import Variable, dataset, with_interval
    from workbench.sae.decoder import extreme_tokens
    from workbench.sites.grammar import Site
    from workbench.sites.score_rule import ScoreRule
    from workbench.store.lost_values import FiniteRows, finite_rows
    from workbench.store.reader import ActivationArray, Store

_PUBLIC = declared_names(__file__)
__all__ = sorted(_PUBLIC)  # pyright: ignore[reportUnsupportedDunderAll]  # the imports above are the one list of names
__getattr__ = lazy_names(__name__, _PUBLIC)


def __dir__() -> list[str]:
    return __all__
