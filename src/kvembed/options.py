"""The options that say which embedder, as the commands and `serve run` have them: read, checked, and what loads it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .errors import InputError
from .methods import preset
from .process import import_models

if TYPE_CHECKING:
    from .config import EmbedConfig
    from .embedder import Embedder

__all__ = ["loader", "parse_layers"]


def loader(
    model: str,
    method: str | None,
    layers: str | None,
    bias: float | None,
    dtype: str,
    max_tokens: int | None = None,
    batch_tokens: int | None = None,
    dim: int | None = None,
    fitted: Path | None = None,
    texts: list[str] | None = None,
    revision: str | None = None,
    base: EmbedConfig | None = None,
) -> Callable[[], Embedder]:
    """What loads the model; a bad option is told at once, before seconds of imports.

    Args:
        layers: as `parse_layers` reads them.
        method: None: `auto`, or a saved folder's own.
        base: a config that options change, instead of a method's.
        model, bias, dtype, max_tokens, batch_tokens, dim, fitted, texts, revision: as `Embedder.from_pretrained` has
            them; None: not said.

    Raises:
        InputError: an option that is wrong, or that the method does nothing with; the model's own when it is loaded.
    """
    options: dict[str, Any] = {"bias": bias, "max_tokens": max_tokens, "dim": dim}
    options = {name: value for name, value in options.items() if value is not None}
    if layers is not None:
        options["layers"] = parse_layers(layers)
    checked = preset(base or method or "auto", **options)
    if layers is not None and not checked.forward_passes:
        raise InputError(f"--layers: method {checked.method} runs no layer")

    def load() -> Embedder:
        import_models()
        from .embedder import Embedder
        from .saved import default_method

        embedder = Embedder.from_pretrained(
            model,
            method=base or method or default_method(model, revision=revision),
            dtype=dtype,
            batch_tokens=batch_tokens,
            fitted=fitted,
            texts=texts,
            revision=revision,
            progress=True,
            **options,
        )
        if bias is not None and not (embedder.config.layers and embedder.config.attention == "reroute"):
            raise InputError(f"--bias is the slot's, and method {embedder.config.method} re-routes nothing")
        return embedder

    return load


def parse_layers(text: str) -> tuple[int, ...] | Literal["all"] | None:
    """`layers` as the command line has them: `6-9`, `4,5,10-12`, `none`, `all` or `auto`. Raises `InputError`."""
    if text == "all":
        return "all"
    if text in ("none", "auto"):
        return () if text == "none" else None
    chosen: list[int] = []
    try:
        for part in text.split(","):
            first, _, last = part.partition("-")
            chosen += range(int(first), min(int(last or first), 9999) + 1)  # no model is as deep
    except ValueError:
        chosen = []
    if not chosen:
        raise InputError(f"--layers takes 6-9 or 4,5,10 or none or all or auto, not {text!r}")
    return tuple(chosen)
