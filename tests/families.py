"""Every causal language model type of transformers, built tiny and random, and what must hold for one to "work".

`build` needs no download: a default configuration is shrunk by general rules and a few entries of data per family.
`verify` holds kvembed's forward against an independent attention function, written from the definition in float64.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
from math import inf, isnan
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from kvembed.attention import Reroute, attending, stock_attention
from kvembed.backbone import Backbone
from kvembed.config import EmbedConfig

FAMILIES = tuple(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

# Encoders with a causal head, and decoders that are half of an encoder-decoder: not what kvembed is for.
ENCODERS = tuple(
    name
    for name in FAMILIES
    if name in {"bert-generation", "git", "musicgen", "musicgen_melody", "trocr", "xlnet"}
    or (
        name in {*modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, *modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES}
        and name not in {"moss_transcribe_diarize", "reformer"}
    )
)

# --- tiny configurations ------------------------------------------------------------------------------------------------

_SMALL: dict[str, Any] = {
    name: value
    for value, names in {
        64: "hidden_size n_embd d_model dim embedding_size emb_dim text_hidden_size",
        96: "intermediate_size ffn_dim n_inner ffn_hidden_size dense_intermediate_size",
        32: "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size encoder_ffn_dim",
        4: "num_hidden_layers n_layer n_layers num_layers decoder_layers num_attention_heads n_head n_heads num_heads "
        "attention_heads decoder_attention_heads num_experts num_local_experts n_routed_experts moe_num_experts",
        2: "num_key_value_heads num_experts_per_tok moe_k n_group topk_group encoder_layers eos_token_id",
        16: "head_dim index_head_dim ssm_state_size linear_head_dim",
        8: "sliding_window attention_chunk_size",  # shorter than the texts, so that it shows
        512: "max_position_embeddings n_positions",
        128: "vocab_size",
        0: "pad_token_id",
        1: "bos_token_id",
    }.items()
    for name in names.split()
}
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
_BYTES = {"vocab_size": 260, "hidden_size_global": 64}
_ROPE = {"rope_type": "default", "rope_theta": 1e4}

# What the general rules can't guess. Hybrids get two attention layers, sparse models their sparsity.
_OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {**_MAMBA2, "attn_layer_indices": [1, 3]},
    "blt": {
        **{"encoder_config": _BYTES, "decoder_config": _BYTES, "patcher_config": {"vocab_size": 260}},
        **{"encoder_hash_byte_group_vocab": 100, "local_attention_window_len": 8},
    },
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {"sliding_attention": _ROPE, "full_attention": None},
    },
    "cpmant": {"dim_head": 16, "dim_ff": 96, "prompt_types": 2, "prompt_length": 4},
    "dbrx": {
        "attn_config": {"rope_theta": 1e4, "kv_n_heads": 2},
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v32": _INDEXER,
    "deepseek_v4": {"q_lora_rank": 24, "index_n_heads": 2, "o_lora_rank": 16, "num_key_value_heads": 1},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1},
    "dots3_note": _DOTS3,
    "dots3_note_text": _DOTS3,
    "falcon_h1": {**_MAMBA2, "mamba_d_ssm": 128},
    "gemma3n": _GEMMA3N,
    "gemma3n_text": _GEMMA3N,
    "gemma4": {"text_config": _GEMMA4},
    "gemma4_text": _GEMMA4,
    "glm_moe_dsa": _INDEXER,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {**_MAMBA2, "layer_types": ["linear_attention", "full_attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 4, "head_dim": 32},
    "minimax_m3_vl_text": {**_INDEXER, "layer_types": ["full_attention", "minimax_m3_sparse"] * 2},
    "nemotron_h": {"layer_types": ["full_attention", "linear_attention", "full_attention", "mlp", "moe"]},
    "qwen4_exp": _QWEN4,
    "qwen4_exp_text": _QWEN4,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "attention_window_size": 8},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": (32, 32), "axial_pos_shape": (16, 32)},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "attention_head_dim": 32},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}
# The vision tower of gemma3n needs the timm package, which has nothing to do with re-routing: its text model stands in.
STAND_INS = {"gemma3n": "gemma3n_text"}


def build(model_type: str) -> PreTrainedModel:
    """A tiny random model of the type, in float32 and eval mode; always the same weights."""
    known_as = STAND_INS.get(model_type, model_type)
    model_class = getattr(transformers, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[known_as])
    config_class = CONFIG_MAPPING[known_as]
    if model_class.config_class in config_class.sub_configs.values():  # a language model that is part of a larger one
        config_class = model_class.config_class
    config = _shrunk(config_class, copy.deepcopy(_OVERRIDES.get(model_type, {})))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(config).float().eval()
        _stir(model)
    return model


def _shrunk(config_class: Any, overrides: dict[str, Any]) -> Any:
    default = config_class(**{name: dict(value) for name, value in overrides.items() if isinstance(value, dict)})
    fields = {field.name for field in dataclasses.fields(config_class)}
    small = _SMALL | (_LATENT if "kv_lora_rank" in fields else {})
    small = {name: value for name, value in small.items() if name in fields}
    if "layer_types" in fields and (types := getattr(default, "layer_types", None)):
        kinds = list(dict.fromkeys(types))
        small["layer_types"] = [kinds[layer % len(kinds)] for layer in range(4)]  # every kind, in few layers
    for name in config_class.sub_configs:
        if (part := getattr(default, name, None)) is not None:
            small[name] = _shrunk(type(part), overrides.pop(name, {}))
    return config_class(**{**small, **overrides})


@torch.no_grad()
def _stir(model: nn.Module) -> None:
    """Fresh weights are so small that attention is nearly uniform, and biases and sinks are zero: errors would not show."""
    for name, weight in model.named_parameters():
        if weight.ndim >= 2:
            gain = 2.0 if any(part in name for part in ("q_", "k_", "query", "key", "qkv", "c_attn")) else 1.0
            weight.normal_(0, gain * weight.shape[-1] ** -0.5)
        else:
            weight.add_(torch.randn_like(weight), alpha=0.2)


# --- the check -----------------------------------------------------------------------------------------------------------

LENGTHS = (13, 1, 29, 5)
TOLERANCE = 1e-4  # of the largest state; float32 against float64 through four layers
# Their attention modules don't say which layer they are in (or count otherwise), so all attention is re-routed.
_ALL_LAYERS = ("hrm_text", "longcat_flash", "zamba", "zamba2")


@torch.inference_mode()
def verify(model: PreTrainedModel) -> None:
    """Raises AssertionError, saying what is wrong, unless kvembed embeds with this model exactly as defined.

    Raises `kvembed` `UnsupportedModel` if it is refused.
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
    plain = [_forward(decoder, text) for text in texts]
    with attending(decoder, stock_attention):
        _same([_forward(decoder, text) for text in texts], plain, "un-routed, it is not the stock model")
    with _implementation(decoder, "eager"):
        _same([_forward(decoder, text) for text in texts], plain, "its eager attention differs from its default one")
    _same(_batch(backbone, texts, layers=()), plain, "right padding changes its states")

    # The re-routed model against the definition.
    routed = _batch(backbone, texts, layers=tuple(layers))
    with _definition(decoder, layers if backbone.model_type not in _ALL_LAYERS else None):
        _same(routed, [_forward(decoder, text) for text in texts], f"re-routed in {sorted(layers)}, it is not as defined")
    effect = max(_difference(ours, stock) for ours, stock in zip(routed, plain, strict=True))
    assert effect > 100 * TOLERANCE, f"re-routing has no effect ({effect:.1e})"
    _same(_batch(backbone, texts, layers=tuple(layers), bias=-1e9), plain, "a slot nobody sees changes its states")

    # Padding on the left, as far as the stock model can take it.
    if _differ(_left_padded(decoder, texts), plain) <= TOLERANCE:
        last = torch.full((len(texts),), max(LENGTHS) - 1)
        with attending(decoder, Reroute(frozenset(layers), backbone.layer_calls, last)):
            _same(_left_padded(decoder, texts), routed, "re-routed, left padding is not right padding")
    assert _implementations(decoder) == before, "its attention implementation was not put back"


