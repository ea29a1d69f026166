"""EmbedConfig: everything that decides what a vector is, apart from the model. Frozen, validated, JSON, hashed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import numbers
from collections.abc import Mapping
from typing import Any, Literal, get_args

from .errors import InputError

__all__ = ["EmbedConfig", "MeanTokens", "Pooling", "Role", "SlotPosition"]

Role = Literal["document", "query"]
Pooling = Literal["last", "mean", "weighted-mean", "hybrid"]
MeanTokens = Literal["all", "content"]
SlotPosition = Literal["last", "first"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """What is done to a text to make its vector. A preset of `kvembed.methods` is nothing but one of these.

    Attributes:
        method: name of the preset it came from; a label.
        document: template of a document, with `{text}` exactly once. Special-token strings are plain text here too.
        query: template of a query, with `{text}` exactly once.
        layers: decoder layers to re-route, counted from 0. `()`: none. `None`: to be chosen by intrinsic dimension
            (KV-Embedding's rule, see `kvembed.layers`) when an `Embedder` is made; an `Embedder`'s own config always
            has them spelled out.
        bias: added to the slot's logit (natural-log units); the paper's default is 1.0. Must be finite.
        slot_position: `"last"`: the slot's key keeps the rotation of the last position (default); `"first"`: its rotary
            embedding is turned back to position 0. The paper's available text leaves this open.
        slot_self: whether the last token, too, sees the slot, that is its own copy (default). Left open likewise.
        pooling: `"last"`; `"mean"`; `"weighted-mean"` (weights 1..n, SGPT); `"hybrid"`: (last + mean) / 2.
        mean_tokens: tokens that enter the mean: `"all"`, or `"content"`: the text's own, without template and BOS.
            A text with no token of its own falls back on all.
        output_layer: `None`: the last layer's states after the final norm; `k`: the output of decoder layer `k`, before
            any final norm (the last layer's index gives the unnormed top).
        max_tokens: longest input in tokens, template included; a longer text is cut and counted. `None`: the model's
            limit.

    Raises:
        InputError: a field does not have one of the values above.
    """

    method: str = "custom"
    document: str = "{text}"
    query: str = "{text}"
    layers: tuple[int, ...] | None = ()
    bias: float = 1.0
    slot_position: SlotPosition = "last"
    slot_self: bool = True
    pooling: Pooling = "mean"
    mean_tokens: MeanTokens = "all"
    output_layer: int | None = None
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        for role in get_args(Role):
            template = getattr(self, role)
            if not isinstance(template, str) or template.count("{text}") != 1:
                raise InputError(f"the {role} template must hold {{text}} exactly once, not {template!r}")
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise InputError(f"{name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}")
        object.__setattr__(self, "bias", _finite(self.bias))
        if self.layers is not None:
            try:
                layers = tuple(self.layers)
            except TypeError:
                layers = (-1,)
            if isinstance(self.layers, str) or not all(_is_index(layer) for layer in layers):
                raise InputError(f"layers must be whole numbers from 0, not {self.layers!r}")
            object.__setattr__(self, "layers", tuple(sorted({int(layer) for layer in layers})))
        if not isinstance(self.slot_self, bool):
            raise InputError(f"slot_self must be true or false, not {self.slot_self!r}")
        if self.output_layer is not None and not _is_index(self.output_layer):
            raise InputError(f"output_layer must be a whole number from 0, not {self.output_layer!r}")
        if self.max_tokens is not None and not (_is_index(self.max_tokens) and self.max_tokens > 0):
            raise InputError(f"max_tokens must be a whole number from 1, not {self.max_tokens!r}")

    def template(self, role: Role) -> str:
        """The template of `role`. Raises `InputError` for a role that is neither `"document"` nor `"query"`."""
        if role not in get_args(Role):
            raise InputError(f"role must be document or query, not {role!r}")
        return self.query if role == "query" else self.document

    def replace(self, **changes: Any) -> EmbedConfig:
        """A copy with some fields changed. Raises `InputError` for an unknown field or a bad value."""
        _check_names(changes)
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        fields = dataclasses.asdict(self)
        return fields | {"layers": None if self.layers is None else list(self.layers)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> EmbedConfig:
        """The inverse of `to_dict`. Raises `InputError` for an unknown field or a bad value."""
        _check_names(fields)
        return cls(**fields)

    def hash(self) -> str:
        """16 hex digits of the SHA-256 of the sorted JSON; the same config gives the same hash anywhere."""
        text = json.dumps(self.to_dict(), sort_keys=True, ensure_ascii=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


_CHOICES: dict[str, tuple[str, ...]] = {
    "slot_position": get_args(SlotPosition),
    "pooling": get_args(Pooling),
    "mean_tokens": get_args(MeanTokens),
}


def _is_index(value: object) -> bool:
    # Integral, not int: a NumPy integer is one
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= 0


def _finite(value: object) -> float:
    try:
        if isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    except OverflowError:
        pass
    raise InputError(f"bias must be a finite number, not {value!r}")


def _check_names(fields: Mapping[str, Any]) -> None:
    known = {field.name for field in dataclasses.fields(EmbedConfig)}
    if unknown := sorted(set(fields) - known):
        raise InputError(f"unknown option {unknown[0]!r}; known: {', '.join(sorted(known))}")
