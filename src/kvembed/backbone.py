"""Backbone: a frozen decoder as the rest of kvembed sees it. Probed by one short forward; refused by name if unfit."""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from . import flash
from .attention import Reroute, unrotate
from .attention_interface import attending, stock_attention, unfit
from .batching import is_out_of_memory
from .config import EmbedConfig
from .errors import InputError, UnsupportedModel
from .packing import Packed, pack
from .prefix import Prefix
from .static import StaticVectors
from .tiles import prefers_tiles

__all__ = ["Backbone"]

_FULL = 0.97  # share of real tokens in a padded batch from which packing gains nothing
# A CPU multiplies bfloat16 matrices up to a third slower if they have neither few rows nor a multiple of 8 (oneDNN's
# blocks do not fit; docs/experiments.md).
_VECTORS, _MANY = 8, 128
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}  # of the largest state


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
        rope_border: LongRoPE turns all of a batch by other angles once its longest text is longer than this; such texts
            must not share a batch with shorter ones. None for every other rotary embedding.

    Raises:
        UnsupportedModel: with the model's type and the reason.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.rerouting: Callable[..., Reroute] = Reroute
        self._static: tuple[Any, StaticVectors] | None = None
        config = model.config.get_text_config(decoder=True)
        self.model_type: str = config.model_type
        if model.config.is_encoder_decoder:
            raise UnsupportedModel(
                f"{self.model_type} is an encoder-decoder; kvembed takes decoder-only language models"
            )
        if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
            raise UnsupportedModel(f"{self.model_type} has a prompt-tuning adapter, whose virtual tokens would be lost")
        self.decoder = _decoder(model)
        names = ("max_position_embeddings", "n_positions", "max_target_positions")
        limit = next(filter(None, (getattr(config, name, None) for name in names)), None)
        self.max_tokens: int | None = limit if isinstance(limit, int) and limit > 0 else None
        rope = getattr(config, "rope_parameters", None) or {}
        kinds = [rope, *(kind for kind in rope.values() if isinstance(kind, dict))]
        self.rope_border: int | None = next(
            (kind["original_max_position_embeddings"] for kind in kinds if kind.get("rope_type") == "longrope"), None
        )
        self._probe()

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        first: Tensor = next(self.decoder.parameters())  # the embeddings, in a model spread over devices
        if first.is_meta:  # offloaded: accelerate's hook brings it where it is needed
            hook = getattr(self.decoder.get_input_embeddings(), "_hf_hook", None)
            place = getattr(hook, "execution_device", None)
            return first.device if place is None else torch.device(place)
        return first.device

    @property
    def dtype(self) -> str:
        """The weights' dtype by its name: float32, bfloat16 or float16."""
        return str(self.model.dtype).removeprefix("torch.")

    def _probe(self) -> None:
        """One short forward with an attention function that only looks: which module is called where, and how."""
        calls: dict[nn.Module, list[tuple[str, int]]] = defaultdict(list)
        place = [("", -1)]  # the stack of layers, and the layer in it, that the forward is in

        def look(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
        ) -> tuple[Tensor, Tensor | None]:
            if reason := unfit(module, query, key, kwargs):
                self._refuse(reason)
            calls[module].append(place[0])
            return stock_attention(module, query, key, value, attention_mask, **kwargs)

        lists = {name: module for name, module in self.decoder.named_modules() if isinstance(module, nn.ModuleList)}
        stacks = {
            name: part for name, part in lists.items() if not any(name.startswith(f"{other}.") for other in lists)
        }
        with contextlib.ExitStack() as stack:
            outputs: dict[str, list[Any]] = defaultdict(list)  # of every layer
            for name, layers in stacks.items():
                for index, layer in enumerate(layers):
                    enter = _in_this_thread(functools.partial(_set, place, (name, index)))
                    stack.callback(layer.register_forward_pre_hook(enter).remove)
                    reader = _in_this_thread(functools.partial(_read_output, outputs[name].append))
                    stack.callback(layer.register_forward_hook(reader).remove)
            stack.enter_context(attending(self.decoder, look))
            stack.enter_context(torch.inference_mode())
            ids = (torch.arange(16, device=self.device)[None] + 1) % self._vocabulary
            failure: Exception | None = None
            try:
                output = self.decoder(input_ids=ids, use_cache=False)
            except UnsupportedModel:
                raise
            except Exception as error:
                failure = error
        if failure and (calls or not self._runs(ids)):
            self._refuse(f"a plain forward of its decoder fails ({failure})")
        if not calls:
            names = [type(module).__name__.lower() for module in self.decoder.modules()]
            self._refuse(
                "its attention does not go through transformers' attention interface"
                if any("attention" in name or name.endswith("attn") for name in names) and self.model_type != "rwkv"
                else "it has no attention"
            )
        used = {name for places in calls.values() for name, _ in places}
        if "" in used:
            self._refuse("its attention is called outside its decoder layers")
        # Nearly always one stack; a model with several (hrm_text) has its layers numbered through.
        first: dict[str, int] = {}
        self.layers: list[nn.Module] = []
        for name in stacks:
            if name in used:
                first[name] = len(self.layers)
                self.layers += stacks[name]
        self.layer_calls = {
            module: tuple(first[name] + index for name, index in places) for module, places in calls.items()
        }
        self.attention_layers = tuple(sorted({index for places in self.layer_calls.values() for index in places}))
        self.dim = int(output[0].shape[-1])
        inner = [states for name in first for states in outputs[name]]
        self._inner_shapes = {(*states.shape[:-2], states.shape[-1]) for states in inner if torch.is_tensor(states)}

    @property
    def _vocabulary(self) -> int:
        return int(getattr(self.model.config.get_text_config(decoder=True), "vocab_size", 0)) or 2**31

    def check_readable(self) -> None:
        """Raises `UnsupportedModel` if the states between its layers are not one vector of `dim` numbers a token."""
        if odd := self._inner_shapes - {(1, self.dim)}:
            self._refuse(
                f"its layers give a token {' x '.join(map(str, min(odd)))} numbers, and the top {self.dim}, so that no "
                "layer below the top can be read; re-routing needs layers= then"
            )

    @torch.inference_mode()
    def _runs(self, ids: Tensor) -> bool:
        """Whether the decoder runs when nobody looks: it may be our masks that an attention of its own can't take."""
        try:
            self.decoder(input_ids=ids, use_cache=False)
        except Exception:
            return False
        return True

    def _refuse(self, reason: str) -> NoReturn:
        raise UnsupportedModel(f"{self.model_type} ({type(self.model).__name__}) can't be re-routed: {reason}")

    @property
    @torch.inference_mode()
    def static(self) -> StaticVectors:
        """Vectors of token ids without a forward. Raises `UnsupportedModel` where embeddings are no table of them."""
        embedding = self.decoder.get_input_embeddings()
        if not isinstance(embedding, nn.Embedding) or embedding.embedding_dim != self.dim:
            raise UnsupportedModel(
                f"{self.model_type} can't give static vectors, which auto is made of too: its input embeddings are not "
                "one table of the width of its states"
            )
        weight = embedding.weight
        step = max(1, weight.numel() // 64) | 1  # odd, or else it might fall on one column
        few = [] if weight.is_meta else weight.flatten()[::step].tolist()
        known = self._static
        if known is None or known[0] != (weight.device, few):  # the model may have been moved, or an adapter merged
            with torch.autocast(self.device.type, enabled=False):  # they are kept
                known = (weight.device, few), StaticVectors(embedding, embedding.num_embeddings, self.device)
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
        return self._states(
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
                self._refuse(reason)
            layers.append((key[0], value[0]))
            return stock_attention(module, query, key, value, attention_mask, **kwargs)

        with torch.autocast(self.device.type, enabled=False), attending(self.decoder, keep), self._by_itself():
            self.decoder(input_ids=torch.tensor([ids], device=self.device), use_cache=False)
        return Prefix(len(ids), layers)

    def _by_itself(self) -> contextlib.AbstractContextManager[Any]:
        """LongRoPE writes a batch's angles into the model itself: its forwards must not overlap, whoever's they are."""
        return contextlib.nullcontext() if self.rope_border is None else _lock_of(self.decoder)

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

    def _states(
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
        kept: list[Tensor] = []

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
                stop = _stop if betas is None else kept.append
                stack.enter_context(self.observing({config.output_layer: stop}))
            stack.enter_context(self._by_itself())
            try:
                output = self.decoder(**inputs, use_cache=False)
                states = kept[0] if kept else output[0]
            except _Reached as reached:
                states = reached.states
        return states if packed is None else packed.unpack(states)

    @functools.cached_property
    @torch.inference_mode()
    def can_pack(self) -> bool:
        """Whether packed texts come out as padded ones do, found out once by two short texts in a row.

        Not so for a model that mixes tokens outside its attention (convolution, state space), or has its own positions.
        """
        if "position_ids" not in inspect.signature(self.decoder.forward).parameters:
            return False
        if getattr(self.model.config.get_text_config(decoder=True), "attn_temperature_tuning", False):
            return False  # llama4 scales queries by their place in the row, in rows longer than a trial's
        texts, lengths = self._trial()
        other = torch.cat([texts[:1].flip(1), texts[1:]])
        config = EmbedConfig()
        try:
            # by definition: it is the model that is tried, not how another kernel rounds
            ours, its = (
                self._states(x, lengths, config, packed=pack(x, lengths), by_definition=True) for x in (texts, other)
            )
        except Exception as error:  # a model's own code may fail in any way
            if is_out_of_memory(error):
                raise  # that says nothing of the model
            return False
        padded = self._states(texts, lengths, config)
        scale = float(padded.abs().max())
        # The first text must not show in the second at all; the rest is rounding.
        leaks = float((ours[1, :5] - its[1, :5]).abs().max())
        apart = max(float((ours[row, :n] - padded[row, :n]).abs().max()) for row, n in enumerate((8, 5)))
        return leaks <= 1e-6 * scale and apart <= _ROUNDING[padded.dtype] * scale

    def _trial(self) -> tuple[Tensor, Tensor]:
        """Two short texts of ordinary tokens, (2,8) and their lengths (2,).

        They are taken from the middle of the vocabulary: special tokens are at its ends, and their states, huge and
        never trained, magnify what is rounded.
        """
        middle = self._vocabulary // 2 if self._vocabulary < 2**31 else 0
        texts = torch.tensor([[9, 8, 7, 6, 5, 4, 3, 2], [1, 2, 3, 4, 5, 0, 0, 0]], device=self.device)
        return (texts + middle) % self._vocabulary, torch.tensor([8, 5], device=self.device)

    @functools.cached_property
    @torch.inference_mode()
    def can_share(self) -> bool:
        """Whether texts come out the same after a beginning that is computed once; found out by two short ones.

        Not so where the longest text of a batch decides how positions are rotated, or a model makes its own masks.
        """
        if not self.can_pack or self.rope_border is not None:
            return False
        texts, lengths = self._trial()
        beginning = texts[0].repeat(2)
        whole = torch.cat([beginning.expand(2, -1), texts], 1)
        config = EmbedConfig()
        try:
            prefix = self.prefix(beginning.tolist())
            packed = pack(texts, lengths)
            ours = self._states(texts, lengths, config, packed=packed, prefix=prefix, by_definition=True)
        except Exception as error:  # as above
            if is_out_of_memory(error):
                raise
            return False
        padded = self._states(whole, lengths + 16, config)[:, 16:]
        alone = self._states(texts, lengths, config)
        real = (torch.arange(8, device=self.device) < lengths[:, None]).to(padded.device)
        apart, effect = ((states - padded)[real].float() for states in (ours, alone))
        # A wrong beginning could hide below the rounding of the largest state: so the error must also be small against
        # what the beginning does to the states.
        near = float(apart.abs().max()) <= _ROUNDING[padded.dtype] * float(padded.abs().max())
        return near and float(apart.norm()) <= 0.3 * float(effect.norm())

    @contextlib.contextmanager
    def _prepending(self, rows: Tensor, placeholders: Tensor, last: Tensor, layers: Sequence[int]) -> Iterator[None]:
        """Token Prepending (Fu et al. 2024, arXiv 2412.11556, section 3): the placeholder's state is a random normal
        embedding at first, and the last token's state of the layer below at the input of each of `layers`.
        """

        def change(layer: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
            states = (args[0] if args else kwargs["hidden_states"]).clone()  # (B,n,D)
            row, place, source = (tensor.to(states.device) for tensor in (rows, placeholders, last))
            if layer == 0:
                random = torch.randn(states.shape[-1], generator=torch.Generator().manual_seed(0), device="cpu")
                states[row, place] = random.to(states)
            else:
                states[row, place] = states[row, source]
            return ((states, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": states})

        with contextlib.ExitStack() as stack:
            for layer in {0, *layers}:
                hook = _in_this_thread(functools.partial(change, layer))
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
            turned=self._turned(config),
            rotations=rotations,
            betas=betas,
            packed=packed.lengths if packed else (),
            prefix=prefix,
        )
        with contextlib.ExitStack() as stack:
            if reroute.turned:
                stack.enter_context(self._keeping_rotations(rotations))
            stack.enter_context(attending(self.decoder, reroute, reroute.make_mask))
            yield

    @contextlib.contextmanager
    def _keeping_rotations(self, rotations: dict[Any, tuple[Tensor, Tensor]]) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for name, module in self.decoder.named_modules():
                if name.endswith("rotary_emb"):
                    keep = _in_this_thread(functools.partial(_keep_rotation, rotations))
                    stack.callback(module.register_forward_hook(keep, with_kwargs=True).remove)
            yield

    @functools.cached_property
    def _rotary(self) -> tuple[set[int], set[int]]:
        """Layers that rotate their keys, and those of them where turning a key back does not give that of position 0.

        In a text of one token repeated, a layer's states are the same at all positions, and so are its keys but for
        their rotation. So all keys turned back must be the first one.
        """
        rotary: set[int] = set()
        unsure: set[int] = set()
        rotations: dict[Any, tuple[Tensor, Tensor]] = {}
        calls = {module: iter(places) for module, places in self.layer_calls.items()}

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

        ids = torch.full((1, 16), 16 % self._vocabulary, device=self.device)
        with torch.inference_mode(), self._keeping_rotations(rotations), attending(self.decoder, look):
            self.decoder(input_ids=ids, use_cache=False)
        return rotary, unsure

    def _turned(self, config: EmbedConfig) -> frozenset[int]:
        """Layers whose slot is to be turned back to position 0; refused where that would not be exact."""
        if config.slot_position == "last" or config.attention != "reroute":
            return frozenset()
        rotary, unsure = self._rotary
        layers = {*self.changed_layers(config)}
        if bad := unsure & layers:
            self._refuse(f"the keys of layer {min(bad)} are not plainly rotated; slot_position=first needs that")
        return frozenset(rotary & layers)

    @contextlib.contextmanager
    def observing(self, readers: Mapping[int, Callable[[Tensor], None]]) -> Iterator[None]:
        """While open, `readers[k]` is given the output (B,n,D) of decoder layer `k` at each forward of this thread."""
        with contextlib.ExitStack() as stack:
            for index, reader in readers.items():
                read = _in_this_thread(functools.partial(_read_output, reader))
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


def _moved(keys: Tensor, first: Tensor, typical: float, most: Tensor) -> bool:
    """Whether keys (1,H,n,Dk) are others than the first one, by more than is rounded.

    By coordinate: a bias may make a few of them hundreds of times as large as rotation moves the others.
    """
    rounding = 16 * torch.finfo(keys.dtype).eps * most
    return bool(((keys - first).abs().float() > 0.05 * typical + rounding).any())


def _in_this_thread(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A module hook is seen by every thread that uses the model; this one acts only in the thread that made it."""
    owner = threading.get_ident()

    def act(*args: Any) -> Any:
        return hook(*args) if threading.get_ident() == owner else None

    return act


_LOCKS: weakref.WeakKeyDictionary[nn.Module, threading.Lock] = weakref.WeakKeyDictionary()
_MAKING = threading.Lock()


def _lock_of(decoder: nn.Module) -> threading.Lock:
    """One for all who use it."""
    with _MAKING:
        return _LOCKS.setdefault(decoder, threading.Lock())


class _Reached(Exception):
    """The forward has come to the layer that is to be read; thrown from a hook there, since nothing else ends it."""

    def __init__(self, states: Tensor) -> None:
        self.states = states


def _stop(states: Tensor) -> None:
    raise _Reached(states)


def _set(cell: list[Any], value: Any, *_: Any) -> None:
    cell[0] = value


def _decoder(model: PreTrainedModel) -> PreTrainedModel:
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


def _read_output(reader: Callable[[Tensor], None], _module: nn.Module, _args: Any, output: Any) -> None:
    reader(output[0] if isinstance(output, tuple) else output)


def _keep_rotation(
    rotations: dict[Any, Any], _module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any
) -> None:
    layer_type = kwargs.get("layer_type", args[2] if len(args) > 2 else None)
    if isinstance(output, tuple) and len(output) == 2:
        rotations[layer_type] = output


def _ranges(numbers: Sequence[int]) -> str:
    """0-3, 7, 9-11"""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    return ", ".join("-".join(map(str, part)) for part in parts)
