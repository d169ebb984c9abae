"""Make tiny configurations of whatever transformers builds as a causal LM: the defaults of its classes, made small."""

from __future__ import annotations

import json
from typing import Any, cast

from transformers import CONFIG_MAPPING

from workers.models.causal_lm.pretrained.numbering import layer_kinds, pruned

VOCABULARY, WINDOW = 96, 8
_FEWEST_LAYERS = 4
_HIDDEN = (
    "hidden_size n_embd d_model emb_dim embedding_dim embedding_size lru_width attention_hidden_size "
    "word_embed_proj_dim input_embedding_size output_embedding_size"
)
_HEADS = (
    "num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads num_decoder_attention_heads "
    "encoder_attention_heads swa_num_attention_heads linear_num_heads linear_num_value_heads index_n_heads"
)
_KEY_HEADS = "num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads num_global_key_value_heads"
_HEAD_SIZES = (
    "head_dim kv_channels attention_head_dim dim_head d_head attention_head_size global_head_dim swa_head_dim "
    "qk_nope_head_dim v_head_dim index_head_dim linear_head_dim linear_key_head_dim linear_value_head_dim "
    "swa_v_head_dim mamba_d_head mamba_head_dim mamba_headdim mamba_d_state state_size ssm_state_size kv_lora_rank "
    "o_lora_rank hidden_size_per_layer_input query_pre_attn_scalar rel_extent"
)
_INNER = (
    "intermediate_size ffn_dim ffn_hidden_size d_inner dff dim_ff feed_forward_size decoder_ffn_dim encoder_ffn_dim "
    "dense_intermediate_size intermediate_size_mlp"
)
_EXPERT_SIZES = (
    "moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size shared_intermediate_size "
    "moe_shared_expert_intermediate_size expert_ffn_hidden_size router_hidden_size"
)
_EIGHT = (
    "qk_rope_head_dim rotary_dim adapter_rank laurel_rank gated_norm_rank hc_lowrank d_rel mamba_n_heads "
    "mamba_num_heads mamba_chunk_size chunk_size block_size num_experts n_routed_experts num_local_experts "
    "moe_num_experts index_topk"
)
_WINDOWS = (
    "sliding_window window_size attention_window_size sliding_window_size local_attention keep_window_size "
    "attention_chunk_size"
)
_TWO = (
    "num_experts_per_tok num_experts_per_token moe_topk moe_k top_k_experts n_group num_expert_group zero_expert_num "
    "n_mamba_heads expand o_groups index_topk_blocks"
)
_ONE = "topk_group n_shared_experts num_shared_experts moe_num_shared_experts n_groups mamba_n_groups mamba_ngroups"
_POSITIONS = "max_position_embeddings n_positions n_ctx max_seq_len context_length max_target_positions"
#: Small values of settings, by the words the configurations use.
_SMALL: dict[str, int] = {
    name: value
    for names, value in (
        ("vocab_size vocab_size_per_layer_input", VOCABULARY),
        (_HIDDEN, 64),
        (_HEADS, 4),
        (_KEY_HEADS, 2),
        (_HEAD_SIZES, 16),
        (_INNER, 96),
        (_EXPERT_SIZES, 32),
        (_POSITIONS, 64),
        (_EIGHT, 8),
        (_WINDOWS, WINDOW),
        ("q_lora_rank qk_head_dim", 24),
        ("time_step_rank mamba_dt_rank index_block_size", 4),
        (_TWO, 2),
        (_ONE, 1),
        ("mamba_d_ssm", 128),
    )
    for name in names.split()
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_MIXED = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
#: Settings that default configurations lack, or what has to go together in a small model.
_SPECIAL: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {
        "layer_types": _MIXED,
        "rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE},
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "first_k_dense_replace": 1},
    "dots1": {
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "layer_types": _MIXED,
    },
    "dots3_note_text": {
        "layer_types": ["indexed_attention", "indexed_attention", "sliding_attention", "sliding_attention"],
        "mlp_layer_types": ["dense", "sparse", "dense", "sparse"],
        "head_dim": 32,
        "per_layer_config": {
            number: {"num_attention_heads": 2, "num_key_value_heads": 2, "qk_nope_head_dim": 24} for number in "23"
        },
    },
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8},
    "gemma4_assistant": {
        "text_config": {"model_type": "gemma4_text", "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
    },
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "phi4_multimodal": {
        "vision_config": {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
        "audio_config": {"hidden_size": 32, "intermediate_size": 32, "num_blocks": 1, "num_attention_heads": 2},
    },
    "qwen4_exp_text": {
        "eos_token_id": 2,
        "ple_layer_ids": [1],
        "ple_embed_dim": 64,
        "heads_per_ngram": 2,
        "ngram_vocab_size_base": 100,
        "make_ngram_vocab_size_divisible_by": 8,
        "split_ngram_parts": 2,
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "reformer": {"axial_pos_embds_dim": [32, 32], "axial_pos_shape": [8, 8]},
    "xlstm": {"num_blocks": 4},
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(model_type: str) -> dict[str, Any]:
    """Return a config.json of a tiny model: the default of its class with few layers, one of every kind, and small
    widths.

    Of models of several (multimodal ones) little more than the model_type.
    """
    special = _SPECIAL.get(model_type, {})
    try:
        default = cast("Any", CONFIG_MAPPING[model_type])()
        if default.get_text_config() is not default:
            return {"model_type": model_type, **special}
    except Exception:  # noqa: BLE001  it needs settings, or names several text models: whoever builds it is told
        return {"model_type": model_type, **special}
    config: dict[str, Any] = json.loads(default.to_json_string(use_diff=False))
    for key in ("architectures", "transformers_version", "dtype"):
        config.pop(key, None)
    config = _few_layers(config)
    config |= {k: _SMALL[k] for k, v in config.items() if k in _SMALL and type(v) is int}
    numbers = {"pad": 0, "bos": 1, "eos": 2}
    config |= {k: numbers.get(k[:3], 3) for k, v in config.items() if k.endswith("_token_id") and type(v) is int}
    if "qk_nope_head_dim" in config:  # latent attention: as many key heads as query heads, which it turns in part
        config["num_key_value_heads"] = config["num_attention_heads"]
        if default.head_dim == default.qk_rope_head_dim:
            config["head_dim"] = config["qk_rope_head_dim"]
    if config.get("is_encoder_decoder"):
        config["is_encoder_decoder"] = False
    return {**config, "is_decoder": True, "dtype": "float32", **special}


def _few_layers(config: dict[str, Any]) -> dict[str, Any]:
    """Keep one layer of every kind that the configuration tells apart, and at least a few."""
    kinds = layer_kinds(config)
    kept = {index for index, kind in enumerate(kinds) if kind not in kinds[:index]}
    for index in range(len(kinds)):
        if len(kept) < _FEWEST_LAYERS:
            kept.add(index)
    return pruned(config, [index for index in range(len(kinds)) if index not in kept])
