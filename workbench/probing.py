"""The declared surface for authors of probes: what our probes are made of, and nothing else of the workbench.

    from workbench.probing import Result, Variable, dataset, provenance, recorded_layers, selected_rows

`docs/own-probe.md` shows a whole probe. Names are loaded when first used, so that this import needs neither torch nor
plotly. A name here keeps its meaning; the module that it comes from may move.
"""

from typing import TYPE_CHECKING

from workbench.io.lazy import lazy_names

_PUBLIC = {
    # the contract and its records
    "ActivationArray": "workbench.store.reader",
    "FiniteRows": "workbench.store.lost_values",
    "LOST_VARIABLES": "workbench.analysis.store_probe",
    "Result": "workbench.results.result",
    "Site": "workbench.sites.grammar",
    "Store": "workbench.store.reader",
    **dict.fromkeys(("StoreProbe", "LayerProbe"), "workbench.analysis.store_probe"),
    **dict.fromkeys(("Variable", "dataset"), "workbench.results.variable"),
    "provenance": "workbench.results.result",
    "finite_rows": "workbench.store.lost_values",
    **dict.fromkeys(("model_label", "with_note"), "workbench.analysis.store_probe"),
    "with_interval": "workbench.results.variable",
    # settings, errors and progress
    "RequestError": "workbench.io.errors",
    **dict.fromkeys(("check", "check_fields"), "workbench.io.checks"),
    "nearest": "workbench.io.errors",
    "plain_torch": "workbench.io.torch_state",
    "progress": "workbench.io.progress",
    "usable_device": "workbench.io.torch_state",
    # norms
    "CHANGES": "workbench.analysis.massive",
    "MassivePlaces": "workbench.analysis.massive",
    "massive_changes": "workbench.analysis.massive",
    "find_massive": "workbench.analysis.massive",
    "mean_norms": "workbench.analysis.massive",
    **dict.fromkeys(("massive_activation", "residual_site", "value_site"), "workbench.analysis.norms"),
    **dict.fromkeys(("massive_shares", "massive_text", "ratio", "stack_value_norms"), "workbench.analysis.norms"),
    **dict.fromkeys(("residual_norms", "value_norms"), "workbench.analysis.norms"),
    # rows of a store
    **dict.fromkeys(("compare_domains", "permuted_gap"), "workbench.analysis.domains"),
    **dict.fromkeys(("rank_correlation", "removal_effects", "top_overlap"), "workbench.analysis.importance"),
    **dict.fromkeys(("for_query_heads", "output_maps", "written_norms"), "workbench.analysis.value_outputs"),
    "Sequences": "workbench.analysis.sequences",
    **dict.fromkeys(("distinct", "gaussian_like", "gride", "mean_cosine"), "workbench.analysis.point_clouds"),
    **dict.fromkeys(("nearest_neighbours", "neighbourhood_overlap"), "workbench.analysis.point_clouds"),
    **dict.fromkeys(("two_nn_first_fifth",), "workbench.analysis.point_clouds"),
    "FoldedLeastSquares": "workbench.analysis.least_squares",
    "document_folds": "workbench.analysis.least_squares",
    "final_norm": "workbench.model.unembed",
    "normalise": "workbench.model.unembed",
    "distinct": "workbench.analysis.point_clouds",
    "gaussian_like": "workbench.analysis.point_clouds",
    "gride": "workbench.analysis.point_clouds",
    "mean_cosine": "workbench.analysis.point_clouds",
    "nearest_neighbours": "workbench.analysis.point_clouds",
    "neighbourhood_overlap": "workbench.analysis.point_clouds",
    "two_nn_first_fifth": "workbench.analysis.point_clouds",
    **dict.fromkeys(("FoldedLeastSquares", "document_folds"), "workbench.analysis.least_squares"),
    **dict.fromkeys(("final_norm", "normalise"), "workbench.model.unembed"),
    "TOKEN_MEASURES": "workbench.analysis.token_attention",
    "Occurrences": "workbench.analysis.token_attention",
    "Queries": "workbench.analysis.token_attention",
    "RaggedSequences": "workbench.analysis.token_attention",
    "TokenAttention": "workbench.analysis.token_attention",
    "counted_queries": "workbench.analysis.token_attention",
    "recorded_sums": "workbench.analysis.token_attention",
    "token_keys": "workbench.analysis.token_attention",
    "whole_sequences": "workbench.analysis.token_attention",
    "attention_sites": "workbench.analysis.received",
    "attention_source": "workbench.analysis.received",
    **dict.fromkeys(("ROWS_PER_DIMENSION", "blocks", "recorded_layers"), "workbench.analysis.rows"),
    "SCORED": "workbench.analysis.segmentation",
    "Words": "workbench.analysis.words",
    **dict.fromkeys(("attention_sites", "attention_source"), "workbench.analysis.received"),
    "ROWS_PER_DIMENSION": "workbench.analysis.rows",
    "blocks": "workbench.analysis.rows",
    **dict.fromkeys(("erasure_scores", "segment"), "workbench.analysis.segmentation"),
    "layers_of": "workbench.analysis.received",
    "find_words": "workbench.analysis.words",
    **dict.fromkeys(("next_tokens", "note_missing", "note_few_rows"), "workbench.analysis.rows"),
    "read_attention": "workbench.analysis.received",
    "require_causal": "workbench.analysis.causal",
    "read_alpha": "workbench.analysis.received",
    **dict.fromkeys(("received_sequences", "select_sequences"), "workbench.analysis.sequences"),
    **dict.fromkeys(("stack_heads", "stack_layers", "strongest_patterns"), "workbench.analysis.received"),
    **dict.fromkeys(("selected_rows", "split_by_document", "tokens_at"), "workbench.analysis.rows"),
    # labels of tokens, and probes that read them
    "Direction": "workbench.model.direction",
    "LabelledRows": "workbench.analysis.labelled_rows",
    "LogisticFit": "workbench.analysis.logistic",
    **dict.fromkeys(("ProbeFit", "Scored", "Standardised"), "workbench.analysis.linear_probe"),
    "control_task": "workbench.analysis.labelled_rows",
    "fit_classes": "workbench.analysis.logistic",
    **dict.fromkeys(("fit_probe", "intervals_of"), "workbench.analysis.linear_probe"),
    "labelled_rows": "workbench.analysis.labelled_rows",
    **dict.fromkeys(("majority", "most_informative", "recalls"), "workbench.analysis.linear_probe"),
    "second_moments": "workbench.analysis.logistic",
    "shuffle_labels": "workbench.analysis.labelled_rows",
    **dict.fromkeys(("TOKEN_CLASSES", "token_classes"), "workbench.analysis.token_classes"),
    "token_identity": "workbench.analysis.linear_probe",
    # statistics
    **dict.fromkeys(("GroupMeans", "Interval"), "workbench.results.bootstrap"),
    **dict.fromkeys(("SoftmaxFit", "SoftmaxProbes"), "workbench.analysis.softmax_probe"),
    "central": "workbench.results.bootstrap",
    "clustered_auc": "workbench.analysis.detection",
    **dict.fromkeys(("clustered_interval", "clustered_means", "group_means"), "workbench.results.bootstrap"),
    "fit_softmax": "workbench.analysis.softmax_probe",
    **dict.fromkeys(("interval_suffix", "interval_text", "value_text"), "workbench.results.bootstrap"),
    "intervals": "workbench.results.bootstrap",
    "points_text": "workbench.results.bootstrap",
    "resampled_means": "workbench.results.bootstrap",
    "wilson": "workbench.results.bootstrap",
    "Principal": "workbench.analysis.row_similarity",
    "matching_rows": "workbench.analysis.row_similarity",
    "principal": "workbench.analysis.row_similarity",
    "subspace_overlap": "workbench.analysis.row_similarity",
    "svcca": "workbench.analysis.row_similarity",
    "unbiased_cka": "workbench.analysis.row_similarity",
    # readings through the unembedding, of later tokens
    **dict.fromkeys(("CASES", "Chain"), "workbench.analysis.successor_tasks"),
    "FutureMap": "workbench.analysis.future_maps",
    **dict.fromkeys(("TrainedFutureLens", "pack_future_lens"), "workbench.analysis.trained_future"),
    **dict.fromkeys(("future_title", "future_view", "tokens_ahead"), "workbench.analysis.future_view"),
    **dict.fromkeys(("SPACES", "TASKS"), "workbench.analysis.successor_tasks"),
    **dict.fromkeys(("NUMBERS", "digit_readings"), "workbench.analysis.digits"),
    "direct_effects": "workbench.analysis.successions",
    "find_chains": "workbench.analysis.successor_tasks",
    "find_places": "workbench.analysis.successions",
    "make_pairs": "workbench.analysis.successor_tasks",
    "shares_of_wins": "workbench.analysis.successions",
    "shuffled_null": "workbench.analysis.successor_tasks",
    "strict_argmax": "workbench.analysis.digits",
    **dict.fromkeys(("FutureSplit", "FutureTask"), "workbench.analysis.future_task"),
    "LENS_VARIABLES": "workbench.analysis.lens",
    **dict.fromkeys(("TrainedLens", "kept_lens"), "workbench.analysis.trained_lens"),
    **dict.fromkeys(("affordable_prompts", "mean_jacobians"), "workbench.analysis.jacobian"),
    **dict.fromkeys(("BlockParts", "block_parts", "contributions"), "workbench.analysis.feed_forward"),
    **dict.fromkeys(("conditional_excess", "marginal_excess"), "workbench.analysis.score_excess"),
    "non_relative": "workbench.analysis.position_patterns",
    "non_relative_share": "workbench.analysis.position_patterns",
    "simulated_scores": "workbench.analysis.position_patterns",
    "slope_of_keys": "workbench.analysis.position_patterns",
    "kl_slope": "workbench.analysis.lens",
    "Unembed": "workbench.model.unembed",
    **dict.fromkeys(("fit_direct", "fit_linear"), "workbench.analysis.future_maps"),
    "choose_layer": "workbench.analysis.future_task",
    "load_future_task": "workbench.analysis.future_task",
    "note_own_output": "workbench.analysis.future_task",
    "own_output": "workbench.analysis.future_task",
    "load_unembed": "workbench.model.unembed",
    **dict.fromkeys(("log_probabilities", "read_lens"), "workbench.analysis.lens"),
    **dict.fromkeys(("note_few_documents", "precision_table"), "workbench.analysis.future_task"),
    **dict.fromkeys(("Parts", "StreamTerm"), "workbench.analysis.stream_terms"),
    **dict.fromkeys(("METRICS", "METRIC_UNITS"), "workbench.analysis.patching"),
    **dict.fromkeys(("OTHER", "PatchPair"), "workbench.analysis.patch_pairs"),
    "PathRuns": "workbench.analysis.path_runs",
    "PromptPairs": "workbench.corpus.prompt_pairs",
    **dict.fromkeys(("Runs", "other_pair"), "workbench.analysis.patching"),
    **dict.fromkeys(("of_usual_length", "pairs_of", "recorded_pairs"), "workbench.analysis.patch_pairs"),
    "shuffled_positions": "workbench.analysis.patching",
    **dict.fromkeys(("TaskVectors", "answers_after", "questions_alone"), "workbench.analysis.task_vectors"),
    "AblatedPart": "workbench.analysis.ablated_logits",
    "AblatedRuns": "workbench.analysis.ablated_logits",
    "ablation_effects": "workbench.analysis.ablated_logits",
    "ablated_logit_text": "workbench.analysis.ablated_logits",
    "EdgeGraph": "workbench.analysis.edge_graph",
    "EdgeRuns": "workbench.analysis.edge_runs",
    "measure_unembed": "workbench.model.unembed",
    "LogitTargets": "workbench.analysis.logit_targets",
    **dict.fromkeys(("Attribution", "at_place", "correlations", "some_pairs"), "workbench.analysis.attribution"),
    **dict.fromkeys(("check_sum", "plan_terms"), "workbench.analysis.stream_terms"),
    **dict.fromkeys(("norm_bias", "read_directions", "single_tokens", "token_id"), "workbench.analysis.frozen_norm"),
    # the recorded model: weights, attention, interventions
    "Add": "workbench.model.row_records",
    "Change": "workbench.analysis.change_effects",
    "Received": "workbench.analysis.sink_changes",
    **dict.fromkeys(("RedistributeAttention", "ScaleAttention"), "workbench.model.attention_records"),
    **dict.fromkeys(("change_keys", "read_received"), "workbench.analysis.sink_changes"),
    "ChangeEffects": "workbench.analysis.change_effects",
    **dict.fromkeys(("SkipBlock", "SwapBlocks"), "workbench.model.block_records"),
    "predicting_rows": "workbench.analysis.change_effects",
    "random_copy": "workbench.model.random_copy",
    **dict.fromkeys(("NeuronActivity", "layer_neurons", "neuron_activity"), "workbench.analysis.neuron_activity"),
    "extreme_tokens": "workbench.sae.decoder",
    "vocabulary_moments": "workbench.analysis.neuron_moments",
    "Set": "workbench.model.row_records",
    "Columns": "workbench.model.attention",
    "ABLATION_VARIABLES": "workbench.analysis.ablated_heads",
    "capture": "workbench.model.capture",
    **dict.fromkeys(("ablated_heads", "ablation_text"), "workbench.analysis.ablated_heads"),
    **dict.fromkeys(("MEASURES", "MeasuredRows", "change_effects"), "workbench.analysis.change_effects"),
    "ablated_heads": "workbench.analysis.ablated_heads",
    "ablation_text": "workbench.analysis.ablated_heads",
    **dict.fromkeys(
        ("MEASURES", "Change", "ChangeEffects", "MeasuredRows", "change_effects", "document_halves", "predicting_rows"),
        "workbench.analysis.change_effects",
    ),
    **dict.fromkeys(("AblatedHeads", "head_ablation", "random_heads"), "workbench.analysis.head_ablation"),
    **dict.fromkeys(("Received", "change_keys", "read_received"), "workbench.analysis.sink_changes"),
    **dict.fromkeys(("RedistributeAttention", "ScaleAttention"), "workbench.model.attention_records"),
    **dict.fromkeys(("SkipBlock", "SwapBlocks"), "workbench.model.block_records"),
    **dict.fromkeys(("first_key_rows", "scaled_entropy", "temperature_curve"), "workbench.analysis.first_key"),
    **dict.fromkeys(
        ("IDENTITY_PROMPT", "first_token", "random_states", "read_states", "target_prompt"),
        "workbench.analysis.patchscope",
    ),
    "continue_steered": "workbench.analysis.continuations",
    "load_direction": "workbench.model.direction",
    "random_direction": "workbench.analysis.continuations",
    "token_texts": "workbench.corpus.tokenizer",
    "FirstMlp": "workbench.model.circuits",
    "FrozenOutput": "workbench.model.frozen_output",
    "HeadOutput": "workbench.model.circuits",
    "Model": "workbench.model.load",
    "Prompted": "workbench.analysis.prompted",
    "copying_scores": "workbench.analysis.copying",
    "direct_logits": "workbench.model.circuits",
    "first_mlp": "workbench.model.circuits",
    "head_outputs": "workbench.model.circuits",
    "mlp_outputs": "workbench.model.circuits",
    "ov_logits": "workbench.model.circuits",
    "recorded_model": "workbench.model.reload",
    "ScoreRule": "workbench.sites.score_rule",
    **dict.fromkeys(
        ("attention_scores", "layer_rule", "recorded_rules", "score_rules"), "workbench.model.attention_scores"
    ),
    "row_entropy": "workbench.model.attention",
    "run_prompted": "workbench.model.prompted_run",
    "token_embeddings": "workbench.model.embedding_records",
    "writes_of": "workbench.model.circuits",
    **dict.fromkeys(("Vocabulary", "WeightsProbe", "read_vocabulary"), "workbench.analysis.weights_probe"),
    "repetition_probabilities": "workbench.analysis.repetition",
    "axis_effects": "workbench.analysis.axis_effects",
    "read_poles": "workbench.analysis.poles",
    # figures, made of a result alone
    "ablation_bars": "workbench.analysis.attribution_patching_figures",
    **dict.fromkeys(("category_points", "labelled_histogram"), "workbench.figures.labelled_points"),
    **dict.fromkeys(("labelled_scatter",), "workbench.figures.labelled_points"),
    "attribution_bars": "workbench.analysis.attribution_figures",
    "attribution_grid": "workbench.analysis.attribution_figures",
    "attribution_heads": "workbench.analysis.attribution_figures",
    "correlation_lines": "workbench.analysis.attribution_patching_figures",
    **dict.fromkeys(("faithfulness_curve", "strongest_edges"), "workbench.analysis.edge_figures"),
    "estimate_scatter": "workbench.analysis.attribution_patching_figures",
    **dict.fromkeys(("patching_lines", "patching_map", "patching_spread"), "workbench.analysis.patching_figures"),
    "group_intervals": "workbench.figures.group_intervals",
    "position_bars": "workbench.figures.position_bars",
    "CATEGORIES": "workbench.figures.theme",
    "Band": "workbench.figures.layer_bands",
    "Curve": "workbench.figures.layer_panels",
    "MAX_TOKENS": "workbench.figures.token_grid",
    **dict.fromkeys(("MONOSPACE", "NEUTRAL"), "workbench.figures.theme"),
    "Panel": "workbench.figures.layer_panels",
    **dict.fromkeys(("PROBABILITY", "SIGNED", "TEMPLATE"), "workbench.figures.theme"),
    "axis_title": "workbench.figures.safe_text",
    "colour_bar": "workbench.figures.theme",
    "count_shown": "workbench.figures.token_grid",
    "head_attention": "workbench.figures.attention_map",
    **dict.fromkeys(("head_grid", "head_name"), "workbench.figures.head_grid"),
    "integer_step": "workbench.figures.ticks",
    "label": "workbench.figures.safe_text",
    "layer_bands": "workbench.figures.layer_bands",
    "layer_curves": "workbench.figures.layer_curves",
    "layer_grid": "workbench.figures.layer_grid",
    "layer_panels": "workbench.figures.layer_panels",
    **dict.fromkeys(("lens_curves", "lens_depth", "lens_grid"), "workbench.analysis.lens_figures"),
    "token_grid": "workbench.figures.token_grid",
    "token_strip": "workbench.figures.token_strip",
    "with_side_panel": "workbench.figures.head_grid",
}

