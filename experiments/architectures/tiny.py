"""Smallest random models of every causal language model type in transformers."""

import copy
import dataclasses
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

_VALUES: tuple[tuple[Any, str], ...] = (
    # Body. Four layers: there is a middle, and a hybrid has two of each kind.
    (4, "num_hidden_layers n_layer n_layers num_layers num_blocks num_decoder_layers num_encoder_layers"),
    (4, "decoder_layers encoder_layers"),
    (32, "hidden_size n_embd d_model emb_dim embed_dim embedding_dim embedding_size word_embed_proj_dim"),
    (32, "input_embedding_size output_embedding_size pronunciation_embed_dim shape_embed_dim hidden_size_global"),
    (64, "intermediate_size intermediate_size_mlp dense_intermediate_size prefix_dense_intermediate_size mlp_dim"),
    (64, "ffn_dim ffn_hidden_size d_ff d_inner dff dim_ff feed_forward_size decoder_ffn_dim encoder_ffn_dim"),
    (128, "vocab_size decoder_vocab_size vocab_size_per_layer_input audio_vocab_size"),
    (128, "max_position_embeddings n_positions n_ctx max_seq_len max_target_positions context_length"),
    (120, "unpadded_vocab_size"),
    (64, "pronunciation_vocab_size shape_vocab_size encoder_hash_byte_group_vocab"),
    (8, "hidden_size_per_layer_input laurel_rank hc_lowrank"),
    (0, "pad_token_id"),
    (1, "bos_token_id decoder_start_token_id"),
    (2, "eos_token_id"),
    (True, "is_decoder causal"),
    # Attention. Windows, chunks and index budgets are shorter than a test sequence.
    (4, "num_attention_heads n_head n_heads num_heads attention_heads swa_num_attention_heads"),
    (4, "decoder_attention_heads encoder_attention_heads num_decoder_attention_heads num_encoder_attention_heads"),
    (2, "num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads"),
    (8, "head_dim attention_head_dim attention_head_size swa_head_dim dim_head d_head d_kv kv_channels"),
    (8, "qk_nope_head_dim qk_rope_head_dim v_head_dim index_head_dim query_pre_attn_scalar"),
    (16, "qk_head_dim kv_lora_rank q_lora_rank o_lora_rank"),
    (4, "rotary_dim index_n_heads index_topk"),
    (8, "sliding_window sliding_window_size attention_window_size local_attention_window_len window_size rel_extent"),
    (8, "attention_chunk_size local_attention keep_window_size block_size index_block_size"),
    ("original_full", "attention_type"),
    # Mixtures of experts.
    (4, "num_experts num_local_experts n_routed_experts moe_num_experts"),
    (2, "num_experts_per_tok moe_topk moe_top_k moe_k zero_expert_num"),
    (1, "n_group topk_group n_shared_experts num_shared_experts moe_num_shared_experts"),
    (1, "first_k_dense_replace num_dense_layers"),
    (32, "moe_intermediate_size expert_ffn_hidden_size shared_intermediate_size shared_expert_intermediate_size"),
    (32, "shared_experts_intermediate_size moe_shared_expert_intermediate_size router_hidden_size"),
    # State spaces, recurrences and linear attention.
    (8, "mamba_d_state state_size ssm_state_size mamba_chunk_size chunk_size"),
    (8, "linear_head_dim linear_key_head_dim linear_value_head_dim"),
    (4, "mamba_n_heads mamba_num_heads n_mamba_heads linear_num_heads linear_num_value_heads"),
    (2, "linear_num_key_heads attn_layer_period"),
    (16, "mamba_d_head mamba_head_dim"),
    (64, "mamba_d_ssm"),
    (32, "lru_width"),
    (4, "mamba_dt_rank time_step_rank"),
    (1, "mamba_n_groups mamba_ngroups n_groups attn_layer_offset"),
    # Scales and caps, at values at which they have an effect.
    (2.0, "embedding_multiplier scale_emb logits_scaling"),
    (2.0, "final_logit_softcapping logits_soft_cap output_logit_soft_cap"),
    (0.5, "residual_multiplier logit_scale lm_head_multiplier attention_out_multiplier ssm_out_multiplier"),
    (1.5, "scale_depth"),
    (16, "dim_model_base"),
    # Vision and audio towers.
    (32, "image_size out_hidden_size vision_output_dim projector_input_dim projector_output_dim"),
    (32, "adapter_in_dim adapter_input_size adapter_out_dim"),
    (16, "patch_size"),
)
TINY: dict[str, Any] = {name: value for value, names in _VALUES for name in names.split()}
"""Value of each config field, in every config that has the field."""

