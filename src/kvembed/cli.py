"""The command line: parse, call, print. torch is imported inside the commands, so that `--help` is quick."""

from __future__ import annotations

import _thread
import contextlib
import io
import json
import logging
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .errors import InputError, KvembedError

if TYPE_CHECKING:
    from .embedder import Embedder, Explanation

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Any frozen decoder-only language model as a text-embedding model, with no training.",
)

Model = Annotated[str, typer.Option("--model", help="smollm2, a hub id, a folder or a .gguf file.")]
Method = Annotated[
    str | None,
    typer.Option("--method", help="kv, last, mean, weighted-mean, prompt-eol. Default: the folder's own, or kv."),
]
Layers = Annotated[str | None, typer.Option("--layers", help="Layers to re-route: 6-9 or 4,5,10 or none or auto.")]
Bias = Annotated[float | None, typer.Option("--bias", help="Bias of the slot's logit; the paper's is 1.")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]
Role = Annotated[Literal["document", "query"], typer.Option("--role", help="Which template.")]
MaxTokens = Annotated[int | None, typer.Option("--max-tokens", help="Cut longer texts. Default: the model's limit.")]
BatchTokens = Annotated[int | None, typer.Option("--batch-tokens", help="Padded tokens in a batch.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        from . import __version__

        _print(__version__)
        raise typer.Exit


@app.command()
def embed(
    files: Annotated[
        list[Path] | None,
        typer.Argument(help=".txt (one text a line), .jsonl, .csv or .parquet; none: standard input, one text a line."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help=".npy, .jsonl or .parquet; none: .jsonl on standard output.")
    ] = None,
    field: Annotated[str, typer.Option("--field", help="Key or column that holds the text.")] = "text",
    model: Model = "smollm2",
    method: Method = None,
    layers: Layers = None,
    bias: Bias = None,
    dtype: Dtype = "auto",
    role: Role = "document",
    max_tokens: MaxTokens = None,
    batch_tokens: BatchTokens = None,
) -> None:
    """Embed texts: one unit vector each, in order."""
    with _one_line_errors():
        from .files import check_output, read_texts, write_vectors

        check_output(output)
        for file in files or []:
            if output and output.exists() and file.exists() and output.samefile(file):
                raise InputError(f"{output} is an input too; it would be overwritten")
        texts = read_texts(files or [], field)
        embedder = _embedder(model, method, layers, bias, dtype, max_tokens, batch_tokens)
        write_vectors(embedder.encode_with_report(texts, role=role, progress=True), output)


@app.command()
def similarity(
    texts: Annotated[list[str] | None, typer.Argument(help="Texts; none: standard input, one a line.")] = None,
    query: Annotated[
        list[str] | None, typer.Option("--query", "-q", help="Rank the texts for this query; may be given again.")
    ] = None,
    top: Annotated[int, typer.Option("--top", min=1, help="How many texts a query shows.")] = 5,
    as_json: Json = False,
    model: Model = "smollm2",
    method: Method = None,
    layers: Layers = None,
    bias: Bias = None,
    dtype: Dtype = "auto",
    role: Role = "document",
    max_tokens: MaxTokens = None,
    batch_tokens: BatchTokens = None,
) -> None:
    """Cosine similarity of every text with every other, or the texts nearest to each query."""
    with _one_line_errors():
        from .files import read_texts

        texts = texts or read_texts([])
        embedder = _embedder(model, method, layers, bias, dtype, max_tokens, batch_tokens)
        vectors = embedder.encode(texts, role=role)
        rows = query or texts
        scores = embedder.similarity(embedder.encode_query(query) if query else vectors, vectors).tolist()
        ranked = [sorted(range(len(texts)), key=row.__getitem__, reverse=True)[:top] for row in scores]
        if as_json and query:
            hits = [
                [{"text": texts[i], "score": row[i]} for i in best] for row, best in zip(scores, ranked, strict=True)
            ]
            _print_json([{"query": text, "hits": found} for text, found in zip(rows, hits, strict=True)])
        elif as_json:
            _print_json({"texts": texts, "similarity": scores})
        elif query:
            for text, row, best in zip(rows, scores, ranked, strict=True):
                _print_table(["score", f"nearest to: {text}"], [[f"{row[i]:.3f}", texts[i]] for i in best])
        else:
            body = [[str(i), *(f"{x:.3f}" for x in row), texts[i]] for i, row in enumerate(scores)]
            _print_table(["", *(str(i) for i in range(len(texts))), "text"], body)


@app.command()
def layers(
    model: Model = "smollm2",
    method: Annotated[str, typer.Option("--method", help="Whose template the texts are put in.")] = "kv",
    dtype: Dtype = "auto",
    texts: Annotated[
        Path | None,
        typer.Option("--texts", help="Calibration texts (.txt, .jsonl, .csv, .parquet). None: self-written."),
    ] = None,
    field: Annotated[str, typer.Option("--field", help="Key or column that holds the text.")] = "text",
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw the curve to an .svg or .png file.")] = None,
    as_json: Json = False,
) -> None:
    """Intrinsic dimension by layer, and the layers that re-routing takes by it."""
    with _one_line_errors():
        from .files import read_texts
        from .plots import check_plot, plot_layers

        check_plot(plot)
        given = None if texts is None else read_texts([texts], field)
        _quiet()
        from .layers import profile_of
        from .methods import preset

        config = preset(method)
        profile = profile_of(model, config.document, texts=given, dtype=dtype, progress=True)
        if plot is not None:
            plot_layers(profile, plot)
        if as_json:
            _print(profile.to_json().rstrip())
            return
        widest = max(profile.curve)
        body = [
            [
                str(layer) + (" *" if layer in profile.layers else ""),
                f"{value:.2f}",
                "#" * round(30 * value / widest) + ("" if layer in profile.attention_layers else "  (no attention)"),
            ]
            for layer, value in enumerate(profile.curve)
        ]
        _print_table(["layer", "ID", f"{profile.model}, {profile.count} {profile.texts} texts"], body)
        chosen = ",".join(map(str, profile.layers))
        _print(f"* re-routed. To use them anywhere: --layers {chosen}")


@app.command()
def explain(
    text: Annotated[str, typer.Argument(help="The text.")],
    as_json: Json = False,
    model: Model = "smollm2",
    method: Method = None,
    layers: Layers = None,
    bias: Bias = None,
    dtype: Dtype = "auto",
    role: Role = "document",
    max_tokens: MaxTokens = None,
) -> None:
    """What happens to a text: prompt, tokens, layers, and how much each token reads the slot (beta)."""
    with _one_line_errors():
        embedder = _embedder(model, method, layers, bias, dtype, max_tokens, None)
        explanation = embedder.explain(text, role=role)
        if as_json:
            _print_json(explanation.to_dict())
        else:
            _print_explanation(explanation)


@app.command()
def pull(
    model: Annotated[str, typer.Argument(help="smollm2, a hub id, a folder or a .gguf file.")] = "smollm2",
    revision: Annotated[str | None, typer.Option("--revision", help="Of a hub id.")] = None,
) -> None:
    """Make a model ready to use without the network; prints its folder."""
    with _one_line_errors():
        _quiet()
        from . import models

        _print(str(models.pull(model, revision=revision)))


def main() -> None:
    """The `kvembed` command."""
    sys.unraisablehook = _interrupt_again
    if sys.stdout is None:  # closed by whoever started us
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (lives as long as the process)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that can't show a letter is no reason to stop
    with contextlib.suppress(BrokenPipeError):
        app()
    # A reader such as `head` closed the pipe: nothing more to say, and nothing to flush at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _interrupt_again(event: Any) -> None:
    """Python drops a Ctrl-C that lands in a finaliser, as it may during seconds of imports: send it once more."""
    if issubclass(event.exc_type, KeyboardInterrupt):
        threading.Timer(0.1, _thread.interrupt_main).start()
    else:
        sys.__unraisablehook__(event)


def _embedder(
    model: str,
    method: str | None,
    layers: str | None,
    bias: float | None,
    dtype: str,
    max_tokens: int | None,
    batch_tokens: int | None,
) -> Embedder:
    options: dict[str, Any] = {"bias": bias, "max_tokens": max_tokens}
    options = {name: value for name, value in options.items() if value is not None}
    if layers is not None:
        options["layers"] = _parse_layers(layers)
    from .methods import preset

    preset(method or "kv", **options)  # a bad option is told before seconds of imports
    _quiet()
    from .embedder import Embedder

    return Embedder.from_pretrained(
        model, method=method, dtype=dtype, batch_tokens=batch_tokens, progress=True, **options
    )


def _parse_layers(text: str) -> tuple[int, ...] | None:
    """`6-9`, `4,5,10-12`, `none` or `auto`."""
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
        raise InputError(f"--layers takes 6-9 or 4,5,10 or none or auto, not {text!r}")
    return tuple(chosen)


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    """Whatever goes wrong, one line on standard error and a non-zero exit; KVEMBED_DEBUG=1 shows where."""
    logger = logging.getLogger("kvembed")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("kvembed: %(message)s"))
    before = logger.handlers, logger.level, logger.propagate
    logger.handlers, logger.level, logger.propagate = [handler], logging.INFO, False
    try:
        yield
    except KeyboardInterrupt:
        logger.error("interrupted")
        raise typer.Exit(130) from None
    except (BrokenPipeError, typer.Exit):
        raise
    except Exception as error:
        if os.environ.get("KVEMBED_DEBUG"):
            raise
        text = " ".join(str(error).split())
        known = isinstance(error, KvembedError)
        logger.error(text if known else f"unexpected {type(error).__name__}: {text} (KVEMBED_DEBUG=1 shows more)")
        raise typer.Exit(1) from None
    finally:
        logger.handlers, logger.level, logger.propagate = before


def _quiet() -> None:
    """transformers' own warnings are not ours to show."""
    from transformers.utils import logging as theirs

    theirs.set_verbosity_error()


def _print(text: str) -> None:
    sys.stdout.write(text + "\n")


def _print_json(value: Any) -> None:
    _print(json.dumps(value, ensure_ascii=False))


def _print_table(head: list[str], body: list[list[str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    table = Table(*(Column(Text(name)) for name in head), box=box.SIMPLE)  # Text: "[...]" in a text is not markup
    for row in body:
        table.add_row(*map(Text, row))
    Console().print(table)


def _print_explanation(explanation: Explanation) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    config, beta = explanation.config, explanation.beta
    mean = [sum(column) / len(beta) for column in zip(*beta.values(), strict=True)] if beta else []
    top = max(mean, default=0.0)
    first, end = explanation.span
    line = Text()
    for i, token in enumerate(explanation.tokens):
        style = (
            f"black on rgb(255,{255 - round(160 * mean[i] / top)},{255 - round(220 * mean[i] / top)})" if top else ""
        )
        line.append(token.replace("\n", "\\n"), style + (" underline" if first <= i < end else ""))
    console.print(line)
    cut = f", {explanation.tokens_cut} cut" if explanation.tokens_cut else ""
    _print(f"tokens    {len(explanation.tokens)}; the text's own {end - first} are underlined{cut}")
    _print(f"method    {config.method}: {config.pooling} pooling, bias {config.bias:g}, config {config.hash()}")
    if not beta:
        _print("layers    none re-routed")
        return
    _print(f"layers    {', '.join(map(str, beta))} re-routed")
    _print(
        f"beta      share of attention on the slot, mean {sum(mean) / len(mean):.3f}; the deeper the colour the more"
    )
    order = sorted(range(len(mean)), key=lambda i: -mean[i])[:8]
    body = [
        [repr(explanation.tokens[i])[1:-1], f"{mean[i]:.3f}", *(f"{values[i]:.3f}" for values in beta.values())]
        for i in order
    ]
    _print_table(["token", "mean beta", *(f"layer {layer}" for layer in beta)], body)
