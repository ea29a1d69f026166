"""EmbedConfig: everything that decides what a vector is, apart from the model. Frozen, validated, JSON, hashed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import numbers
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from .checks import check_unicode, is_whole
from .errors import InputError
from .files import naming, user_path

__all__ = [
    "EmbedConfig",
    "MeanTokens",
    "Pooling",
    "Precision",
    "Readout",
    "Role",
]

Role = Literal["document", "query"]
AttentionChange = Literal["reroute", "bidirectional"]
Pooling = Literal["last", "mean", "weighted-mean", "hybrid", "static"]
MeanTokens = Literal["all", "content"]
SlotPosition = Literal["last", "first"]
TransformKind = Literal["none", "whiten"]
Precision = Literal["float32", "int8", "binary"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Readout:
    """One way to read a text's states; the fields are those of `EmbedConfig` with the same names.

    Raises:
        InputError: a field does not have one of the values given there, or `output_layer` is given with `"static"`.
    """

    pooling: Pooling = "mean"
    mean_tokens: MeanTokens = "all"
    output_layer: int | None = None

    def __post_init__(self) -> None:
        _check_choices(self)
        object.__setattr__(self, "output_layer", _layer(self.output_layer, self.pooling))

    @property
    def is_inside(self) -> bool:
        """Whether it is read below the final norm, which puts a model's states to scale."""
        return self.output_layer is not None or self.pooling == "static"


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """What is done to a text to make its vector. A preset of `kvembed.methods` is nothing but one of these.

    Attributes:
        method: name of the preset it came from; a label.
        document: template of a document, with `{text}` in it. Where `{text}` stands more than once, the last copy
            counts as the text's own tokens, and long texts are cut alike in all copies. Several templates: the text is
            embedded in each, and the pooled states are averaged. Special-token strings are plain text here too.
        query: template or templates of a query, likewise.
        layers: decoder layers whose attention is changed, counted from 0. `()`: none. `"all"`: all that have attention.
            `None`: to be chosen by intrinsic dimension (KV-Embedding's rule, see `kvembed.layers`). An `Embedder`'s own
            config always has them spelled out.
        attention: what `layers` do: `"reroute"`: the last token's key and value become a slot that all tokens see
            (KV-Embedding); `"bidirectional"`: the causal mask, and any window, is taken off.
        bias: added to the slot's logit (natural-log units); the paper's default is 1.0. Must be finite.
        slot_position: `"last"`: the slot's key keeps the rotation of the last position (default); `"first"`: its rotary
            embedding is turned back to position 0. The paper's available text leaves this open.
        slot_self: whether the last token, too, sees the slot, that is its own copy (default). Left open likewise.
        pooling: `"last"`; `"mean"`; `"weighted-mean"` (SGPT: weights 1..n, by place in the prompt); `"hybrid"`:
            (last + mean) / 2; `"static"`: no state is read, but the input embeddings of the text's own tokens (see
            `kvembed.static`).
        mean_tokens: tokens that enter the mean: `"all"`, or `"content"`: the text's own, without template and BOS.
            A text with no token of its own falls back on all.
        output_layer: `None`: the last layer's states after the final norm; `k`: the output of decoder layer `k`, before
            any final norm (the last layer's index gives the unnormed top); `-2`: the layer below the last.
        more_readouts: further ways to read the same forward; together with the one above they are the views of a text
            that the transform puts together.
        transform: `"none"`: the read-out itself, the mean of it over several templates; `"whiten"`: every read-out
            under every template is a view, and all are whitened and joined as `kvembed.transform` says, fitted on
            unlabelled text.
        dim: how many dimensions to keep of those that the transform gives, the best first. `None`: all.
        prepend_layers: layers, from 1, at whose input the state of the placeholder `{pst}`, which then stands once
            before the text in every template, is replaced by the last token's (Token Prepending). `()`: none.
        max_tokens: longest input in tokens, template included, but for a long beginning that texts share (see
            `kvembed.prefix`); a longer text is cut and counted. `None`: the model's limit, which only a config
            with `chunk_tokens` may exceed, or one that runs no layer.
        chunk_tokens: a text of more tokens of its own is read in chunks of about equal length, each in the template as
            a text by itself, and every read-out but `"static"` is the mean of theirs; a chunk ends between words where
            it can, and may be a few tokens longer for that, but never longer than the model takes. `None`: every text
            is read at once.

    Raises:
        InputError: a field does not have one of the values above.
    """

    method: str = "custom"
    document: str | tuple[str, ...] = "{text}"
    query: str | tuple[str, ...] = "{text}"
    layers: tuple[int, ...] | Literal["all"] | None = ()
    attention: AttentionChange = "reroute"
    bias: float = 1.0
    slot_position: SlotPosition = "last"
    slot_self: bool = True
    pooling: Pooling = "mean"
    mean_tokens: MeanTokens = "all"
    output_layer: int | None = None
    more_readouts: tuple[Readout, ...] = ()
    transform: TransformKind = "none"
    dim: int | None = None
    prepend_layers: tuple[int, ...] = ()
    max_tokens: int | None = None
    chunk_tokens: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.method, str):
            raise InputError(f"method must be a name, not {self.method!r}")
        object.__setattr__(self, "prepend_layers", _indices("prepend_layers", self.prepend_layers, least=1))
        if self.layers is not None and not (isinstance(self.layers, str) and self.layers == "all"):
            object.__setattr__(self, "layers", _indices("layers", self.layers, least=0, others=_OTHER_LAYERS))
        for role in get_args(Role):
            object.__setattr__(self, role, self._checked_templates(role))
        _check_choices(self)
        object.__setattr__(self, "bias", _finite(self.bias))
        if not isinstance(self.slot_self, bool):
            raise InputError(f"slot_self must be true or false, not {self.slot_self!r}")
        object.__setattr__(self, "output_layer", _layer(self.output_layer, self.pooling))
        object.__setattr__(self, "more_readouts", _readouts(self.more_readouts))
        if self.pooling == "static" and any(one.pooling != "static" for one in self.more_readouts):
            raise InputError("a static read-out comes last, in more_readouts, where there are others")
        for name in ("max_tokens", "chunk_tokens", "dim"):
            value = getattr(self, name)
            if value is not None and not (is_whole(value) and value > 0):
                raise InputError(f"{name} must be a whole number from 1, not {value!r}")
            object.__setattr__(self, name, None if value is None else int(value))
        if self.transform == "none" and (self.more_readouts or self.dim):
            if self.dim:
                raise InputError(
                    f"method {self.method} has no best dimensions to keep: dim is for those with a transform"
                )
            raise InputError("more_readouts needs a transform, and transform is none")

        if self.transform != "none" and len(self.templates("document")) != len(self.templates("query")):
            raise InputError("with a transform, documents and queries must have as many templates")

    def _checked_templates(self, role: str) -> str | tuple[str, ...]:
        given = getattr(self, role)
        templates = (given,) if isinstance(given, str) else tuple(given) if isinstance(given, list | tuple) else ()
        if not templates or not all(isinstance(template, str) and "{text}" in template for template in templates):
            raise InputError(f"the {role} template must hold {{text}}, not {given!r}")
        for template in templates:
            check_unicode(template, f"the {role} template")
            before, _, after = template.partition("{text}")
            if "{pst}" in after or before.count("{pst}") != bool(self.prepend_layers):
                raise InputError(
                    f"the {role} template must hold {{pst}} once, before {{text}}, if there are prepend_layers, and "
                    f"not otherwise: {template!r}"
                )
        return templates[0] if len(templates) == 1 else templates

    def templates(self, role: Role) -> tuple[str, ...]:
        """The templates of `role`. Raises `InputError` for a role that is neither `"document"` nor `"query"`."""
        if role not in get_args(Role):
            raise InputError(f"role must be document or query, not {role!r}")
        given = self.query if role == "query" else self.document
        return (given,) if isinstance(given, str) else given

    @property
    def readouts(self) -> tuple[Readout, ...]:
        """All ways to read a forward, the one in the config's own fields first."""
        own = Readout(pooling=self.pooling, mean_tokens=self.mean_tokens, output_layer=self.output_layer)
        return (own, *self.more_readouts)

    @property
    def views(self) -> tuple[tuple[str, Readout], ...]:
        """A document's template and the way to read it, for every view of a text, in the order of the views."""
        return tuple((template, one) for template in self.templates("document") for one in self.readouts)

    @property
    def forward_passes(self) -> int:
        """Cost: how many times the model runs for a document that is read in one piece."""
        return 0 if self.pooling == "static" else len(self.templates("document"))

    def replace(self, **changes: Any) -> EmbedConfig:
        """A copy with some fields changed. Raises `InputError` for an unknown field or a bad value."""
        _check_names(changes)
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        fields = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> EmbedConfig:
        """The inverse of `to_dict`. Raises `InputError` for an unknown field or a bad value."""
        if not isinstance(fields, Mapping):
            raise InputError(f"a config's fields are named, not {fields!r}")
        _check_names(fields)
        return cls(**fields)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> EmbedConfig:
        """A config from a JSON file with its fields; those left out are at their defaults, `method` is the file's name.

        Raises `InputError` for a file that can't be read, or whose content is not a config.
        """
        with naming(path):
            content = user_path(path).read_bytes()
        try:
            fields = json.loads(content)
            return cls.from_dict({"method": Path(path).stem, **fields} if isinstance(fields, dict) else fields)
        except (ValueError, TypeError, AttributeError) as error:
            raise InputError(f"{path} is not a kvembed config: {error}") from None

    def hash(self) -> str:
        """16 hex digits of the SHA-256 of the sorted JSON; the same config gives the same hash anywhere.

        Fields at their defaults are left out, so that a field added one day leaves the old hashes as they are.
        """
        defaults = EmbedConfig().to_dict()
        changed = {name: value for name, value in self.to_dict().items() if value != defaults[name]}
        text = json.dumps(changed, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


_OTHER_LAYERS = ', or "all", or None to have them chosen'
_CHOICES: dict[str, tuple[str, ...]] = {
    "attention": get_args(AttentionChange),
    "slot_position": get_args(SlotPosition),
    "pooling": get_args(Pooling),
    "mean_tokens": get_args(MeanTokens),
    "transform": get_args(TransformKind),
}


def _check_choices(config: object) -> None:
    for name, allowed in _CHOICES.items():
        value = getattr(config, name, allowed[0])
        if value not in allowed:
            raise InputError(f"{name} must be one of {', '.join(allowed)}, not {value!r}")


def _layer(layer: Any, pooling: Pooling) -> int | None:
    if layer is None:
        return None
    if not is_whole(layer):
        raise InputError(f"output_layer must be a whole number, not {layer!r}")
    if pooling == "static":
        raise InputError("a static read-out has no output_layer: no layer is run")
    return int(layer)


def _readouts(given: Any) -> tuple[Readout, ...]:
    try:
        return tuple(part if isinstance(part, Readout) else Readout(**part) for part in given)
    except TypeError:
        raise InputError(f"more_readouts must be a list of read-outs, not {given!r}") from None


def _indices(name: str, value: Any, least: int, others: str = "") -> tuple[int, ...]:
    """Sorted, each once; `others` says what else there may be, for the error."""
    try:
        indices = tuple(value)
    except TypeError:
        indices = (-1,)
    if isinstance(value, str) or not all(is_whole(index) and index >= least for index in indices):
        raise InputError(f"{name} must be a list of whole numbers from {least}{others}, not {value!r}")
    return tuple(sorted({int(index) for index in indices}))


def _finite(value: object) -> float:
    try:
        if isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value):
            return float(value) + 0.0  # -0.0 is 0.0
    except OverflowError:
        pass
    raise InputError(f"bias must be a finite number, not {value!r}")


def _check_names(fields: Mapping[str, Any]) -> None:
    known = {field.name for field in dataclasses.fields(EmbedConfig)}
    if unknown := sorted(set(fields) - known):
        raise InputError(f"unknown option {unknown[0]!r}; known: {', '.join(sorted(known))}")