def _forward(decoder: nn.Module, text: Tensor) -> Tensor:
    return decoder(input_ids=text[None], use_cache=False).last_hidden_state[0]


def _batch(backbone: Backbone, texts: list[Tensor], **settings: Any) -> list[Tensor]:
    ids, lengths = backbone.pad([text.tolist() for text in texts])
    states = backbone.states(ids, lengths, EmbedConfig(**settings))
    return [row[:length] for row, length in zip(states, lengths, strict=True)]


def _left_padded(decoder: nn.Module, texts: list[Tensor]) -> list[Tensor]:
    ids = torch.zeros(len(texts), max(LENGTHS), dtype=torch.long)
    for row, text in zip(ids, texts, strict=True):
        row[-len(text) :] = text
    mask = torch.tensor([[0] * (max(LENGTHS) - length) + [1] * length for length in LENGTHS])
    extra = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    if "position_ids" not in inspect.signature(decoder.forward).parameters:
        extra = {}
    states = decoder(input_ids=ids, attention_mask=mask, use_cache=False, **extra).last_hidden_state
    return [row[-length:] for row, length in zip(states, LENGTHS, strict=True)]


def _difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def _differ(ours: list[Tensor], theirs: list[Tensor]) -> float:
    differences = [_difference(mine, other) for mine, other in zip(ours, theirs, strict=True)]
    return max(inf if isnan(difference) else difference for difference in differences)


