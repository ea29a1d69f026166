"""Fill the ledger: every method on every backbone, and the references. Days of two cores; stop it and start it at will.

    python tools/results.py --data ../shared/eval-data smollm2 gemma3-270m=FILE.gguf all-MiniLM-L6-v2=FOLDER

A model is NAME or NAME=PATH, NAME being what tables call it. A folder with `modules.json` is a trained reference.
`tools/ablation.py` does the controls; `make tables` makes tables and plots of it all.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from kvembed import Embedder
from kvembed.evaluate import evaluate
from kvembed.methods import METHODS
from kvembed.results import mean
from kvembed.subjects import Subject, at_limits, embedder_subject, sentence_transformer_subject, tfidf_subject
from kvembed.tasks import Task, load_tasks, sample

ROOT = Path(__file__).parent.parent
SMALLEST = "smollm2"  # gets all methods, and the long texts
SOME = ("auto", "kv", "static", "prompt-eol", "weighted-mean", "mean", "token-prepending", "echo")
WHOLE = ("auto", "kv", "prompt-eol", "static")  # on the full sets of short texts, too
SHORT = ("banking77", "mrpc", "sst2", "sts12", "sts13", "sts14", "stsb")


def main() -> None:
    """Run what the ledger lacks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    parser.add_argument("--suite", choices=["mini", "long", "full"], action="append")
    parser.add_argument("--method", action="append")
    parser.add_argument("models", nargs="*", default=[SMALLEST])
    arguments = parser.parse_args()
    tasks = load_tasks(arguments.data)
    for suite in arguments.suite or ("mini", "full", "long"):
        alone = [] if arguments.method else references(arguments.models, suite)
        for subject in itertools.chain(alone, embedders(arguments.models, suite, arguments.method)):
            full = SHORT if subject.method in WHOLE else (*SHORT, "scifact")
            chosen = [task for task in sample(tasks, suite) if suite != "full" or task.name in full]
            run(subject, chosen, suite, arguments.results)


def run(subject: Subject, tasks: Sequence[Task], suite: str, results: Path = ROOT / "results") -> None:
    """Write what the ledger lacks of one subject, and print its mean."""
    rows = list(evaluate(subject, tasks, suite=suite, results=results, progress=True))
    print(f"{mean(rows).value:6.2f}  {suite}, {subject.model}, {subject.method}", flush=True)


def references(models: Sequence[str], suite: str) -> Iterator[Subject]:
    """TF-IDF, and the trained ones among the models."""
    if suite == "mini":
        yield tfidf_subject()
    for model in models if suite != "long" else ():
        name, _, path = model.partition("=")
        if is_trained(path):
            yield sentence_transformer_subject(path, name)


def embedders(models: Sequence[str], suite: str, methods: Sequence[str] | None) -> Iterator[Subject]:
    """Each method on each backbone among the models."""
    for model in models:
        name, _, path = model.partition("=")
        if not is_trained(path) and (suite == "mini" or name == SMALLEST):
            for method in methods or (WHOLE if suite == "full" else METHODS if name == SMALLEST else SOME):
                embedder = Embedder.from_pretrained(path or name, method=method, dtype="auto", progress=True)
                for limited in at_limits(embedder, suite):
                    yield embedder_subject(limited, name)


def is_trained(path: str) -> bool:
    """Whether a model's folder is that of a trained reference."""
    return bool(path) and (Path(path) / "modules.json").is_file()


if __name__ == "__main__":
    main()
