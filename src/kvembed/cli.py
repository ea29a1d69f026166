"""The command line: parse, call, print. torch is imported inside the commands, so that `--help` is quick."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from .cli_corpus import bulk, index, search
from .cli_eval import evaluate, report
from .console import (
    hint_at_files,
    print_explanation,
    print_json,
    print_line,
    print_profile,
    print_similarity,
    print_tuned,
)
from .errors import InputError
from .extras import import_extra
from .files import check_writable, naming
from .methods import METHODS, preset
from .options import (
    BatchTokens,
    Bias,
    Devices,
    Dim,
    Dtype,
    Field,
    Fitted,
    IdField,
    Json,
    Layers,
    MaxTokens,
    Method,
    Model,
    Precision,
    RoleName,
    loader,
)
from .process import import_models, keep_freed_memory
from .terminal import in_a_terminal, one_line_errors
from .texts import read_texts, stream_rows
from .vectors import check_output, write_vectors

app = typer.Typer(
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Any frozen decoder-only language model as a text-embedding model, with no training.",
)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        from . import __version__

        print_line(__version__)
        raise typer.Exit


def embed(
    files: Annotated[
        list[Path] | None,
        typer.Argument(
            help=".txt (one text per line), .jsonl, .csv, .tsv or .parquet; none: standard input, one text per line."
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help=".npy, .jsonl or .parquet; none: .jsonl on standard output.")
    ] = None,
    field: Field = "text",
    id_field: IdField = None,
    model: Model = "smollm2",
    method: Method = None,
    layers: Layers = None,
    bias: Bias = None,
    dtype: Dtype = "auto",
    role: RoleName = "document",
    dim: Dim = None,
    fitted: Fitted = None,
    precision: Precision = "float32",
    max_tokens: MaxTokens = None,
    batch_tokens: BatchTokens = None,
    devices: Devices = None,
) -> None:
    """Embed texts: one unit vector each, in order."""
    with one_line_errors():
        check_output(output, with_ids=id_field is not None)
        for file in files or []:
            if output and output.exists() and file.exists() and output.samefile(file):
                raise InputError(f"{output} is an input too; it would be overwritten")
        rows, count = stream_rows(files or [], field, id_field)
        ids = None
        if id_field is not None:
            rows, again = itertools.tee(rows)  # an id waits until its vector is written
            ids = (row.id for row in again if row.id is not None)
        texts = (row.text for row in rows)
        load = loader(model, method, layers, bias, dtype, max_tokens, batch_tokens, dim, fitted)
        import_models()
        from .quantize import quantize
        from .workers import Recipe, encode_on, move_to_cpu, named_devices

        on = None if devices is None else named_devices(devices)
        embedder = load()
        dim = embedder.dim
        if on is None:
            pieces = embedder.encode_stream(texts, role=role, total=count, progress=True)
        else:
            recipe = Recipe.of(move_to_cpu(embedder), model)
            del embedder
            pieces = encode_on(on, recipe, texts, role=role, total=count, progress=True)
        small = (dataclasses.replace(x, vectors=quantize(x.vectors, precision)) for x in pieces)
        written = write_vectors(small, output, ids)
        if output is not None and str(output) != "-":
            print_line(f"{output}: {written:,} texts, {dim:,} dimensions")


def similarity(
    texts: Annotated[list[str] | None, typer.Argument(help="Texts; none: standard input, one a line.")] = None,
    query: Annotated[
        list[str] | None, typer.Option("--query", "-q", help="Rank the texts for this query; may be given again.")
    ] = None,
    top: Annotated[int, typer.Option("--top", min=1, help="How many texts a query shows, or pairs.")] = 5,
    as_json: Json = False,
    model: Model = "smollm2",
    method: Method = None,
    layers: Layers = None,
    bias: Bias = None,
    dtype: Dtype = "auto",
    role: RoleName = "document",
    dim: Dim = None,
    fitted: Fitted = None,
    max_tokens: MaxTokens = None,
    batch_tokens: BatchTokens = None,
) -> None:
    """Cosine similarity of every text with every other (of more than ten, the nearest pairs); or the texts nearest to
    each query.
    """
    with one_line_errors():
        hint_at_files(texts or [], "kvembed similarity < FILE")
        texts = texts or read_texts([])
        embedder = loader(model, method, layers, bias, dtype, max_tokens, batch_tokens, dim, fitted)()
        vectors = embedder.encode(texts, role=role)
        scores = embedder.similarity(embedder.encode_query(query) if query else vectors, vectors).tolist()
        print_similarity(texts, query, scores, top, as_json=as_json)


def layers(
    model: Model = "smollm2",
    method: Annotated[str, typer.Option("--method", help="Whose template the texts are put in.")] = "kv",
    dtype: Dtype = "auto",
    texts: Annotated[
        Path | None,
        typer.Option("--texts", help="Calibration texts (.txt, .jsonl, .csv, .parquet). Default: self-written."),
    ] = None,
    field: Field = "text",
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw the curve to an .svg or .png file.")] = None,
    as_json: Json = False,
) -> None:
    """Intrinsic dimension by layer, and the layers that re-routing takes by it."""
    with one_line_errors():
        from .plots import check_plot, plot_layers

        check_plot(plot)
        config = preset(method)
        if not config.forward_passes:
            raise InputError(f"method {method} runs no layer")
        given = None if texts is None else read_texts([texts], field)
        import_models()
        from .layers import profile_of

        template = config.templates("document")[0]
        profile = profile_of(model, template, texts=given, dtype=dtype, progress=True)
        if plot is not None:
            plot_layers(profile, plot)
        if as_json:
            print_line(profile.to_json().rstrip())
        else:
            print_profile(profile)


def explain(
    text: Annotated[str, typer.Argument(help="The text.")],
    as_json: Json = False,
    model: Model = "smollm2",
    method: Method = None,
    layers: Layers = None,
    bias: Bias = None,
    dtype: Dtype = "auto",
    role: RoleName = "document",
    fitted: Fitted = None,
    max_tokens: MaxTokens = None,
) -> None:
    """What happens to a text: prompt, tokens, layers, and how much each token reads the slot (beta)."""
    with one_line_errors():
        hint_at_files([text], 'kvembed explain "$(cat FILE)"')
        embedder = loader(model, method, layers, bias, dtype, max_tokens, fitted=fitted)()
        explanation = embedder.explain(text, role=role)
        if as_json:
            print_json(explanation.to_dict())
        else:
            print_explanation(explanation)


def tune(
    model: Annotated[str, typer.Argument(help="smollm2, a hub id, a folder or a .gguf file.")] = "smollm2",
    texts: Annotated[
        Path | None,
        typer.Option("--texts", help="Your unlabelled texts (.txt, .jsonl, .csv, .parquet). Default: self-written."),
    ] = None,
    field: Field = "text",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Also write the transform here (.safetensors), for --fitted.")
    ] = None,
    method: Annotated[str, typer.Option("--method", help="A method with a transform.")] = "auto",
    layers: Layers = None,
    bias: Bias = None,
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Fit a method's transform to a model, with no labels: once, in minutes; a stopped run goes on where it was."""
    with one_line_errors("what is done is kept, and the same command goes on"):
        if preset(method).transform == "none":
            others = " and ".join(name for name, config in METHODS.items() if config.transform != "none")
            raise InputError(f"{method} has nothing to fit; {others} have")
        if output is not None:
            if output.suffix != ".safetensors":
                raise InputError(f"{output}: a transform is a .safetensors file")
            check_writable(output)
        given = None if texts is None else read_texts([texts], field)
        embedder = loader(model, method, layers, bias, dtype)(texts=given)
        if output is not None and embedder.transform is not None:
            with naming(output):
                embedder.transform.save(output)
        print_tuned(embedder, model, output, as_json=as_json)