COMPANIONS: dict[str, dict[str, Any]] = {"kv_lora_rank": {"num_key_value_heads": 4}}
"""A config that has the field on the left also takes the values on the right."""

_SLIDING = ["sliding_attention", "full_attention"] * 2
_LINEAR = ["linear_attention", "full_attention"] * 2
_SHARED = ["linear_attention", "hybrid"] * 2
_CONVOLUTION = ["conv", "full_attention"] * 2
_DOTS3 = {
    **{"swa_q_lora_rank": 16, "swa_kv_lora_rank": 16, "swa_head_dim": 16, "swa_qk_nope_head_dim": 8},
    **{"swa_v_head_dim": 8, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4},
}
_QWEN4 = {
    **{"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8},
    **{"indexer_budget": 4, "indexer_compress_ratio": 2},
}

OVERRIDES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_types": _LINEAR},
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {"patch_size": 4, "use_cache": False},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
    },
    "gpt_oss": {  # a factor that fits the 128 positions, so that transformers does not warn
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1.5e5,
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4,
        }
    },
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4}},
    "dots3_note": {"text_config": _DOTS3, "vision_config": {"num_hidden_layers": 42}},
    "dots3_note_text": _DOTS3,
    "gemma3": {"text_config": {"layer_types": _SLIDING, "final_logit_softcapping": None}},
    "gemma3_text": {"layer_types": _SLIDING},
    "gemma3n_text": {"layer_types": _SLIDING, "num_kv_shared_layers": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": _LINEAR},
    "inkling2_text": {"layer_types": ["hybrid_sliding", "hybrid"] * 2, "n_layers_per_attn_res_block": 2},
    "inkling_text": {"layer_types": ["hybrid_sliding", "hybrid"] * 2},
    "kimi_linear": {"layer_types": _LINEAR},
    "kolibri1": {"layer_types": _SLIDING},
    "laguna": {"layer_types": _SLIDING},
    "lfm2": {"layer_types": _CONVOLUTION},
    "lfm2_moe": {"layer_types": _CONVOLUTION},
    "lfm3": {"layer_types": ["conv", "full_attention", "conv", "sliding_attention"]},
    "mamba2": {"head_dim": 16},
    "ministral": {"layer_types": _SLIDING},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 16], "attn_layers": ["local", "lsh"] * 2},
    "xlstm": {"hidden_size": 64, "embedding_dim": 64, "qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": _SHARED},
    "zamba2": {"layers_block_type": _SHARED},
    "zaya": {"num_experts_per_tok": 1},
}
"""Fields that a type needs to be built, or to have each kind of its layers; a mapping is for a nested config."""


def causal_lm_types() -> tuple[str, ...]:
    """Returns every model type that transformers maps to a causal language model, sorted."""
    return tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))


def tiny_model(model_type: str, seed: int = 0) -> PreTrainedModel:
    """Returns a random model of this type, in float32 on the CPU, with every parameter moved off its initial value."""
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ValueError(f"model_type is {model_type!r}, which transformers does not map to a causal language model")
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            config = _tiny_config(CONFIG_MAPPING[model_type], OVERRIDES.get(model_type, {}))
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            for parameter in model.parameters():
                if parameter.is_floating_point():
                    parameter.data += 0.1 * torch.randn_like(parameter)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"cannot build a tiny {model_type!r}: {reason}") from error
    model.config.architectures = [type(model).__name__]
    return model.eval()


def _tiny_config(config_class: type[PreTrainedConfig], overrides: dict[str, Any]) -> PreTrainedConfig:
    """Returns the config of this class from the tables above, including nested configs."""
    fields = {field.name for field in dataclasses.fields(config_class)}
    values = {name: value for name, value in TINY.items() if name in fields}
    for name, companions in COMPANIONS.items():
        values |= companions if name in fields else {}
    values |= copy.deepcopy(overrides)
    specs = config_class.sub_configs_defaults or {}
    for name, sub_class in config_class.sub_configs.items():  # pyright: ignore[reportAttributeAccessIssue]  # a class property
        if name in overrides or name not in specs or not specs[name].optional:
            nested = CONFIG_MAPPING[specs[name].model_type] if sub_class is AutoConfig else sub_class
            values[name] = _tiny_config(nested, overrides.get(name, {}))
    return config_class(**values)
