"""The options that commands share; and of those that say which embedder: read, checked, and what loads it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .errors import InputError
from .methods import METHODS, preset
from .process import import_models

if TYPE_CHECKING:
    from .config import EmbedConfig
    from .embedder import Embedder

__all__ = [
    "METHOD_HELP",
    "BatchTokens",
    "Bias",
    "Devices",
    "Dim",
    "Dtype",
    "Field",
    "Fitted",
    "IdField",
    "Json",
    "Layers",
    "MaxTokens",
    "Method",
    "Model",
    "Precision",
    "RoleName",
    "loader",
    "parse_layers",
]

METHOD_HELP = f"{', '.join(METHODS)}, or a config's .json file."
Model = Annotated[str, typer.Option("--model", help="smollm2, a hub id, a folder or a .gguf file.")]
Method = Annotated[
    str | None,
    typer.Option("--method", help=f"{METHOD_HELP} Default: the one saved with the model, or auto."),
]
Layers = Annotated[
    str | None, typer.Option("--layers", help="Layers to re-route: 6-9 or 4,5,10 or none or all or auto.")
]
Bias = Annotated[float | None, typer.Option("--bias", help="Bias of the slot's logit; the paper's is 1.")]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option("--dtype", help="Of the weights. Auto: bfloat16, or float32 where the processor can't multiply it."),
]
RoleName = Annotated[
    Literal["document", "query"], typer.Option("--role", help="What the texts are: documents, or search queries.")
]
MaxTokens = Annotated[int | None, typer.Option("--max-tokens", help="Cut longer texts. Default: the model's limit.")]
BatchTokens = Annotated[
    int | None, typer.Option("--batch-tokens", min=1, help="Tokens in a batch. Default: 2048 on a CPU, 16384 on a GPU.")
]
Precision = Annotated[
    Literal["float32", "int8", "binary"],
    typer.Option("--precision", help="int8: one byte per dimension. binary: one bit, for Hamming distance."),
]
Dim = Annotated[int | None, typer.Option("--dim", min=1, help="Keep the best dimensions of a method that orders them.")]
Fitted = Annotated[
    Path | None,
    typer.Option(
        "--fitted", help="A transform that `kvembed tune -o` wrote. Default: one fitted on self-written text."
    ),
]
Devices = Annotated[
    str | None,
    typer.Option("--devices", help="A process on each: cuda:0,cuda:1 or cpu,cpu. Default: one device, this process."),
]
Field = Annotated[str, typer.Option("--field", help="Key or column that holds the text.")]
IdField = Annotated[
    str | None, typer.Option("--id-field", help="Key or column that holds the id. Default: row numbers, from 0.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


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
    base: EmbedConfig | None = None,
) -> Callable[..., Embedder]:
    """What loads the model, given `Embedder.from_pretrained`'s `texts=` or nothing; a bad option is told at once.

    Args:
        layers: as `parse_layers` reads them.
        method: None: `auto`, or a saved folder's own.
        base: a config that options change, instead of a method's.
        model, bias, dtype, max_tokens, batch_tokens, dim, fitted: as `Embedder.from_pretrained` has them; None: not
            said.

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
    if fitted is not None:
        import_models()
        from .transform import Transform

        Transform.load(fitted)

    def load(texts: list[str] | None = None) -> Embedder:
        import_models()
        from .embedder import Embedder
        from .saved import default_method, saved_config

        chosen = base or method or default_method(model)
        if bias is not None:  # before a transform is fitted, for minutes
            config = preset(chosen or saved_config(model) or "auto", **options)
            if config.layers == () or config.attention != "reroute":
                raise InputError(f"--bias has no effect: method {config.method} re-routes nothing")
        return Embedder.from_pretrained(
            model,
            method=chosen,
            dtype=dtype,
            batch_tokens=batch_tokens,
            fitted=fitted,
            texts=texts,
            progress=True,
            **options,
        )

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
            stretch = range(int(first), min(int(last or first), 9999) + 1)  # no model is as deep
            if not stretch:
                raise ValueError
            chosen += stretch
    except ValueError:
        chosen = []
    if not chosen:
        raise InputError(f"--layers takes 6-9 or 4,5,10 or none or all or auto, not {text!r}")
    return tuple(chosen)
