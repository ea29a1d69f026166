"""Every causal language model type of transformers, built tiny and random, and what must hold for one to "work".

`build` needs no download: a default configuration is shrunk by general rules and a few entries of data per family.
`verify` holds kvembed's forward against an independent attention function, written from the definition in float64.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
from collections.abc import Iterator
from math import inf, isnan
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from kvembed.attention_interface import attending, stock_attention
from kvembed.backbone import Backbone
from kvembed.config import EmbedConfig
from kvembed.prefix import Prefix
from kvembed.reroute import Reroute

FAMILIES = tuple(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

# --- tiny configurations ----------------------------------------------------------------------------------------------

_SMALL: dict[str, Any] = {
    name: value
    for value, names in {
        64: "hidden_size n_embd d_model dim embedding_size emb_dim text_hidden_size",
        96: "intermediate_size ffn_dim n_inner ffn_hidden_size dense_intermediate_size",
        32: "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size encoder_ffn_dim",
        4: "num_hidden_layers n_layer n_layers num_layers decoder_layers num_attention_heads n_head n_heads num_heads "
        "attention_heads decoder_attention_heads num_experts num_local_experts n_routed_experts moe_num_experts "
        "swa_num_attention_heads",
        2: "num_key_value_heads num_experts_per_tok moe_k n_group topk_group encoder_layers eos_token_id "
        "swa_num_key_value_heads",
        16: "head_dim index_head_dim ssm_state_size linear_head_dim swa_head_dim local_attention",
        8: "sliding_window sliding_window_size attention_chunk_size",  # shorter than the texts, so that it shows
        512: "max_position_embeddings n_positions",
        128: "vocab_size",
        0: "pad_token_id",
        1: "bos_token_id",
    }.items()
    for name in names.split()
} | {"use_sliding_window": True}
# Latent attention (MLA): one key and value head per query head, and Dk = 24 is not Dv = 16.
_LATENT = {"num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 24, "head_dim": 8}
_LATENT |= {"qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}

_MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_chunk_size": 8}
_INDEXER = {"index_topk": 4, "index_n_heads": 2}
_HASHED = {"vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 16}
_GEMMA3N = {**_HASHED, "laurel_rank": 8, "num_hidden_layers": 6, "num_kv_shared_layers": 2}
_GEMMA3N |= {"layer_types": ["sliding_attention", "full_attention"] * 3}
_GEMMA4 = {**_HASHED, "global_head_dim": 32}
_DOTS3 = {**_INDEXER, **{f"swa_{name}": value for name, value in _LATENT.items() if name != "qk_rope_head_dim"}}
_DOTS3 |= {"swa_num_attention_heads": 4, "swa_head_dim": 24, "head_dim": 24, "shared_experts_intermediate_size": 32}
_QWEN4 = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 4}
_QWEN4 |= {"indexer_compress_ratio": 2, "hc_lowrank": 8}
_PATCHES = {"hidden_size_global": 64}
_ROPE = {"rope_type": "default", "rope_theta": 1e4}

# What the general rules can't guess. Hybrids get two attention layers, sparse models their sparsity.
_OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {**_MAMBA2, "attn_layer_indices": [1, 3]},
    "blt": {"encoder_config": _PATCHES, "decoder_config": _PATCHES, "encoder_hash_byte_group_vocab": 100},
    "codegen": {"rotary_dim": 8},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {"sliding_attention": _ROPE, "full_attention": None},
    },
    "cpmant": {"dim_head": 16, "dim_ff": 96, "prompt_types": 4, "prompt_length": 4},
    "dbrx": {
        "attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v32": _INDEXER,
    "deepseek_v4": {"q_lora_rank": 24, "index_n_heads": 2, "o_lora_rank": 16, "num_key_value_heads": 1},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1},
    "dots3_note": _DOTS3,
    "dots3_note_text": _DOTS3,
    "falcon_h1": {**_MAMBA2, "mamba_d_ssm": 128},
    "gemma3n_text": _GEMMA3N,
    "gemma4": {"text_config": _GEMMA4},
    "gemma4_text": _GEMMA4,
    "glm_moe_dsa": _INDEXER,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {**_MAMBA2, "layer_types": ["linear_attention", "full_attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 4, "head_dim": 32, "n_groups": 1},
    "minimax_m3_vl_text": {**_INDEXER, "layer_types": ["full_attention", "minimax_m3_sparse"] * 2},
    "musicgen": {"num_codebooks": 1},
    "musicgen_melody": {"num_codebooks": 1},
    "nemotron_h": {"layer_types": ["full_attention", "linear_attention", "full_attention", "mlp", "moe"]},
    "qwen4_exp": _QWEN4,
    "qwen4_exp_text": _QWEN4,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "attention_window_size": 8},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": (32, 32), "axial_pos_shape": (16, 32)},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "attention_head_dim": 32},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1, "layer_types": ["hybrid_sliding", "hybrid"] * 2},
}
# The vision tower of gemma3n needs the timm package, which has nothing to do with re-routing: its text model stands in.
STAND_INS = {"gemma3n": "gemma3n_text"}


def build(model_type: str) -> PreTrainedModel:
    """A tiny random model of the type, in float32 and eval mode, that runs; always the same weights."""
    known_as = STAND_INS.get(model_type, model_type)
    model_class = getattr(transformers, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[known_as])
    config_class = CONFIG_MAPPING[known_as]
    if model_class.config_class in config_class.sub_configs.values():  # a language model that is part of a larger one
        config_class = model_class.config_class
    config = _shrunk(config_class, copy.deepcopy(_OVERRIDES.get(known_as, {})))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(config).float().eval()
        _stir(model)
    with torch.inference_mode():  # a refusal should be the model's doing, not that of a configuration that can't run
        assert model(input_ids=torch.arange(16)[None] + 1, use_cache=False)[0].isfinite().all()
    return model


def _shrunk(config_class: Any, overrides: dict[str, Any]) -> Any:
    default = config_class(**{name: dict(value) for name, value in overrides.items() if isinstance(value, dict)})
    fields = {field.name for field in dataclasses.fields(config_class)}
    small = _SMALL | (_LATENT if "kv_lora_rank" in fields else {})
    small = {name: value for name, value in small.items() if name in fields}
    if "layer_types" in fields and (types := getattr(default, "layer_types", None)):
        kinds = list(dict.fromkeys(types))
        if kinds == ["full_attention"] and "sliding_window" in fields:
            kinds = ["sliding_attention", "full_attention"]
        small["layer_types"] = [kinds[layer % len(kinds)] for layer in range(4)]  # every kind, in few layers
    for name in config_class.sub_configs:
        if (part := getattr(default, name, None)) is not None:
            small[name] = _shrunk(type(part), overrides.pop(name, {}))
    return config_class(**{**small, **overrides})


@torch.no_grad()
def _stir(model: nn.Module) -> None:
    """New weights are small (attention nearly uniform), biases and sinks are zero: errors would not show."""
    for name, weight in model.named_parameters():
        if weight.ndim >= 2:
            gain = 2.0 if any(part in name for part in ("q_", "k_", "query", "key", "qkv", "c_attn")) else 1.0
            weight.normal_(0, gain * weight.shape[-1] ** -0.5)
        else:
            weight.add_(torch.randn_like(weight), alpha=0.2)


# --- the check --------------------------------------------------------------------------------------------------------

LENGTHS = (13, 1, 29, 5)
TOLERANCE = 1e-4  # of the largest state; float32 against float64 through four layers
# Their attention modules don't say which layer they are in, or count otherwise: all their attention is re-routed.
_ALL_LAYERS = ("hrm_text", "longcat_flash", "zamba", "zamba2")


@torch.inference_mode()
def verify(model: PreTrainedModel) -> None:
    """Raises AssertionError, saying what is wrong, unless kvembed does with this model exactly what it says.

    Raises kvembed's UnsupportedModel if it refuses the model.
    """
    backbone = Backbone(model)
    decoder = backbone.decoder
    before = _implementations(decoder)
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(3, 128, (length,), generator=generator) for length in LENGTHS]
    layers = {backbone.attention_layers[0], backbone.attention_layers[-1]}
    if backbone.model_type in _ALL_LAYERS:
        layers = set(backbone.attention_layers)

    # The un-routed model: through kvembed's door, through its own eager attention, in a padded batch.
    plain = _each(decoder, texts)
    with attending(decoder, stock_attention):
        _same(_each(decoder, texts), plain, "un-routed, it is not the stock model")
    with _implementation(decoder, "eager"):
        _same(_each(decoder, texts), plain, "its eager attention differs from its default one")
    _same(_batch(backbone, texts), plain, "right padding changes its states")

    # The re-routed model, in a padded batch, against the definition, text by text.
    routed = _batch(backbone, texts, layers=tuple(layers))
    with _definition(decoder, None if backbone.model_type in _ALL_LAYERS else layers):
        _same(routed, _each(decoder, texts), f"re-routed in layers {sorted(layers)}, it is not as defined")
    effect = _differ(routed, plain)
    assert effect > 100 * TOLERANCE, f"re-routing has no effect ({effect:.1e})"
    _same(_batch(backbone, texts, layers=tuple(layers), bias=-1e9), plain, "a slot nobody sees changes its states")

    # After a beginning that is computed once, if it can be.
    assert backbone.can_share or not backbone.can_pack, "it can be packed, but takes no common beginning"
    if backbone.can_share:
        begun = _each(decoder, [torch.cat([texts[0], text]) for text in texts])
        shared = _batch(backbone, texts, backbone.prefix(texts[0].tolist()))
        _same(shared, [row[len(texts[0]) :] for row in begun], "after a common beginning, its states are others")

    # Padding on the left, if the stock model can take it.
    if _differ(_left_padded(decoder, texts), plain) <= TOLERANCE:
        last = torch.full((len(texts),), max(LENGTHS) - 1)
        with attending(decoder, Reroute(frozenset(layers), backbone.layer_calls, last)):
            _same(_left_padded(decoder, texts), routed, "re-routed, left padding is not right padding")
    assert _implementations(decoder) == before, "its attention implementation was not put back"


def _each(decoder: nn.Module, texts: list[Tensor]) -> list[Tensor]:
    return [decoder(input_ids=text[None], use_cache=False).last_hidden_state[0] for text in texts]


def _batch(backbone: Backbone, texts: list[Tensor], prefix: Prefix | None = None, **settings: Any) -> list[Tensor]:
    ids, lengths = backbone.pad([text.tolist() for text in texts])
    states = backbone.states(ids, lengths, EmbedConfig(**settings), prefix=prefix)
    return [row[:length] for row, length in zip(states, lengths, strict=True)]


def _left_padded(decoder: nn.Module, texts: list[Tensor]) -> list[Tensor]:
    pad = [max(LENGTHS) - length for length in LENGTHS]
    ids = torch.stack([nn.functional.pad(text, (count, 0)) for text, count in zip(texts, pad, strict=True)])
    mask = (torch.arange(ids.shape[1]) >= torch.tensor(pad)[:, None]).long()
    accepts = inspect.signature(decoder.forward).parameters
    positions = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if "position_ids" in accepts else {}
    states = decoder(input_ids=ids, attention_mask=mask, use_cache=False, **positions).last_hidden_state
    return [row[count:] for row, count in zip(states, pad, strict=True)]


def _differ(ours: list[Tensor], theirs: list[Tensor]) -> float:
    worst = [float((mine - other).abs().max() / other.abs().max()) for mine, other in zip(ours, theirs, strict=True)]
    return max(inf if isnan(difference) else difference for difference in worst)


def _same(ours: list[Tensor], theirs: list[Tensor], claim: str) -> None:
    difference = _differ(ours, theirs)
    assert difference <= TOLERANCE, f"{claim}: off by {difference:.1e}"


def _configs(decoder: nn.Module) -> list[Any]:
    held = (getattr(module, "config", None) for module in decoder.modules())
    return list({id(config): config for config in held if hasattr(config, "_attn_implementation")}.values())


def _implementations(decoder: nn.Module) -> list[Any]:
    return [config._attn_implementation for config in _configs(decoder)]


@contextlib.contextmanager
def _implementation(decoder: nn.Module, name: str) -> Iterator[None]:
    before = _implementations(decoder)
    for config in _configs(decoder):
        config._attn_implementation = {"": name}  # this configuration alone, not its parts
    try:
        yield
    finally:
        for config, own in zip(_configs(decoder), before, strict=True):
            config._attn_implementation = {"": own}


# --- the definition ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _definition(decoder: nn.Module, layers: set[int] | None) -> Iterator[None]:
    """While open, attention is computed as defined, re-routed in `layers` (None: everywhere) with bias 1."""

    def attention(module, query, key, value, attention_mask, **kwargs):
        routed = layers is None or module.layer_idx in layers
        return _defined(query, key, value, attention_mask, 1.0 if routed else None, **kwargs), None

    AttentionInterface.register("definition", attention)
    AttentionMaskInterface.register("definition", eager_mask)
    with _implementation(decoder, "definition"):
        yield


def _defined(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, bias: float | None, scaling: float, **kwargs: Any
) -> Tensor:
    """Attention of one unpadded text, explicitly, in float64; with a slot in front if there is a bias.

    Shapes as in `kvembed.attention`; returns (1,n,Hq,Dv).
    """
    dtype, (_, heads, n, _) = query.dtype, query.shape
    query, key, value, mask = (tensor.double() for tensor in (query, key, value, mask))
    key, value = (tensor.repeat_interleave(heads // tensor.shape[1], 1) for tensor in (key, value))
    given = {name: argument for name, argument in kwargs.items() if argument is not None}
    mask = mask + given.get("position_bias", torch.zeros(1, heads, n, n))
    if bias is not None:
        key, value = (torch.cat([tensor[:, :, -1:], tensor], 2) for tensor in (key, value))
        mask = nn.functional.pad(mask, (1, 0), value=bias)  # the slot has no place, so no position bias
    logits = torch.einsum("bhid,bhjd->bhij", query, key) * scaling
    if cap := given.get("softcap"):
        logits = cap * torch.tanh(logits / cap)
    logits = logits + mask
    sinks = [given["s_aux"].reshape(1, heads, 1, 1).expand(1, heads, n, 1)] if "s_aux" in given else []
    sinks += [given["sinks"]] if "sinks" in given else []  # one per head and token, where s_aux is one per head
    weights = torch.cat([logits, *sinks], -1).softmax(-1)[..., : logits.shape[-1]]  # a sink has a weight but no value
    return (weights @ value).transpose(1, 2).to(dtype).contiguous()