def serve(
    model: Annotated[str, typer.Argument(help="smollm2, a hub id, a folder or a .gguf file.")] = "smollm2",
    name: Annotated[
        list[str] | None, typer.Option("--name", help="What clients call it; may be given again. Default: its own.")
    ] = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: a free one, which the log names.")] = 8000,
    keys: Annotated[
        Path | None, typer.Option("--keys", help="File of API keys, one a line. Default: $KVEMBED_API_KEYS, or none.")
    ] = None,
    queue_tokens: Annotated[
        int, typer.Option("--queue-tokens", min=1, help="Tokens that may wait; beyond, clients are told to come back.")
    ] = 2**18,
    method: Method = None,
    layers: Layers = None,
    bias: Bias = None,
    dtype: Dtype = "auto",
    dim: Dim = None,
    fitted: Fitted = None,
    max_tokens: MaxTokens = None,
    batch_tokens: BatchTokens = None,
) -> None:
    """Serve OpenAI's embeddings API, and a page to try it; Ctrl-C or SIGTERM ends it when all is answered."""
    with one_line_errors():
        for module in ("fastapi", "uvicorn", "orjson", "prometheus_client"):
            import_extra(module, "server")
        import_models()
        from .models import label
        from .server import api_keys, listen_at, serve
        from .service import Limits, check_names

        names = name or [label(model)]
        check_names(names)
        known = api_keys(keys)
        listener = listen_at(host, port)
        embedder = loader(model, method, layers, bias, dtype, max_tokens, batch_tokens, dim, fitted)()
        limits = Limits(queue_tokens=queue_tokens)
        serve(embedder, names, listener, keys=known, limits=limits)


def pull(
    model: Annotated[str, typer.Argument(help="smollm2, a hub id, a folder or a .gguf file.")] = "smollm2",
) -> None:
    """Make a model ready to use without the network; prints its folder."""
    with one_line_errors():
        import_models()
        from . import models

        print_line(str(models.pull(model)))


_COMMANDS: dict[str, Callable[..., None]] = {
    "embed": embed,
    "bulk": bulk,
    "index": index,
    "search": search,
    "similarity": similarity,
    "layers": layers,
    "explain": explain,
    "tune": tune,
    "eval": evaluate,
    "report": report,
    "serve": serve,
    "pull": pull,
}
for _name, _command in _COMMANDS.items():
    app.command(_name)(_command)


def main() -> None:
    """The `kvembed` command."""
    keep_freed_memory()
    with in_a_terminal():
        app()
