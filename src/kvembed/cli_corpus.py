"""The commands for collections of texts: bulk, index and search."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .console import check_run_ids, print_bulk, print_hits, print_indexed
from .errors import InputError
from .extras import import_extra
from .methods import METHODS, preset
from .options import (
    METHOD_HELP,
    BatchTokens,
    Bias,
    Devices,
    Dim,
    Dtype,
    Field,
    Fitted,
    IdField,
    Layers,
    MaxTokens,
    Method,
    Model,
    RoleName,
    loader,
    parse_layers,
)
from .process import import_models
from .terminal import one_line_errors
from .texts import read_rows

if TYPE_CHECKING:
    from .embedder import Embedder

__all__ = ["bulk", "index", "search"]


def bulk(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="IN",
            help=".parquet, .jsonl, .ndjson, .csv, .tsv, one text per line, or a folder of the first five.",
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the shards: new, empty, or of the same job.")],
    field: Field = "text",
    id_field: IdField = None,
    shard_rows: Annotated[int, typer.Option("--shard-rows", min=1, help="Rows of a shard.")] = 10_000,
    engine: Annotated[
        Literal["local", "ray"], typer.Option("--engine", help="This process, or a pool of actors on Ray Data.")
    ] = "local",
    address: Annotated[
        str | None,
        typer.Option("--address", help="Address of a running Ray cluster. Default: Ray starts on this machine."),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option("--workers", min=1, help="Ray actors at most. Default: one per GPU, or else one per node."),
    ] = None,
    devices: Devices = None,
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
    """Embed millions of texts to Parquet shards; a stopped job, run again, goes on where it was."""
    with one_line_errors("shards that are done are kept, and the same command goes on"):
        if engine == "local" and (address or workers):
            raise InputError("--address and --workers need --engine ray")
        if engine == "ray" and devices is not None:
            raise InputError("--devices is for this machine alone; with --engine ray, say --workers")
        from .shards import check_folders

        check_folders(source, out)
        if engine == "ray":
            import_extra("ray.data", "ray")
        options = (model, method, layers, bias, dtype, max_tokens, batch_tokens, dim)
        load = loader(*options, fitted)
        import_models()
        from .bulk import bulk as run_bulk
        from .bulk import kept_fit
        from .models import label
        from .workers import move_to_cpu, named_devices

        def load_for_job() -> Embedder:
            has_transform = method is None or preset(method).transform != "none"
            if fitted is not None or not has_transform or (kept := kept_fit(out)) is None:
                return load()
            try:
                return loader(*options, kept)()
            except InputError as error:
                raise InputError(f"{out} holds a job with a fit of its own ({kept.name}): {error}") from None

        run = None
        if engine == "ray":
            from .bulk_ray import ray_engine

            run = ray_engine(model, address=address, workers=workers)
        elif devices is not None:
            from .bulk_devices import devices_engine

            run = devices_engine(named_devices(devices), model)
        summary = run_bulk(
            load_for_job if run is None else lambda: move_to_cpu(load_for_job()),
            source,
            out,
            model=label(model),
            field=field,
            id_field=id_field,
            role=role,
            shard_rows=shard_rows,
            engine=run,
            progress=True,
        )
        print_bulk(summary, out)


def index(
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="PATH", help="Text, Markdown, .jsonl, .csv, .tsv, .parquet files, and folders of them."),
    ],
    db: Annotated[Path, typer.Option("--db", help="Folder of the index: new, empty, or with an index.")],
    field: Field = "text",
    id_field: Annotated[
        str | None, typer.Option("--id-field", help="Key or column that holds the id. Default: a hash of the content.")
    ] = None,
    lines: Annotated[
        bool,
        typer.Option("--lines", help="In plain text each line is a document, not each passage of whole paragraphs."),
    ] = False,
    language: Annotated[
        str | None,
        typer.Option("--language", help="Language of the word stems that text search uses, or none. Default: English."),
    ] = None,
    refit: Annotated[
        bool, typer.Option("--refit", help="Choose model, config and transform anew, and embed everything anew.")
    ] = False,
    model: Annotated[
        str | None,
        typer.Option("--model", help="smollm2, a hub id, a folder or a .gguf file. Default: the index's own."),
    ] = None,
    method: Annotated[
        str | None, typer.Option("--method", help=f"{METHOD_HELP} Default: the index's own, or auto.")
    ] = None,
    layers: Layers = None,
    bias: Bias = None,
    dtype: Dtype = "auto",
    dim: Dim = None,
    fitted: Annotated[
        Path | None,
        typer.Option("--fitted", help="A transform that `kvembed tune -o` wrote. Default: fitted on the texts."),
    ] = None,
    max_tokens: MaxTokens = None,
    batch_tokens: BatchTokens = None,
) -> None:
    """Make documents searchable, or bring an index up to date: what changed is embedded, what is gone is removed."""
    with one_line_errors("what is done is kept, and the same command goes on"):
        import_models()
        from .documents import Corpus
        from .index import Index
        from .indexing import check_language
        from .saved import default_method

        check_language(language)
        filled = Index.is_filled(db)
        there = filled and not refit
        before = Index.open(db) if filled and refit else None
        base = None
        if before and model is None:  # what is not said stays as it was
            model, dtype = before.model, before.made_with["dtype"] if dtype == "auto" else dtype
            base = before.config if method is None else None
        name = model or "smollm2"
        if there:
            index = Index.open(db, model=model, batch_tokens=batch_tokens)
            options: dict[str, Any] = {}
            if method is not None:  # a file may have been changed since, in any field
                options = {"method": method} if method in METHODS else preset(method).to_dict()
            said = {"bias": bias, "dim": dim, "max_tokens": max_tokens}
            options |= {name: value for name, value in said.items() if value is not None}
            if layers is not None:
                options["layers"] = parse_layers(layers)
            index.check_options(dtype=None if dtype == "auto" else dtype, fitted=fitted, **options)
            if model is not None:
                index.check_model()  # now: there may be no text to embed with it
        else:
            Index.check_folder(db)
            method = method or default_method(name)
            config = base or (None if method is None else preset(method))
            load = loader(name, method, layers, bias, dtype, max_tokens, batch_tokens, dim, fitted, base)
        corpus = Corpus(paths, field=field, id_field=id_field, lines=lines, may_be_gone=there, progress=True)
        if not there:
            corpus.check_not_empty()
            if before:
                before.check_covered(corpus)
            is_fitted = config is not None and config.transform != "none" and fitted is None
            embedder = load(texts=corpus.calibration() if is_fitted else None)
            index = Index.create(db, embedder, model=name, refit=refit)
        print_indexed(index.update(corpus, language=language, progress=True), db)


def search(
    question: Annotated[str | None, typer.Argument(help="What to look for.")] = None,
    db: Annotated[Path, typer.Option("--db", help="Folder of the index.")] = ...,  # type: ignore[assignment]
    top: Annotated[int, typer.Option("--top", min=1, help="How many documents.")] = 10,
    mode: Annotated[
        Literal["vector", "text", "hybrid"],
        typer.Option("--mode", help="By meaning, by words, or both rankings put together."),
    ] = "hybrid",
    where: Annotated[
        str | None, typer.Option("--where", help="Condition in SQL: \"lang = 'de' AND year > 2020\".")
    ] = None,
    queries: Annotated[
        Path | None,
        typer.Option(
            "--queries", help="Many questions instead: .txt (one a line), .jsonl, .csv, .parquet, - for stdin."
        ),
    ] = None,
    field: Annotated[str, typer.Option("--field", help="Key or column of --queries that holds the text.")] = "text",
    id_field: Annotated[
        str | None, typer.Option("--id-field", help="Key or column of --queries that holds the id. Default: 0, 1, ...")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines, one a hit.")] = False,
    as_trec: Annotated[bool, typer.Option("--trec", help="Print a run file of TREC.")] = False,
    model: Annotated[
        str | None, typer.Option("--model", help="Where the index's model is now, if it has been moved.")
    ] = None,
) -> None:
    """Find the documents nearest to a question, by the model and config that made the index."""
    with one_line_errors():
        if question is None and queries is None:
            raise InputError("say what to look for: a question, or --queries FILE")
        if question is not None and queries is not None:
            raise InputError("a question or --queries, not both")
        if as_json and as_trec:
            raise InputError("--json or --trec, not both")
        import_models()
        from .index import Index

        index = Index.open(db, model=model)
        if queries is None:
            keys, asked = ["0"], [question or ""]
        else:
            numbered = enumerate(read_rows(queries, field, id_field))  # empty ones too, as everywhere
            rows = [(str(n if row.id is None else row.id), row.text) for n, row in numbered if row.text.strip()]
            if not rows:
                raise InputError(f"{queries} holds no queries")
            keys, asked = [key for key, _ in rows], [text for _, text in rows]
        if as_trec:
            check_run_ids(keys)
            if twice := [key for key, times in Counter(keys).items() if times > 1]:
                raise InputError(f"{queries}: two queries have the id {twice[0]!r}, which a run file can't tell apart")
        found = index.search_many(asked, top=top, mode=mode, where=where)
        if not any(found) and not len(index):
            logging.getLogger("kvembed").warning("%s has no documents yet; kvembed index puts them in", db)
        form: Literal["table", "json", "trec"] = "json" if as_json else "trec" if as_trec else "table"
        print_hits(list(zip(keys, asked, found, strict=True)), mode, form)
