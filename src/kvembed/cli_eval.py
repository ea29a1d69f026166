"""The commands that measure: eval and report."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import typer

from .console import print_json, print_line, print_results, print_table
from .errors import InputError
from .files import atomic_write, check_writable, naming
from .options import (
    BatchTokens,
    Bias,
    Dim,
    Dtype,
    Fitted,
    Json,
    Layers,
    Method,
    Model,
    Precision,
    loader,
)
from .process import import_models
from .terminal import one_line_errors
from .texts import read_texts

__all__ = ["evaluate", "report"]


def evaluate(
    data: Annotated[Path | None, typer.Option("--data", help="Folder of task folders (.jsonl or .jsonl.gz).")] = None,
    mteb: Annotated[list[str] | None, typer.Option("--mteb", help="A task of MTEB; may be given again.")] = None,
    suite: Annotated[
        Literal["mini", "full", "long"],
        typer.Option(
            "--suite", help="A fixed sample of every task; everything; long documents at 512 to 16,384 tokens."
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
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", help="Cut longer texts. Default: the suite's limit, 1,024 for mini.")
    ] = None,
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
            from .models import label

            scores = run_mteb(embedder, name or label(model), mteb or [], progress=True)
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
        from .models import BUNDLED, label
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
            subjects = [embedder_subject(one, name or label(model)) for one in limited]
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

        if text is None and texts is None:
            said = (method, layers, bias, fitted)
            if any(x is not None for x in said) or dtype != "auto" or model != "smollm2":
                raise InputError("--model, --method, --layers, --bias, --dtype and --fitted are for --text or --texts")
        if output.suffix.lower() not in (".html", ".htm"):
            raise InputError(f"{output}: the page is .html")
        check_writable(output)
        found = read_results(results)
        scores = [result for result in found if result.suite in ("mini", "full")]
        sweep = [result for result in found if result.method.startswith("bias ")]
        if not scores and not sweep:
            raise InputError(f"{results}: holds no results of mini or full; `kvembed eval --results` writes some")
        listed = read_texts([texts]) if texts else []
        embedder = loader(model, method, layers, bias, dtype, fitted=fitted)() if text is not None or listed else None
        vectors = embedder.encode(listed) if embedder and listed else None
        page = report_html(
            scores,
            profiles=[profile for profile in shipped_profiles() if profile.model in {r.model for r in found}],
            explanation=embedder.explain(text) if embedder and text is not None else None,
            similarity=(listed, embedder.similarity(vectors, vectors)) if embedder and vectors is not None else None,
            sweep=sweep,
        )
        with naming(output), atomic_write(output) as file:
            file.write(page.encode())
        print_line(str(output))
