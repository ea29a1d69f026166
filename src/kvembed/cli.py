"""The command line: parse, call, print. torch is imported inside the commands, so that `--help` is quick."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .console import (
    hint_at_files,
    print_bulk,
    print_explanation,
    print_hits,
    print_indexed,
    print_json,
    print_line,
    print_profile,
    print_results,
    print_similarity,
    print_table,
    print_tuned,
)
from .errors import InputError
from .extras import import_extra
from .files import atomic_write, check_writable, naming
from .methods import METHODS, preset
from .options import loader, parse_layers
from .process import import_models, keep_freed_memory
from .terminal import in_a_terminal, one_line_errors
from .texts import read_rows, read_texts, stream_rows
from .vectors import check_output, write_vectors

app = typer.Typer(
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Any frozen decoder-only language model as a text-embedding model, with no training.",
)

Model = Annotated[str, typer.Option("--model", help="smollm2, a hub id, a folder or a .gguf file.")]
Method = Annotated[
    str | None,
    typer.Option("--method", help=f"{', '.join(METHODS)}. Default: the one saved with the model, or auto."),
]
Layers = Annotated[
    str | None, typer.Option("--layers", help="Layers to re-route: 6-9 or 4,5,10 or none or all or auto.")
]
Bias = Annotated[float | None, typer.Option("--bias", help="Bias of the slot's logit; the paper's is 1.")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]
Role = Annotated[Literal["document", "query"], typer.Option("--role", help="Which template.")]
MaxTokens = Annotated[int | None, typer.Option("--max-tokens", help="Cut longer texts. Default: the model's limit.")]
BatchTokens = Annotated[int | None, typer.Option("--batch-tokens", help="Tokens in a batch.")]
Precision = Annotated[
    Literal["float32", "int8", "binary"],
    typer.Option("--precision", help="int8: a byte a dimension. binary: a bit, for Hamming distance."),
]
Dim = Annotated[int | None, typer.Option("--dim", min=1, help="Keep the best dimensions of a method that orders them.")]
Fitted = Annotated[
    Path | None, typer.Option("--fitted", help="A transform that `kvembed tune -o` wrote. None: the stored one.")
]
Devices = Annotated[
    str | None,
    typer.Option("--devices", help="A process on each: cuda:0,cuda:1 or cpu,cpu. None: one device, this process."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        from . import __version__

        print_line(__version__)
        raise typer.Exit


@app.command()
def embed(
    files: Annotated[
        list[Path] | None,
        typer.Argument(
            help=".txt (a text a line), .jsonl, .csv, .tsv or .parquet; none: standard input, a text a line."
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help=".npy, .jsonl or .parquet; none: .jsonl on standard output.")
    ] = None,
    field: Annotated[str, typer.Option("--field", help="Key or column that holds the text.")] = "text",
    id_field: Annotated[
        str | None, typer.Option("--id-field", help="Key or column that holds the id. None: row numbers, from 0.")
    ] = None,
    model: Model = "smollm2",
    method: Method = None,
    layers: Layers = None,
    bias: Bias = None,
    dtype: Dtype = "auto",
    role: Role = "document",
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
        embedder = loader(model, method, layers, bias, dtype, max_tokens, batch_tokens, dim, fitted)()
        from .quantize import quantize
        from .workers import Recipe, encode_on, move_to_cpu

        if devices is None:
            pieces = embedder.encode_stream(texts, role=role, total=count, progress=True)
        else:
            recipe = Recipe.of(move_to_cpu(embedder), model)
            del embedder
            pieces = encode_on(devices.split(","), recipe, texts, role=role, total=count, progress=True)
        small = (dataclasses.replace(x, vectors=quantize(x.vectors, precision)) for x in pieces)
        write_vectors(small, output, ids)


@app.command("bulk")
def bulk_command(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="IN", help=".parquet, .jsonl, .ndjson, .csv, .tsv, a text a line, or a folder of the first five."
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the shards: new, empty, or of the same job.")],
    field: Annotated[str, typer.Option("--field", help="Key or column that holds the text.")] = "text",
    id_field: Annotated[
        str | None, typer.Option("--id-field", help="Key or column that holds the id. None: row numbers, from 0.")
    ] = None,
    shard_rows: Annotated[int, typer.Option("--shard-rows", min=1, help="Rows of a shard.")] = 10_000,
    engine: Annotated[
        Literal["local", "ray"], typer.Option("--engine", help="This process, or a pool of actors on Ray Data.")
    ] = "local",
    address: Annotated[
        str | None, typer.Option("--address", help="Of a running Ray cluster. None: Ray starts on this machine.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="Ray actors at most. None: one a GPU, or else one a node.")
    ] = None,
    devices: Devices = None,
    model: Model = "smollm2",
    method: Method = None,
    layers: Layers = None,
    bias: Bias = None,
    dtype: Dtype = "auto",
    role: Role = "document",
    dim: Dim = None,
    fitted: Fitted = None,
    max_tokens: MaxTokens = None,
    batch_tokens: BatchTokens = None,
) -> None:
    """Embed millions of texts to Parquet shards; a stopped job, run again, goes on where it was."""
    with one_line_errors("shards that are done are kept, and the same command goes on"):
        if engine == "local" and (address or workers):
            raise InputError("--address and --workers need --engine ray")
        if engine == "ray" and devices:
            raise InputError("--devices is for this machine alone; with --engine ray, say --workers")
        from .shards import check_folders

        check_folders(source, out)
        if engine == "ray":
            import_extra("ray.data", "ray")
        load = loader(model, method, layers, bias, dtype, max_tokens, batch_tokens, dim, fitted)
        import_models()
        from .bulk import bulk
        from .workers import move_to_cpu

        run = None
        if engine == "ray":
            from .bulk_ray import ray_engine

            run = ray_engine(model, address=address, workers=workers)
        elif devices:
            from .bulk_devices import devices_engine

            run = devices_engine(devices.split(","), model)
        summary = bulk(
            load if run is None else lambda: move_to_cpu(load()),
            source,
            out,
            model=_label(model),
            field=field,
            id_field=id_field,
            role=role,
            shard_rows=shard_rows,
            engine=run,
            progress=True,
        )
        print_bulk(summary, out)


@app.command("index")
def index_command(
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="PATH", help="Text, Markdown, .jsonl, .csv, .tsv, .parquet files, and folders of them."),
    ],
    db: Annotated[Path, typer.Option("--db", help="Folder of the index: new, empty, or with an index.")],
    field: Annotated[str, typer.Option("--field", help="Key or column that holds the text.")] = "text",
    id_field: Annotated[
        str | None, typer.Option("--id-field", help="Key or column that holds the id. None: a hash of the content.")
    ] = None,
    language: Annotated[
        str | None,
        typer.Option("--language", help="Whose word stems text search knows, or none. Default: English."),
    ] = None,
    refit: Annotated[
        bool, typer.Option("--refit", help="Choose model, config and transform anew, and embed everything anew.")
    ] = False,
    model: Annotated[
        str | None,
        typer.Option("--model", help="smollm2, a hub id, a folder or a .gguf file. Default: the index's own."),
    ] = None,
    method: Annotated[
        str | None, typer.Option("--method", help=f"{', '.join(METHODS)}. Default: the index's own, or auto.")
    ] = None,
    layers: Layers = None,
    bias: Bias = None,
    dtype: Dtype = "auto",
    dim: Dim = None,
    fitted: Annotated[
        Path | None,
        typer.Option("--fitted", help="A transform that `kvembed tune -o` wrote. None: fitted on the texts."),
    ] = None,
    max_tokens: MaxTokens = None,
    batch_tokens: BatchTokens = None,
) -> None:
    """Make documents searchable, or bring an index up to date: what changed is embedded, what is gone is removed."""
    with one_line_errors("what is done is kept, and the same command goes on"):
        import_models()
        from .documents import Corpus
        from .index import Index
        from .saved import default_method

        filled = Index.is_filled(db)
        there = filled and not refit
        before = Index.open(db) if filled and refit else None
        base = None
        if before and model is None:  # what is not said stays as it was
            model, dtype = before.model, before.made_with["dtype"] if dtype == "auto" else dtype
            base = before.config if method is None else None
        if there:
            index = Index.open(db, model=model, batch_tokens=batch_tokens)
            said = {"method": method, "bias": bias, "dim": dim, "max_tokens": max_tokens}
            options: dict[str, Any] = {name: value for name, value in said.items() if value is not None}
            if layers is not None:
                options["layers"] = parse_layers(layers)
            index.check_options(dtype=None if dtype == "auto" else dtype, fitted=fitted, **options)
        else:
            Index.check_folder(db)
        corpus = Corpus(paths, field=field, id_field=id_field, may_be_gone=there, progress=True)
        if not there:
            corpus.check_not_empty()
            if before:
                before.check_covered(corpus)
            name = model or "smollm2"
            method = method or default_method(name)
            config = base or (None if method is None else preset(method))
            is_fitted = config is not None and config.transform != "none" and fitted is None
            texts = corpus.calibration() if is_fitted else None
            load = loader(name, method, layers, bias, dtype, max_tokens, batch_tokens, dim, fitted, texts, base=base)
            embedder = load()
            index = Index.create(db, embedder, model=name, refit=refit)
        print_indexed(index.update(corpus, language=language, progress=True), db)


@app.command()
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
        str | None, typer.Option("--id-field", help="Key or column of --queries that holds the id. None: 0, 1, ...")
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
        rows = [] if queries is None else [row for row in read_rows(queries, field, id_field) if row.text.strip()]
        if queries is not None and not rows:
            raise InputError(f"{queries} holds no queries")
        asked = [row.text for row in rows] if question is None else [question]
        keys = ["0"] if question is not None else [str(n if row.id is None else row.id) for n, row in enumerate(rows)]
        if as_trec and (twice := [key for key, times in Counter(keys).items() if times > 1]):
            raise InputError(f"{queries}: two queries have the id {twice[0]!r}, which a run file can't tell apart")
        found = index.search_many(asked, top=top, mode=mode, where=where)
        if not any(found) and not len(index):
            logging.getLogger("kvembed").warning("%s has no documents yet; kvembed index puts them in", db)
        form: Literal["table", "json", "trec"] = "json" if as_json else "trec" if as_trec else "table"
        print_hits(list(zip(keys, asked, found, strict=True)), mode, form)


@app.command()
def similarity(
    texts: Annotated[list[str] | None, typer.Argument(help="Texts; none: standard input, one a line.")] = None,
    query: Annotated[
        list[str] | None, typer.Option("--query", "-q", help="Rank the texts for this query; may be given again.")
    ] = None,
    top: Annotated[int | None, typer.Option("--top", min=1, help="How many texts a query shows. Default: 5.")] = None,
    as_json: Json = False,
    model: Model = "smollm2",
    method: Method = None,
    layers: Layers = None,
    bias: Bias = None,
    dtype: Dtype = "auto",
    role: Role = "document",
    dim: Dim = None,
    fitted: Fitted = None,
    max_tokens: MaxTokens = None,
    batch_tokens: BatchTokens = None,
) -> None:
    """Cosine similarity of every text with every other, or the texts nearest to each query."""
    with one_line_errors():
        hint_at_files(texts or [], "kvembed similarity < FILE")
        if top is not None and not query:
            raise InputError("--top is of a --query; without one, every text is compared with every other")
        texts = texts or read_texts([])
        embedder = loader(model, method, layers, bias, dtype, max_tokens, batch_tokens, dim, fitted)()
        vectors = embedder.encode(texts, role=role)
        scores = embedder.similarity(embedder.encode_query(query) if query else vectors, vectors).tolist()
        print_similarity(texts, query, scores, top or 5, as_json=as_json)


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


@app.command()
def tune(
    model: Annotated[str, typer.Argument(help="smollm2, a hub id, a folder or a .gguf file.")] = "smollm2",
    texts: Annotated[
        Path | None,
        typer.Option("--texts", help="Your unlabelled texts (.txt, .jsonl, .csv, .parquet). None: self-written."),
    ] = None,
    field: Annotated[str, typer.Option("--field", help="Key or column that holds the text.")] = "text",
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
        embedder = loader(model, method, layers, bias, dtype, texts=given)()
        if output is not None and embedder.transform is not None:
            with naming(output):
                embedder.transform.save(output)
        print_tuned(embedder, model, output, as_json=as_json)


@app.command("eval")
def evaluate(
    data: Annotated[Path | None, typer.Option("--data", help="Folder of task folders (.jsonl or .jsonl.gz).")] = None,
    mteb: Annotated[list[str] | None, typer.Option("--mteb", help="A task of MTEB; may be given again.")] = None,
    suite: Annotated[
        Literal["mini", "full", "long"],
        typer.Option(
            "--suite", help="A fixed sample of every task; everything; long documents at 512 to 4,096 tokens."
        ),
    ] = "mini",
    tasks: Annotated[list[str] | None, typer.Option("--task", help="Only this task; may be given again.")] = None,
    results: Annotated[Path | None, typer.Option("--results", help="Ledger to write to; what it has is kept.")] = None,
    vectors: Annotated[Path | None, typer.Option("--vectors", help="Also write each task's vectors here.")] = None,
    reference: Annotated[
        Literal["sentence-transformer", "tf-idf"] | None,
        typer.Option("--reference", help="Instead of a method: a sentence-transformers --model, or TF-IDF."),
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="The model's name in tables. Default: its own.")] = None,
    as_json: Json = False,
    model: Model = "smollm2",
    method: Method = None,
    layers: Layers = None,
    bias: Bias = None,
    dtype: Dtype = "auto",
    dim: Dim = None,
    fitted: Fitted = None,
    precision: Precision = "float32",
    max_tokens: MaxTokens = None,
    batch_tokens: BatchTokens = None,
) -> None:
    """Score a method on local tasks (STS, pairs, classification, clustering, reranking, retrieval) or on MTEB's."""
    with one_line_errors("" if data is None else "vectors that are stored are kept, and the same command goes on"):
        from .tasks import load_tasks, sample

        if data is None and not mteb:
            raise InputError("say what to score on: --data FOLDER, or --mteb TASK")
        if data is not None and mteb:
            raise InputError("--data and --mteb are two runs: give one of them")
        if data is None and (tasks or results or vectors or reference or suite != "mini" or precision != "float32"):
            raise InputError("--task, --suite, --results, --vectors, --reference and --precision are for --data")
        if data is None:
            from .mteb_encoder import run_mteb

            embedder = loader(model, method, layers, bias, dtype, max_tokens, batch_tokens, dim, fitted)()
            scores = run_mteb(embedder, name or _label(model), mteb or [], progress=True)
            if as_json:
                print_json(scores)
            else:
                print_table(["task", "score"], [[task, f"{value:.2f}"] for task, value in scores.items()])
            return
        if reference and (
            dtype != "auto" or any(x is not None for x in (method, layers, bias, dim, fitted, max_tokens, batch_tokens))
        ):
            raise InputError(
                "--reference stands instead of a method: it takes no --method, --layers, --bias, --dtype, --dim, "
                "--fitted, --max-tokens, --batch-tokens"
            )
        if reference == "tf-idf" and (name is not None or model != "smollm2"):
            raise InputError("--reference tf-idf has no model: it takes no --model and no --name")
        import_models()
        from .evaluate import evaluate as run
        from .models import BUNDLED
        from .subjects import (
            at_limits,
            embedder_subject,
            quantized_subject,
            sentence_transformer_subject,
            tfidf_subject,
        )

        if reference == "sentence-transformer" and model in BUNDLED:
            raise InputError(f"--reference sentence-transformer needs its --model; {model} is none")
        found = sample(load_tasks(data, tasks or ()), suite)
        if reference:
            subjects = [tfidf_subject() if reference == "tf-idf" else sentence_transformer_subject(model, name)]
        else:
            embedder = loader(model, method, layers, bias, dtype, max_tokens, batch_tokens, dim, fitted)()
            limited = at_limits(embedder, suite) if max_tokens is None else [embedder]
            subjects = [embedder_subject(one, name or _label(model)) for one in limited]
        if vectors is not None and len(subjects) > 1:
            raise InputError("--vectors holds one limit of tokens; with --suite long give --max-tokens too")
        done = []
        for subject in subjects:
            subject = quantized_subject(subject, precision)
            rows = list(run(subject, found, suite=suite, results=results, vectors=vectors, progress=True))
            done += rows
            if not as_json:
                print_results(rows)
        if as_json:
            print_json([dataclasses.asdict(result) for result in done])