__all__ = sorted(_PUBLIC)  # pyright: ignore[reportUnsupportedDunderAll]  # the table is the one list of names
__getattr__ = lazy_names(__name__, _PUBLIC)


def __dir__() -> list[str]:
    return __all__


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
    from workbench.analysis.feed_forward import BlockParts, block_parts, contributions
    from workbench.analysis.first_key import first_key_rows, scaled_entropy, temperature_curve
    from workbench.analysis.frozen_norm import norm_bias, read_directions, single_tokens, token_id
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
    from workbench.analysis.lens_figures import lens_curves, lens_depth, lens_grid
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
    from workbench.analysis.received import (
        attention_sites,
        attention_source,
        layers_of,
        read_alpha,
        read_attention,
        stack_heads,
        stack_layers,
        strongest_patterns,
    )
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
    from workbench.analysis.segmentation import SCORED, erasure_scores, segment
    from workbench.analysis.sequences import Sequences, received_sequences, select_sequences
    from workbench.analysis.sink_changes import Received, change_keys, read_received
    from workbench.analysis.softmax_probe import SoftmaxFit, SoftmaxProbes, fit_softmax
    from workbench.analysis.store_probe import LOST_VARIABLES, LayerProbe, StoreProbe, model_label, with_note
    from workbench.analysis.stream_terms import Parts, StreamTerm, check_sum, plan_terms
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
    from workbench.analysis.trained_future import TrainedFutureLens, pack_future_lens
    from workbench.analysis.trained_lens import TrainedLens, kept_lens
    from workbench.analysis.value_outputs import for_query_heads, output_maps, written_norms
    from workbench.analysis.weights_probe import Vocabulary, WeightsProbe, read_vocabulary
    from workbench.analysis.words import Words, find_words
    from workbench.corpus.prompt_pairs import PromptPairs
    from workbench.corpus.tokenizer import token_texts
    from workbench.figures.attention_map import head_attention
    from workbench.figures.group_intervals import group_intervals
    from workbench.figures.head_grid import head_grid, head_name, with_side_panel
    from workbench.figures.labelled_points import category_points, labelled_histogram, labelled_scatter
    from workbench.figures.layer_bands import Band, layer_bands
    from workbench.figures.layer_curves import layer_curves
    from workbench.figures.layer_grid import layer_grid
    from workbench.figures.layer_panels import Curve, Panel, layer_panels
    from workbench.figures.position_bars import position_bars
    from workbench.figures.safe_text import axis_title, label
    from workbench.figures.theme import CATEGORIES, MONOSPACE, NEUTRAL, PROBABILITY, SIGNED, TEMPLATE, colour_bar
    from workbench.figures.ticks import integer_step
    from workbench.figures.token_grid import MAX_TOKENS, count_shown, token_grid
    from workbench.figures.token_strip import token_strip
    from workbench.io.checks import check, check_fields
    from workbench.io.errors import RequestError, nearest
    from workbench.io.progress import progress
    from workbench.io.torch_state import plain_torch, usable_device
    from workbench.model.attention import Columns, row_entropy
    from workbench.model.attention_records import RedistributeAttention, ScaleAttention
    from workbench.model.attention_scores import attention_scores, layer_rule, recorded_rules, score_rules
    from workbench.model.block_records import SkipBlock, SwapBlocks
    from workbench.model.capture import capture
    from workbench.model.circuits import (
        FirstMlp,
        HeadOutput,
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
    from workbench.model.load import Model
    from workbench.model.prompted_run import run_prompted
    from workbench.model.random_copy import random_copy
    from workbench.model.reload import recorded_model
    from workbench.model.row_records import Add, Set
    from workbench.model.unembed import Unembed, final_norm, load_unembed, measure_unembed, normalise
    from workbench.results.bootstrap import (
        GroupMeans,
        Interval,
        central,
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