def _same(ours: list[Tensor], theirs: list[Tensor], claim: str) -> None:
    worst = _differ(ours, theirs)
    assert worst <= TOLERANCE, f"{claim}: off by {worst:.1e}"


def _configs(decoder: nn.Module) -> list[Any]:
    held = (getattr(module, "config", None) for module in decoder.modules())
    return list({id(config): config for config in held if hasattr(config, "_attn_implementation")}.values())


def _implementations(decoder: nn.Module) -> list[Any]:
    return [config._attn_implementation for config in _configs(decoder)]


@contextlib.contextmanager
def _implementation(decoder: nn.Module, name: str) -> Any:
    before = _implementations(decoder)
    for config in _configs(decoder):
        config._attn_implementation = {"": name}  # this config alone, not its parts
    try:
        yield
    finally:
        for config, own in zip(_configs(decoder), before, strict=True):
            config._attn_implementation = {"": own}


# --- the definition ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _definition(decoder: nn.Module, layers: set[int] | None) -> Any:
    """While open, attention is computed as defined, re-routed in `layers` (None: everywhere) with bias 1."""

    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **kwargs: Any) -> Any:
        routed = layers is None or module.layer_idx in layers
        return defined(query, key, value, attention_mask, 1.0 if routed else None, **kwargs), None

    AttentionInterface.register("definition", attention)
    AttentionMaskInterface.register("definition", eager_mask)
    with _implementation(decoder, "definition"):
        yield


def defined(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    bias: float | None,
    scaling: float,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """Attention of one unpadded text, explicitly, in float64; with a slot at the front if there is a bias.

    Shapes as in `kvembed.attention`; returns (1,n,Hq,Dv).
    """
    dtype, (_batch, heads, n, _size) = query.dtype, query.shape
    query, key, value = query.double(), key.double(), value.double()
    groups = heads // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    mask = mask.double().expand(1, heads, n, n)
    if position_bias is not None:
        mask = mask + position_bias.double()
    if bias is not None:
        key, value = torch.cat([key[:, :, -1:], key], 2), torch.cat([value[:, :, -1:], value], 2)
        mask = torch.cat([torch.full((1, heads, n, 1), bias, dtype=torch.float64), mask], 3)
    logits = torch.einsum("bhid,bhjd->bhij", query, key) * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    weights = (logits + mask).exp()
    total = weights.sum(-1, keepdim=True)
    if s_aux is not None:  # more weight in the sum, with no value: one per head
        total = total + s_aux.double().exp()[:, None, None]
    if sinks is not None:  # or one per head and token, (1,Hq,n,1)
        total = total + sinks.double().exp()
    return (weights / total @ value).transpose(1, 2).to(dtype).contiguous()
