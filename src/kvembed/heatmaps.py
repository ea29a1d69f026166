"""Tables coloured by their values: a text's attention to the slot by token, the cosines of texts with each other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .errors import InputError
from .page import STEPS, box, safe

if TYPE_CHECKING:
    from .explanation import Explanation

__all__ = ["BETA", "beta_map", "coloured", "cosine_map", "count", "grid", "legend", "number", "panel"]

BETA = """Beta: the share of its attention, in percent, that each token gives to the slot, mean over heads. The text's
own tokens are bold, the template's are not; a dot is a space."""
_TOKENS = 400  # shown of a text, lest the page grow to megabytes


def beta_map(explanation: Explanation) -> str:
    """Tokens by re-routed layers: the share of its attention that each gives the slot."""
    layers = {f"layer {layer}": values for layer, values in sorted(explanation.beta.items())}
    if not layers:
        return f"<p>Method {safe(explanation.config.method)} re-routes nothing, so no token reads a slot.</p>"
    layers["mean"] = tuple(np.mean(list(layers.values()), axis=0).tolist())
    layers = {name: values[:_TOKENS] for name, values in layers.items()}
    tokens = [token.translate(_SHOWN) or "∅" for token in explanation.tokens[:_TOKENS]]
    own = range(*explanation.span)
    heads = [
        f'<bdi{" class=own" * (i in own)} title="{safe(token)}: token {i}, id {number}">{safe(token)}</bdi>'
        for i, (token, number) in enumerate(zip(tokens, explanation.token_ids[:_TOKENS], strict=True))
    ]
    top = max(map(max, layers.values())) or 1.0
    rows = []
    for name, values in layers.items():
        titles = [f"{name}, {token}: {value:.3f}" for token, value in zip(tokens, values, strict=True)]
        cells = [coloured(f"{100 * v:.0f}", title, _step(v, 0, top)) for v, title in zip(values, titles, strict=True)]
        rows.append((name, cells))
    cut = f", {count(explanation.tokens_cut, 'token')} cut" if explanation.tokens_cut else ""
    if len(tokens) < len(explanation.tokens):
        cut += f", the first {_TOKENS} shown"
    if explanation.chunks > 1:
        cut += f", chunk 1 of {explanation.chunks}"
    name = f"{explanation.config.method}, bias {explanation.config.bias:g}, "
    name += f"{count(len(explanation.tokens), 'token')}{cut}"
    return panel(name, grid(name, "percent", heads, rows, "beta") + legend("0 %", f"{100 * top:.0f} %"))


def cosine_map(texts: Sequence[str], cosines: NDArray[Any]) -> str:
    """Of n texts the (n, n) cosines. Raises `InputError` for another shape."""
    if cosines.shape != (len(texts), len(texts)):
        raise InputError(f"similarity needs a ({len(texts)}, {len(texts)}) array, not {cosines.shape}")
    if not len(texts):
        return ""
    others = cosines[~np.eye(len(texts), dtype=bool)].tolist() or [0.0, 1.0]
    low, high = min(others), max(others)
    rows = []
    for i, row in enumerate(cosines.tolist()):
        steps = [None if i == j else _step(value, low, high) for j, value in enumerate(row)]
        cells = [coloured(number(v, 2), f"{i + 1} and {j + 1}", steps[j]) for j, v in enumerate(row)]
        rows.append((f'{i + 1}. <bdi title="{safe(texts[i])}">{safe(_short(texts[i], 140))}</bdi>', cells))
    heads = [f'<span title="{safe(text)}">{i + 1}</span>' for i, text in enumerate(texts)]
    return panel("", grid("cosines", "text", heads, rows, "cosines") + legend(f"{low:.2f}", f"{high:.2f}"))


def grid(name: str, corner: str, heads: Iterable[str], rows: Iterable[tuple[str, list[str]]], kind: str) -> str:
    """A table in a box that scrolls."""
    top = "".join(f'<th scope="col">{head}</th>' for head in heads)
    body = "\n".join(f'<tr><th scope="row">{head}</th>{"".join(cells)}</tr>' for head, cells in rows)
    table = f'<thead><tr><th scope="col">{corner}</th>{top}</tr></thead>\n<tbody>\n{body}\n</tbody>'
    return box(name, f'<table class="{kind}">{table}</table>')


def coloured(shown: str, title: str, step: int | None = None, *, plain: bool = False) -> str:
    """A cell of a table: `shown` is markup, `title` is not."""
    kind = "" if plain else ' class="none"' if step is None else f' class="h{step}"'
    return f'<td{kind} title="{safe(title)}">{shown}</td>'


def legend(low: str, high: str) -> str:
    """The colour scale between the words for its ends."""
    steps = "".join(f'<i class="h{step}"></i>' for step in range(STEPS))
    return f'<span class="legend">{low} <span aria-hidden="true">{steps}</span> {high}</span>'


def panel(name: str, inside: str, model: str = "") -> str:
    """A part of a section; `inside` is markup."""
    return f'<article data-model="{safe(model)}">{f"<h3>{safe(name)}</h3>" if name else ""}{inside}</article>'


def _step(value: float, low: float, high: float) -> int:
    share = (value - low) / (high - low) if high > low else 0.5
    return round(min(1.0, max(0.0, share)) * (STEPS - 1))


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def number(value: float, digits: int = 1) -> str:
    """A value to read."""
    return f"{value:.{digits}f}"


def count(amount: int, noun: str) -> str:
    """`1 text`, `2 texts`."""
    return f"{amount:,} {noun}" + ("" if amount == 1 else "s")


_SHOWN = str.maketrans({" ": "·", "\n": "↵", "\r": "␍", "\t": "⇥"})
