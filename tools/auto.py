"""What makes `auto` good, and what it costs to make its vectors smaller; and how it does fitted on a task's own texts.

Writes to the ledger under the suites `auto` and `own`; a run that was stopped goes on where it was. `parts` and `sizes`
read the states that `tools/results.py --suite mini --method auto` has cached. `make tables` makes the tables.

    python tools/auto.py --data ../shared/eval-data [--model smollm2] [--name NAME] [PART ...]

`parts` takes one part of the method away at a time; `sizes` keeps fewer dimensions, or fewer bits of each; `examples`
shows the model fewer of them; `own` fits on the texts that a task has besides those that are scored; `rerouted`
re-routes the layers that `kv` does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from ablation import asked
from numpy.typing import NDArray

from kvembed import Embedder
from kvembed.config import Precision, Role
from kvembed.evaluate import evaluate
from kvembed.quantize import unit
from kvembed.results import mean
from kvembed.self_written import generated_texts
from kvembed.subjects import Subject, embedder_subject, marked, quantized_subject
from kvembed.tasks import MINI_TOKENS, Task, load_tasks, mini, sample
from kvembed.transform import Transform, fit
from kvembed.tuning import FIT_TEXTS, QUERY_TEXTS

Views = dict[Role, NDArray[np.float32]]
ROLES: tuple[Role, ...] = ("document", "query")
SIZES: tuple[tuple[int | None, Precision], ...] = (
    *((dim, "float32") for dim in (512, 256, 128, 64)),
    *((dim, precision) for precision in ("int8", "binary") for dim in (None, 256)),
)


def main() -> None:
    """Run what is asked for."""
    arguments = asked(__doc__, ("parts", "sizes", "examples", "own", "rerouted"))
    parts, name = arguments.parts, arguments.name
    tasks = load_tasks(arguments.data)
    small = list(sample(tasks, "mini"))
    auto = Embedder.from_pretrained(arguments.model, method="auto", dtype="auto", max_tokens=MINI_TOKENS, progress=True)

    def run(subject: Subject, chosen: Sequence[Task], suite: str, told: str) -> None:
        rows = list(
            evaluate(
                dataclasses.replace(subject, method=told),
                chosen,
                suite=suite,
                results=arguments.results,
                progress=True,
            )
        )
        print(f"{mean(rows).value:6.2f}  {suite}, {name}, {told}", flush=True)

    if "parts" in parts:
        for told, transform in _variants(auto):
            run(_with(auto, name, told, transform), small, "auto", told)
    for dim, precision in SIZES if "sizes" in parts else ():
        if dim is None or dim < auto.dim:
            told = f"size {dim or auto.dim} {precision}"
            run(quantized_subject(embedder_subject(auto.replace(dim=dim), name), precision), small, "auto", told)
    for count in (0, 3, 5) if "examples" in parts else ():
        fewer: dict[str, Any] = {role: _with_examples(auto.config.templates(role)[0], count) for role in ROLES}
        run(embedder_subject(auto.replace(**fewer), name), small, "auto", f"{count or 'no'} examples")
    for task in tasks if "own" in parts else ():
        if texts := _own(task):
            fitted = Embedder.from_model(
                auto.model, auto.tokenizer, method="auto", max_tokens=MINI_TOKENS, texts=texts, progress=True
            )
            run(embedder_subject(fitted, name), [mini(task)], "own", "auto, fitted on the task's texts")
    if "rerouted" in parts:
        kv = Embedder.from_model(auto.model, auto.tokenizer, method="kv")
        run(embedder_subject(auto.replace(layers=kv.config.layers), name), small, "auto", "re-routed as in kv")


def _with_examples(template: str, count: int) -> str:
    *examples, own = template.split("\n\n")
    return "\n\n".join([*examples[:count], own])


def _own(task: Task) -> tuple[str, ...]:
    """A task's unlabelled texts that are not scored: what is searched, or the texts to train a classifier on."""
    if task.kind == "classification":
        return task.documents[: task.train]
    return task.documents if task.kind in ("retrieval", "reranking") else ()


def _variants(auto: Embedder) -> Iterator[tuple[str, Callable[[NDArray[np.float32], Role], NDArray[np.float32]]]]:
    """Name, and what makes vectors (N,dim) of all views (N,V,D)."""
    texts = generated_texts(auto.model, auto.tokenizer, auto.fingerprint(), FIT_TEXTS, progress=True)
    views: Views = {
        "document": auto.encode_views(texts).vectors,
        "query": auto.encode_views(texts[:QUERY_TEXTS], role="query").vectors,
    }
    inside = [readout.is_inside for _, readout in auto.config.views]

    def fitted(kept: Sequence[int], some: Views) -> Transform:
        return fit({role: part[:, kept] for role, part in some.items()}, [inside[view] for view in kept], {})

    def on(kept: Sequence[int], transform: Transform) -> Callable[[NDArray[np.float32], Role], NDArray[np.float32]]:
        return lambda found, role: transform(found[:, kept], role)

    def without(left: Sequence[int]) -> Callable[[NDArray[np.float32], Role], NDArray[np.float32]]:
        kept = [view for view in every if view not in left]
        return on(kept, fitted(kept, views))

    every = range(len(inside))  # the last token, the mean of the text's, static
    whole = fitted(every, views)
    kept = whole.whiten.shape[2]
    apart = torch.eye(len(inside) * kept)
    yield "auto", on(every, whole)
    yield "without the last token", without([0])
    yield "without the mean of the text's tokens", without([1])
    yield "without static vectors", without([2])
    yield (
        "neither whitened nor joined",
        on(
            every,
            dataclasses.replace(
                whole,
                whiten=torch.eye(auto.backbone.dim).expand(len(inside), -1, -1),
                rotate=torch.eye(len(inside) * auto.backbone.dim),
            ),
        ),
    )
    yield "whitened, not joined", on(every, dataclasses.replace(whole, rotate=apart))
    yield "joined, not stretched", on(every, dataclasses.replace(whole, rotate=whole.rotate / whole.rotate.norm(dim=0)))
    one_mean = {role: whole.means["document"] for role in whole.means}
    yield "one mean for both roles", on(every, dataclasses.replace(whole, means=one_mean))
    for count in (250, 1000):
        yield (
            f"fitted on {count:,} texts",
            on(every, fitted(every, {role: part[:count] for role, part in views.items()})),
        )


def _with(
    auto: Embedder, name: str, told: str, join: Callable[[NDArray[np.float32], Role], NDArray[np.float32]]
) -> Subject:
    subject = embedder_subject(auto, name)
    views = len(auto.config.views)

    def finish(flat: NDArray[np.float32], role: Role) -> NDArray[np.float32]:
        return unit(join(flat.reshape(len(flat), views, -1), role))

    return marked(subject, "variant", told, finish=finish)


if __name__ == "__main__":
    main()
