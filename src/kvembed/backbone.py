"""Backbone: a frozen decoder as the rest of kvembed sees it. Probed by one short forward; refused by name if unfit."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from . import flash
from .attention_interface import attending, stock_attention, unfit
from .config import EmbedConfig
from .errors import InputError, UnsupportedModel
from .hooks import in_this_thread, keeping_rotations, read_output
from .longrope import alone, rope_border
from .packing import Packed, pack
from .prefix import Prefix
from .probe import has_adapter, input_device, probe, refuse
from .reroute import Reroute
from .static import StaticVectors
from .tiles import prefers_tiles
from .trials import packs_as_padded, rotary_layers, shares_prefixes

__all__ = ["Backbone"]

_FULL = 0.97  # share of real tokens in a padded batch from which packing gains nothing
# A CPU multiplies bfloat16 matrices up to a third slower if they have neither few rows nor a multiple of 8 (oneDNN's
# blocks do not fit; docs/experiments.md).
_VECTORS, _MANY = 8, 128


class Backbone:
    """A decoder, its layers, and which of them have an attention that can be re-routed.

    Args:
        model: a transformers model, with or without a language-modelling head; it stays exactly as it is.

    Attributes:
        decoder: the part that turns token ids into states (no head).
        layers: its decoder layers, bottom first.
        attention_layers: indices of those with attention; others (state-space, convolution) can't be re-routed.
        dim: width of a state.
        max_tokens: the longest input by its configuration, or None if that says nothing.
        rerouting: makes what re-routes; controls put a subclass in its place.
        rope_border: texts of more tokens must not share a batch with shorter ones (see `kvembed.longrope`). None: all
            may.

    Raises:
        UnsupportedModel: with the model's type and the reason.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.rerouting: Callable[..., Reroute] = Reroute
        self._static: tuple[Any, StaticVectors] | None = None
        config = model.config.get_text_config(decoder=True)
        self.model_type: str = config.model_type
        self._probed = probe(model)
        self.decoder = self._probed.decoder
        self.layers = self._probed.layers
        self.layer_calls = self._probed.layer_calls
        self.attention_layers = self._probed.attention_layers
        self.dim = self._probed.dim
        names = ("max_position_embeddings", "n_positions", "max_target_positions")
        limit = next(filter(None, (getattr(config, name, None) for name in names)), None)
        self.max_tokens: int | None = limit if isinstance(limit, int) and limit > 0 else None
        self.rope_border = rope_border(self.decoder)

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return input_device(self.decoder)

    @property
    def dtype(self) -> str:
        """The weights' dtype by its name: float32, bfloat16 or float16."""
        return str(self.model.dtype).removeprefix("torch.")

    def check_readable(self) -> None:
        """Raises `UnsupportedModel` if the states between its layers are not one vector of `dim` numbers a token."""
        if odd := self._probed.inner_shapes - {(1, self.dim)}:
            refuse(
                self.model,
                f"its layers give a token {' x '.join(map(str, min(odd)))} numbers, and the top {self.dim}, so that no "
                "layer below the top can be read; re-routing needs layers= then",
            )

    def check_static(self) -> nn.Embedding:
        """The input embeddings. Raises `UnsupportedModel` where they are no table of vectors for `static`."""
        embedding = self.decoder.get_input_embeddings()
        adapted = has_adapter(embedding)
        if adapted or not isinstance(embedding, nn.Embedding) or embedding.embedding_dim != self.dim:
            reason = "its input embeddings are not one table of the width of its states"
            if adapted:
                reason = "an adapter is on its input embeddings; merge_and_unload() first"
            raise UnsupportedModel(f"{self.model_type} can't give static vectors, which auto is made of too: {reason}")
        return embedding

    @property
    @torch.inference_mode()
    def static(self) -> StaticVectors:
        """Vectors of token ids without a forward. Raises `UnsupportedModel` as `check_static` does."""
        embedding = self.check_static()
        weight = embedding.weight
        step = max(1, weight.numel() // 64) | 1  # odd, or else it might fall on one column
        few = [] if weight.is_meta else weight.flatten()[::step].tolist()
        known = self._static
        told = (embedding, weight.device, few)
        if known is None or known[0] != told:  # the model may have been moved, or an adapter merged
            with torch.autocast(self.device.type, enabled=False):  # they are kept
                known = told, StaticVectors(embedding, embedding.num_embeddings, self.device)
            self._static = known
        return known[1]

    def changed_layers(self, config: EmbedConfig) -> tuple[int, ...]:
        """The layers that `config` changes, `"all"` spelled out. Raises `InputError` for one that has no attention."""
        layers = self.attention_layers if isinstance(config.layers, str) else config.layers or ()
        for layer in layers:
            if not 0 <= layer < len(self.layers):
                raise InputError(
                    f"layer {layer} is out of range: {self.model_type} has layers 0 to {len(self.layers) - 1}"
                )
            if layer not in self.attention_layers:
                raise InputError(
                    f"layer {layer} of {self.model_type} has no attention; those with: {_ranges(self.attention_layers)}"
                )
        return layers

    def pad(self, ids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Right-pad: (B,n) int64 ids and (B,) int64 lengths, on the model's device.

        What the padding holds does not matter: causal attention never lets a real token see it.
        """
        lengths = torch.tensor([len(row) for row in ids])
        padded = torch.zeros(len(ids), int(lengths.max()), dtype=torch.long)
        for row, tokens in zip(padded, ids, strict=True):
            row[: len(tokens)] = torch.tensor(tokens)
        return padded.to(self.device), lengths.to(self.device)

    @torch.inference_mode()
    def states(
        self,
        ids: Tensor,
        lengths: Tensor,
        config: EmbedConfig,
        betas: dict[int, Tensor] | None = None,
        placeholders: Tensor | None = None,
        readers: Mapping[int, Callable[[Tensor], None]] | None = None,
        prefix: Prefix | None = None,
    ) -> Tensor:
        """One forward of the decoder: no head, no cache, no stack of hidden states, no layer above the one to read.

        Texts of unlike lengths are packed if the model can take it, so that no padding is computed.

        Args:
            ids: (B,n) int64, right-padded.
            lengths: (B,) int64, real tokens.
            config: what to change (layers, bias, slot, prepend_layers) and where to read (output_layer).
            betas: if given, filled as in `Reroute`.
            placeholders: (B,) int64, position of each text's `{pst}`; needed for `config.prepend_layers`.
            readers: as in `observing`, for other layers' states.
            prefix: a beginning that all texts share, which `ids` then lack; only where `can_share`, for a config that
                changes nothing.

        Returns:
            (B,n,D) in the model's dtype; the padding's rows are meaningless.
        """
        if prefix and (betas is not None or config.layers or config.prepend_layers):
            raise ValueError("texts share a beginning only where nothing is changed")
        packed = None
        if prefix or (betas is None and self._is_worth_packing(lengths, ids.shape[1]) and self.packs):
            packed = pack(ids, lengths, self._multiple(lengths))
        return self.forward(
            ids,
            lengths,
            config,
            betas=betas,
            placeholders=placeholders,
            readers=readers,
            packed=packed,
            prefix=prefix,
        )

    @torch.inference_mode()
    def prefix(self, ids: Sequence[int]) -> Prefix:
        """One forward of a beginning, given as token ids, for `states`."""
        layers: list[tuple[Tensor, Tensor]] = []

        def keep(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
        ) -> tuple[Tensor, Tensor | None]:
            if reason := unfit(module, query, key, kwargs):
                refuse(self.model, reason)
            layers.append((key[0], value[0]))
            return stock_attention(module, query, key, value, attention_mask, **kwargs)

        with torch.autocast(self.device.type, enabled=False), attending(self.decoder, keep), alone(self.decoder):
            self.decoder(input_ids=torch.tensor([ids], device=self.device), use_cache=False)
        return Prefix(len(ids), layers)

    def embedded(self, ids: Sequence[int]) -> Tensor:
        """What goes into the first layer for some tokens, (n,D): the model's own embeddings of them."""
        with torch.inference_mode():
            found: Tensor = self.decoder.get_input_embeddings()(torch.tensor(ids, device=self.device))
        return found

    def _is_worth_packing(self, lengths: Tensor, width: int) -> bool:
        """Where nearly nothing is padded, one attention for all texts is faster than one for each length."""
        if self.rerouting is not Reroute:
            return False
        device, dtype = self.device, self.model.dtype
        # The GPU's kernel is as fast for one length, and no other has to be prepared for every new one.
        at_once = prefers_tiles(device, dtype) or flash.serves(device, dtype)
        return at_once or int(lengths.sum()) < _FULL * len(lengths) * width

    def _multiple(self, lengths: Tensor) -> int:
        """Of what a packed batch's tokens should be a multiple."""
        halves = self.device.type == "cpu" and self.model.dtype == torch.bfloat16
        return _VECTORS if halves and int(lengths.sum()) >= _MANY else 1

    @property
    def packs(self) -> bool:
        """Whether texts of unlike lengths are packed: where they can be, and attention is quick for many lengths.

        An accelerator without a kernel for that would be called for each length apart; some padding costs it less.
        """
        quick = self.device.type == "cpu" or flash.serves(self.device, self.model.dtype)
        return quick and self.can_pack

    def forward(
        self,
        ids: Tensor,
        lengths: Tensor,
        config: EmbedConfig,
        *,
        betas: dict[int, Tensor] | None = None,
        placeholders: Tensor | None = None,
        readers: Mapping[int, Callable[[Tensor], None]] | None = None,
        packed: Packed | None = None,
        prefix: Prefix | None = None,
        by_definition: bool = False,
    ) -> Tensor:
        """What `states` does when it has decided on packing; arguments and result as there.

        Args:
            packed: the same texts behind one another; None: padded, as they are.
            by_definition: attention by the prepended form, whatever is faster.
        """

        def unpacked(reader: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
            return reader if packed is None else lambda states: reader(packed.unpack(states))

        # No mask: with padding on the right, causality already hides it, and no (n,n) mask need be made.
        inputs = {"input_ids": ids}
        if packed:
            inputs = {"input_ids": packed.ids, "position_ids": packed.positions}
            if prefix:
                inputs["position_ids"] = packed.positions + prefix.tokens
                # Or else transformers would look for packed texts in the positions, and could not place the beginning.
                inputs["attention_mask"] = torch.ones_like(packed.ids)
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.autocast(self.device.type, enabled=False))  # the model's own dtype, always
            if config.layers or packed:
                stack.enter_context(self._attention_changed(lengths, config, betas, packed, prefix, by_definition))
            if config.prepend_layers and placeholders is not None:
                rows = torch.arange(len(ids)) if packed is None else torch.zeros(len(ids), dtype=torch.long)
                starts = 0 if packed is None else packed.starts
                places = (starts + placeholders.to(lengths.device), starts + lengths - 1)
                stack.enter_context(self._prepending(rows, *places, config.prepend_layers))
            stack.enter_context(self.observing({layer: unpacked(reader) for layer, reader in (readers or {}).items()}))
            if config.output_layer is not None:
                stack.enter_context(self.observing({config.output_layer: _stop}))
            stack.enter_context(alone(self.decoder))
            try:
                states = self.decoder(**inputs, use_cache=False)[0]
            except _Reached as reached:
                states = reached.states
        return states if packed is None else packed.unpack(states)

    @functools.cached_property
    def can_pack(self) -> bool:
        """Whether packed texts come out as padded ones do (see `kvembed.trials`)."""
        return packs_as_padded(self)

    @functools.cached_property
    def can_share(self) -> bool:
        """Whether texts come out the same after a beginning that is computed once (see `kvembed.trials`)."""
        return shares_prefixes(self)

    @functools.cached_property
    def _rotary_layers(self) -> tuple[set[int], set[int]]:
        return rotary_layers(self)

    @contextlib.contextmanager
    def _prepending(self, rows: Tensor, placeholders: Tensor, last: Tensor, layers: Sequence[int]) -> Iterator[None]:
        """Token Prepending (Fu et al. 2024, arXiv 2412.11556, section 3): the placeholder's state is a random normal
        embedding at first, and the last token's state of the layer below at the input of each of `layers`.
        """

        def change(layer: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
            states = (args[0] if args else kwargs["hidden_states"]).clone()  # (B,n,D)
            row, place, source = (tensor.to(states.device) for tensor in (rows, placeholders, last))
            if layer == 0:
                random = torch.randn(
                    states.shape[-1], generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu"
                )
                states[row, place] = random.to(states)
            else:
                states[row, place] = states[row, source]
            return ((states, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": states})

        with contextlib.ExitStack() as stack:
            for layer in {0, *layers}:
                hook = in_this_thread(functools.partial(change, layer))
                stack.callback(self.layers[layer].register_forward_pre_hook(hook, with_kwargs=True).remove)
            yield

    @contextlib.contextmanager
    def _attention_changed(
        self,
        lengths: Tensor,
        config: EmbedConfig,
        betas: dict[int, Tensor] | None,
        packed: Packed | None,
        prefix: Prefix | None,
        by_definition: bool,
    ) -> Iterator[None]:
        rotations: dict[Any, tuple[Tensor, Tensor]] = {}
        kind = functools.partial(self.rerouting, prefer_closed=False) if by_definition else self.rerouting
        reroute = kind(
            layers=frozenset(self.changed_layers(config)),
            layer_calls=self.layer_calls,
            last=lengths - 1,
            bias=config.bias,
            slot_self=config.slot_self,
            bidirectional=config.attention == "bidirectional",
            turned=self.turned_layers(config),
            rotations=rotations,
            betas=betas,
            packed=packed.lengths if packed else (),
            prefix=prefix,
            probe=int(packed.starts[-1]) if packed and prefix else 0,
        )
        with contextlib.ExitStack() as stack:
            if reroute.turned:
                stack.enter_context(keeping_rotations(self.decoder, rotations))
            stack.enter_context(attending(self.decoder, reroute, reroute.make_mask))
            yield

    def turned_layers(self, config: EmbedConfig) -> frozenset[int]:
        """Layers whose slot is to be turned back to position 0.

        Raises `UnsupportedModel` where that would not be exact.
        """
        if config.slot_position == "last" or config.attention != "reroute":
            return frozenset()
        rotary, unsure = self._rotary_layers
        layers = {*self.changed_layers(config)}
        if bad := unsure & layers:
            refuse(self.model, f"the keys of layer {min(bad)} are not plainly rotated; slot_position=first needs that")
        return frozenset(rotary & layers)

    @contextlib.contextmanager
    def observing(self, readers: Mapping[int, Callable[[Tensor], None]]) -> Iterator[None]:
        """While open, `readers[k]` is given the output (B,n,D) of decoder layer `k` at each forward of this thread."""
        with contextlib.ExitStack() as stack:
            for index, reader in readers.items():
                read = in_this_thread(functools.partial(read_output, reader))
                stack.callback(self.layers[index].register_forward_hook(read).remove)
            yield

    def compile(self) -> None:
        """`torch.compile` each layer's parts (norms, projections and their rotation, feed-forward), in place, for any
        shape.

        The first forwards are slow, seconds to half a minute; vectors change by rounding alone. It needs a C++ compiler
        on a CPU. Attention itself stays as it is (see `kvembed.attention`), and hooks of whole layers run as before.
        """
        for layer in self.layers:
            for part in layer.children():
                part.compile(dynamic=True)


class _Reached(Exception):
    """The forward has come to the layer that is to be read; thrown from a hook there, since nothing else ends it."""

    def __init__(self, states: Tensor) -> None:
        self.states = states


def _stop(states: Tensor) -> None:
    raise _Reached(states)


def _ranges(numbers: Sequence[int]) -> str:
    """0-3, 7, 9-11"""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    return ", ".join("-".join(map(str, part)) for part in parts)