@app.command()
def report(
    results: Annotated[Path, typer.Argument(help="Folder of the ledger that `kvembed eval --results` wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page, .html.")] = Path("report.html"),
    text: Annotated[
        str | None, typer.Option("--text", help="Also load --model and show how this text's tokens read the slot.")
    ] = None,
    texts: Annotated[
        Path | None, typer.Option("--texts", help="Also load --model and show the similarity of these texts.")
    ] = None,
    model: Model = "smollm2",
    method: Method = None,
    layers: Layers = None,
    bias: Bias = None,
    dtype: Dtype = "auto",
    fitted: Fitted = None,
) -> None:
    """One HTML page from results: methods by tasks, cost, layers, bias, one text's attention, similarities."""
    with one_line_errors():
        from .layers import shipped_profiles
        from .report import report_html
        from .results import read_results

        if output.suffix.lower() not in (".html", ".htm"):
            raise InputError(f"{output}: the page is .html")
        check_writable(output)
        found = read_results(results)
        scores = [result for result in found if result.suite in ("mini", "full")]
        sweep = [result for result in found if result.method.startswith("bias ")]
        if not scores and not sweep:
            raise InputError(f"{results}: holds no results of mini or full; `kvembed eval --results` writes some")
        listed = read_texts([texts]) if texts else []
        embedder = loader(model, method, layers, bias, dtype, fitted=fitted)() if text or listed else None
        vectors = embedder.encode(listed) if embedder and listed else None
        page = report_html(
            scores,
            profiles=[profile for profile in shipped_profiles() if profile.model in {r.model for r in found}],
            explanation=embedder.explain(text) if embedder and text else None,
            similarity=(listed, embedder.similarity(vectors, vectors)) if embedder and vectors is not None else None,
            sweep=sweep,
        )
        with naming(output), atomic_write(output) as file:
            file.write(page.encode())
        print_line(str(output))


@app.command()
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
        from .server import api_keys, listen_at, serve
        from .service import Limits, check_names

        names = name or [_label(model)]
        check_names(names)
        known = api_keys(keys)
        listener = listen_at(host, port)
        embedder = loader(model, method, layers, bias, dtype, max_tokens, batch_tokens, dim, fitted)()
        limits = Limits(queue_tokens=queue_tokens)
        serve(embedder, names, listener, keys=known, limits=limits)


@app.command()
def pull(
    model: Annotated[str, typer.Argument(help="smollm2, a hub id, a folder or a .gguf file.")] = "smollm2",
    revision: Annotated[str | None, typer.Option("--revision", help="Of a hub id.")] = None,
) -> None:
    """Make a model ready to use without the network; prints its folder."""
    with one_line_errors():
        import_models()
        from . import models

        print_line(str(models.pull(model, revision=revision)))


def main() -> None:
    """The `kvembed` command."""
    keep_freed_memory()
    with in_a_terminal():
        app()


def _label(model: str) -> str:
    from .models import label

    return label(model)
