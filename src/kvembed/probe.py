"""Probe: one short forward that finds a decoder's layers and which of them have attention; refused by name if unfit."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections import defaultdict
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .attention_interface import attending, stock_attention, unfit
from .errors import UnsupportedModel
from .hooks import in_this_thread, read_output
from .longrope import alone

__all__ = ["Probed", "decoder_of", "has_adapter", "input_device", "probe", "refuse", "vocabulary"]


@dataclasses.dataclass(frozen=True)
class Probed:
    """What a probe found.

    Attributes:
        decoder: the part that turns token ids into states (no head).
        layers: its decoder layers, bottom first.
        layer_calls: attention module -> the layers from which it is called, in order.
        attention_layers: indices of layers with attention.
        dim: width of a state.
        inner_shapes: shapes of a layer's output for one token, (1, dim) in nearly all models.
    """

    decoder: PreTrainedModel
    layers: list[nn.Module]
    layer_calls: dict[nn.Module, tuple[int, ...]]
    attention_layers: tuple[int, ...]
    dim: int
    inner_shapes: set[tuple[int, ...]]


def probe(model: PreTrainedModel) -> Probed:
    """One short forward with an attention function that only looks: which module is called where, and how.

    Raises:
        UnsupportedModel: with the model's type and the reason.
    """
    config = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder:
        raise UnsupportedModel(f"{config.model_type} is an encoder-decoder; kvembed takes decoder-only language models")
    adapter = getattr(model, "active_peft_config", None)
    if getattr(adapter, "is_prompt_learning", False):
        raise UnsupportedModel(f"{config.model_type} has a prompt-tuning adapter, whose virtual tokens would be lost")
    if getattr(adapter, "alora_invocation_tokens", None):
        raise UnsupportedModel(f"{config.model_type} has an activated LoRA, which acts in peft's own forward alone")
    decoder = decoder_of(model)
    calls: dict[nn.Module, list[tuple[str, int]]] = defaultdict(list)
    place = [("", -1)]  # the stack of layers, and the layer in it, that the forward is in

    def look(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        if reason := unfit(module, query, key, kwargs):
            refuse(model, reason)
        calls[module].append(place[0])
        return stock_attention(module, query, key, value, attention_mask, **kwargs)

    lists = {name: module for name, module in decoder.named_modules() if isinstance(module, nn.ModuleList)}
    stacks = {name: part for name, part in lists.items() if not any(name.startswith(f"{other}.") for other in lists)}
    with contextlib.ExitStack() as stack:
        outputs: dict[str, list[Any]] = defaultdict(list)  # of every layer
        for name, layers in stacks.items():
            for index, layer in enumerate(layers):
                enter = in_this_thread(functools.partial(_set, place, (name, index)))
                stack.callback(layer.register_forward_pre_hook(enter).remove)
                reader = in_this_thread(functools.partial(read_output, outputs[name].append))
                stack.callback(layer.register_forward_hook(reader).remove)
        stack.enter_context(attending(decoder, look))
        stack.enter_context(alone(decoder))
        stack.enter_context(torch.inference_mode())
        ids = (torch.arange(16, device=input_device(decoder))[None] + 1) % vocabulary(model)
        failure: Exception | None = None
        try:
            output = decoder(input_ids=ids, use_cache=False)
        except UnsupportedModel:
            raise
        except Exception as error:
            failure = error
    if failure and (calls or not _runs(decoder, ids)):
        refuse(model, f"a plain forward of its decoder fails ({failure})")
    if not calls:
        names = [type(module).__name__.lower() for module in decoder.modules()]
        refuse(
            model,
            "its attention does not go through transformers' attention interface"
            if any("attention" in name or name.endswith("attn") for name in names) and config.model_type != "rwkv"
            else "it has no attention",
        )
    used = {name for places in calls.values() for name, _ in places}
    if "" in used:
        refuse(model, "its attention is called outside its decoder layers")
    # Nearly always one stack; a model with several (hrm_text) has its layers numbered through.
    first: dict[str, int] = {}
    numbered: list[nn.Module] = []
    for name in stacks:
        if name in used:
            first[name] = len(numbered)
            numbered += stacks[name]
    layer_calls = {module: tuple(first[name] + index for name, index in places) for module, places in calls.items()}
    inner = [states for name in first for states in outputs[name]]
    return Probed(
        decoder=decoder,
        layers=numbered,
        layer_calls=layer_calls,
        attention_layers=tuple(sorted({index for places in layer_calls.values() for index in places})),
        dim=int(output[0].shape[-1]),
        inner_shapes={(*states.shape[:-2], states.shape[-1]) for states in inner if torch.is_tensor(states)},
    )


@torch.inference_mode()
def _runs(decoder: PreTrainedModel, ids: Tensor) -> bool:
    """Whether the decoder runs when nobody looks: it may be our masks that an attention of its own can't take."""
    try:
        with alone(decoder):
            decoder(input_ids=ids, use_cache=False)
    except Exception:
        return False
    return True


def refuse(model: PreTrainedModel, reason: str) -> NoReturn:
    """Raises `UnsupportedModel` that names the model."""
    kind = model.config.get_text_config(decoder=True).model_type
    raise UnsupportedModel(f"{kind} ({type(model).__name__}) can't be re-routed: {reason}")


def has_adapter(module: nn.Module | None) -> bool:
    """Whether a module is a layer of peft's around the model's own; models have a method of that name."""
    return isinstance(getattr(module, "disable_adapters", None), bool)


def vocabulary(model: PreTrainedModel) -> int:
    """How many tokens a model knows; where its configuration does not say, more than any has."""
    return int(getattr(model.config.get_text_config(decoder=True), "vocab_size", 0)) or 2**31


def input_device(decoder: PreTrainedModel) -> torch.device:
    """Where token ids go."""
    first: Tensor = next(decoder.parameters())  # the embeddings, in a model spread over devices
    if first.is_meta:  # offloaded: accelerate's hook brings it where it is needed
        hook = getattr(decoder.get_input_embeddings(), "_hf_hook", None)
        place = getattr(hook, "execution_device", None)
        return first.device if place is None else torch.device(place)
    return first.device


def _set(cell: list[Any], value: Any, *_: Any) -> None:
    cell[0] = value


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The transformers model below all wrappers and heads that turns token ids into states."""
    decoder: Any = model
    for _ in range(4):  # wrappers within wrappers, as in multimodal models
        inner = decoder.get_decoder()
        if not isinstance(inner, PreTrainedModel):  # a head that happens to be called "decoder"
            inner = decoder.base_model
        if inner is decoder and decoder.get_output_embeddings() is not None:  # a head above an unusually named model
            inner = next((part for part in decoder.children() if isinstance(part, PreTrainedModel)), decoder)
        if inner is decoder:
            break
        decoder = inner
    return cast(PreTrainedModel, decoder)
