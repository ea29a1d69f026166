"""Trials of a model, by forwards of a few tokens: may texts be packed, may they share a beginning, are keys rotated."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .attention import unrotate
from .attention_interface import attending, stock_attention
from .config import EmbedConfig
from .device import is_out_of_memory
from .errors import UnsupportedModel
from .hooks import keeping_rotations
from .longrope import alone
from .packing import pack
from .probe import vocabulary

if TYPE_CHECKING:
    from .backbone import Backbone

__all__ = ["packs_as_padded", "rotary_layers", "shares_prefixes"]

_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}  # of the largest state


@torch.inference_mode()
def packs_as_padded(backbone: Backbone) -> bool:
    """Whether packed texts come out as padded ones do, found out by two short texts in a row.

    Not so for a model that mixes tokens outside its attention (convolution, state space), or has its own positions.
    """
    if "position_ids" not in inspect.signature(backbone.decoder.forward).parameters:
        return False
    if getattr(backbone.model.config.get_text_config(decoder=True), "attn_temperature_tuning", False):
        return False  # llama4 scales queries by their place in the row, in rows longer than a trial's
    texts, lengths = _texts(backbone)
    other = torch.cat([texts[:1].flip(1), texts[1:]])
    config = EmbedConfig()
    try:
        # by definition: it is the model that is tried, not how another kernel rounds
        ours, its = (
            backbone.forward(x, lengths, config, packed=pack(x, lengths), by_definition=True) for x in (texts, other)
        )
    except Exception as error:  # a model's own code may fail in any way
        if is_out_of_memory(error):
            raise  # that says nothing of the model
        return False
    padded = backbone.forward(texts, lengths, config)
    scale = float(padded.abs().max())
    # The first text must not show in the second at all; the rest is rounding.
    leaks = float((ours[1, :5] - its[1, :5]).abs().max())
    apart = max(float((ours[row, :n] - padded[row, :n]).abs().max()) for row, n in enumerate((8, 5)))
    return leaks <= 1e-6 * scale and apart <= _ROUNDING[padded.dtype] * scale


def _texts(backbone: Backbone) -> tuple[Tensor, Tensor]:
    """Two short texts of ordinary tokens, (2,8) and their lengths (2,).

    They are taken from the middle of the vocabulary: special tokens are at its ends, and their states, huge and
    never trained, magnify what is rounded.
    """
    middle = vocabulary(backbone.model) // 2 if vocabulary(backbone.model) < 2**31 else 0
    texts = torch.tensor([[9, 8, 7, 6, 5, 4, 3, 2], [1, 2, 3, 4, 5, 0, 0, 0]], device=backbone.device)
    return (texts + middle) % vocabulary(backbone.model), torch.tensor([8, 5], device=backbone.device)


@torch.inference_mode()
def shares_prefixes(backbone: Backbone) -> bool:
    """Whether texts come out the same after a beginning that is computed once; found out by two short ones.

    Not so where the longest text of a batch decides how positions are rotated, or a model makes its own masks.
    """
    if not backbone.can_pack or backbone.rope_border is not None:
        return False
    texts, lengths = _texts(backbone)
    beginning = texts[0].repeat(2)
    whole = torch.cat([beginning.expand(2, -1), texts], 1)
    config = EmbedConfig()
    try:
        prefix = backbone.prefix(beginning.tolist())
        packed = pack(texts, lengths)
        ours = backbone.forward(texts, lengths, config, packed=packed, prefix=prefix, by_definition=True)
    except Exception as error:  # as above
        if is_out_of_memory(error):
            raise
        return False
    padded = backbone.forward(whole, lengths + 16, config)[:, 16:]
    alone = backbone.forward(texts, lengths, config)
    real = (torch.arange(8, device=backbone.device) < lengths[:, None]).to(padded.device)
    apart, effect = ((states - padded)[real].float() for states in (ours, alone))
    # A wrong beginning could hide below the rounding of the largest state: so the error must also be small against
    # what the beginning does to the states.
    near = float(apart.abs().max()) <= _ROUNDING[padded.dtype] * float(padded.abs().max())
    return near and float(apart.norm()) <= 0.3 * float(effect.norm())


def rotary_layers(backbone: Backbone) -> tuple[set[int], set[int]]:
    """Layers that rotate their keys, and those of them where turning a key back does not give that of position 0.

    In a text of one token repeated, a layer's states are the same at all positions, and so are its keys but for
    their rotation. So all keys turned back must be the first one.
    """
    rotary: set[int] = set()
    unsure: set[int] = set()
    rotations: dict[Any, tuple[Tensor, Tensor]] = {}
    calls = {module: iter(places) for module, places in backbone.layer_calls.items()}

    def look(module: nn.Module, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        layer = next(calls[module])
        first, most = key[:, :, :1], key.abs().amax((0, 1, 2)).float()  # (Dk,) the largest of each coordinate
        typical = float(key.abs().float().median())
        if typical == 0:
            unsure.add(layer)
        elif _moved(key, first, typical, most):
            rotary.add(layer)
            try:
                positions = torch.arange(key.shape[2], device=key.device)[:, None]
                back = [unrotate(module, layer, key[:, :, int(at)], rotations, at) for at in positions]
            except UnsupportedModel:
                unsure.add(layer)
            else:
                # A coordinate is as exact as the largest of those that it may have been rotated with.
                partners = (most, most.roll(len(most) // 2), most.roll(1), most.roll(-1))
                if _moved(torch.stack(back, 2), first, typical, torch.stack(partners).amax(0)):
                    unsure.add(layer)
        return stock_attention(module, query, key, *args, **kwargs)

    ids = torch.full((1, 16), 16 % vocabulary(backbone.model), device=backbone.device)
    decoder = backbone.decoder
    with torch.inference_mode(), keeping_rotations(decoder, rotations), attending(decoder, look), alone(decoder):
        decoder(input_ids=ids, use_cache=False)
    return rotary, unsure


def _moved(keys: Tensor, first: Tensor, typical: float, most: Tensor) -> bool:
    """Whether keys (1,H,n,Dk) are others than the first one, by more than is rounded.

    By coordinate: a bias may make a few of them hundreds of times as large as rotation moves the others.
    """
    rounding = 16 * torch.finfo(keys.dtype).eps * most
    return bool(((keys - first).abs().float() > 0.05 * typical + rounding).any())
