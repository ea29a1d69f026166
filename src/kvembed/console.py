"""What the command shows: lines, tables, colours."""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import json
import logging
import os
import re
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from .errors import InputError
from .methods import METHODS

if TYPE_CHECKING:
    from pathlib import Path

    from .bulk import Summary
    from .config import EmbedConfig
    from .embedder import Embedder
    from .explanation import Explanation
    from .hits import Hit, Mode
    from .indexing import Indexed
    from .layers import Profile
    from .results import Result

__all__ = [
    "hint_at_files",
    "print_bulk",
    "print_explanation",
    "print_hits",
    "print_indexed",
    "print_json",
    "print_line",
    "print_profile",
    "print_results",
    "print_similarity",
    "print_table",
    "print_tuned",
]

_SQUARE = 10  # texts; of no more, a table shows all pairs
_WHOLE = 12  # characters; columns of no more are shown whole in a table


def hint_at_files(texts: Sequence[str], command: str) -> None:
    """A text that is the name of a file was perhaps meant as the file."""
    for text in texts:
        if len(text) < 256 and os.path.isfile(text):
            logging.getLogger("kvembed").warning(
                "%r is taken as a text, though there is a file of this name; it is read by: %s", text, command
            )


def _shown(text: str) -> str:
    """A text without what would steer a terminal: control characters, and those that turn the direction of writing."""
    return re.sub(r"[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", lambda found: repr(found[0])[1:-1], text)


def print_line(text: str) -> None:
    """Print a line on standard output."""
    sys.stdout.write(text + "\n")


def print_json(value: Any) -> None:
    """Print JSON on one line, for pipes: a number too large for it is null, a letter that can't be shown is escaped."""
    plain = not (sys.stdout.encoding or "utf-8").lower().startswith("utf")
    try:
        print_line(json.dumps(value, ensure_ascii=plain, allow_nan=False))
    except ValueError:
        print_line(json.dumps(json.loads(json.dumps(value), parse_constant=lambda _: None), ensure_ascii=plain))


def print_table(head: list[str], body: list[list[str]]) -> None:
    """Print a table as wide as the terminal, or wider: columns of numbers are never cut."""
    from rich import box
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    rows = [[_shown(cell) for cell in row] for row in (head, *body)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    whole = [width <= _WHOLE for width in widths]
    columns = (Column(Text(name), no_wrap=keep) for name, keep in zip(rows[0], whole, strict=True))
    table = Table(*columns, box=box.SIMPLE)  # Text: "[...]" in a text is not markup
    for row in rows[1:]:
        table.add_row(*map(Text, row))
    needed = 2 + sum(3 + (width if keep else _WHOLE) for width, keep in zip(widths, whole, strict=True))
    Console(width=max(Console().width, needed)).print(table)


def print_results(rows: list[Result]) -> None:
    """Print one subject's scores, and their mean."""
    from .results import mean

    body = [
        [r.task, r.metric, f"{r.score:.2f}", f"{r.low:.1f} to {r.high:.1f}", str(r.n), str(r.truncated)] for r in rows
    ]
    print_table(["task", "metric", "score", "95 %", "n", "cut"], body)
    one = rows[0]
    limit = one.config.get("max_tokens")
    print_line(
        f"{one.model}, {one.method}: mean {mean(rows).value:.2f} over {_counted(len(rows), 'task')}, "
        f"{f'at most {limit:,} tokens, ' if limit else ''}config {one.config_hash}"
    )


def print_bulk(summary: Summary, out: Path) -> None:
    """Print what a bulk job has made."""
    before = f" ({summary.shards - summary.made:,} there before)" if summary.made < summary.shards else ""
    cut = f"; {_counted(summary.texts_cut, 'text')} cut to {_counted(summary.max_tokens, 'token')}"
    print_line(
        f"{out}: {_counted(summary.rows, 'row')} of {summary.dim} dimensions in {_counted(summary.shards, 'shard')}"
        f"{before}, {_counted(summary.tokens, 'token')}{cut if summary.texts_cut else ''}"
    )


def print_indexed(done: Indexed, db: Path) -> None:
    """Print what an index holds now, and what was not read."""
    parts = [
        f"{_counted(done.embedded, 'text')} embedded",
        f"{_counted(done.changed, 'document')} updated whose text was known" if done.changed else "",
        f"{done.removed:,} removed" if done.removed else "",
        f"{_counted(done.duplicates, 'duplicate')} kept once" if done.duplicates else "",
        f"{_counted(done.empty, 'row')} without text left out" if done.empty else "",
        f"{_counted(done.cut, 'text')} cut to {_counted(done.max_tokens, 'token')}" if done.cut else "",
    ]
    others = ", ".join(f"{count:,} {kind}" for kind, count in sorted(done.passed_over.items()))
    print_line(
        f"{db}: {_counted(done.documents, 'document')} of {done.dim} dimensions; {_counted(done.files, 'file')} read, "
        f"{', '.join(filter(None, parts))}{f'; passed over: {others}' if others else ''}"
    )


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def print_hits(found: Sequence[tuple[str, str, list[Hit]]], mode: Mode, form: Literal["table", "json", "trec"]) -> None:
    """Print what was found for each query (its id and its text): tables, JSON lines, or a run file of TREC."""
    names = {"vector": ["cosine"], "text": ["BM25"], "hybrid": ["rank fusion", "cosine", "BM25"]}[mode]
    if form == "trec":
        check_run_ids(hit.id for _, _, hits in found for hit in hits)
    for key, query, hits in found:
        if form == "json":
            for hit in hits:
                print_json({"query_id": key, "query": query, **dataclasses.asdict(hit)})
        elif form == "trec":
            for hit in hits:
                print_line(f"{key} Q0 {hit.id} {hit.rank} {hit.score:.6f} kvembed")
        elif hits:
            scores = [(hit.score, hit.cosine, hit.bm25)[: len(names)] for hit in hits]
            body = [[*map(_number, row), _where(x), _snippet(x)] for row, x in zip(scores, hits, strict=True)]
            print_table([*names, "where", f"nearest to: {query}"], body)
        else:
            print_line(f"nothing found for: {_shown(query)}")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def check_run_ids(ids: Iterable[str]) -> None:
    """Raises `InputError` for an id that can't stand in a run file of TREC."""
    for one in ids:
        if one.split() != [one]:
            raise InputError(f"an id that is empty or has white space can't stand in a run file: {one!r}")
        try:
            one.encode(sys.stdout.encoding or "utf-8")
        except UnicodeEncodeError as error:
            raise InputError(f"the output's encoding, {error.encoding}, can't hold the id {one!r}") from None


def _where(hit: Hit) -> str:
    """File and line, from here if it is below."""
    here = os.path.relpath(hit.file) if hit.file.startswith(os.getcwd() + os.sep) else hit.file
    return f"{here}:{hit.line}"


def _snippet(hit: Hit) -> str:
    """The beginning of the text, and what else the document has."""
    text = " ".join(hit.text.split())
    own_id = {} if re.fullmatch("[0-9a-f]{32}", hit.id) else {"id": hit.id}
    fields = ", ".join(f"{name}={' '.join(str(value).split()):.40}" for name, value in (own_id | hit.fields).items())
    return (text if len(text) <= 240 else text[:239] + "…") + (f"  [{fields}]" if fields else "")


def print_similarity(
    texts: Sequence[str], queries: Sequence[str] | None, scores: Sequence[Sequence[float]], top: int, *, as_json: bool
) -> None:
    """Print cosines: the `top` texts nearest to each query; or of every text with every other, where people read it and
    there are too many for that, of the `top` nearest pairs.
    """
    if queries:
        found = []
        for query, row in zip(queries, scores, strict=True):
            best = sorted(range(len(texts)), key=row.__getitem__, reverse=True)[:top]
            found.append({"query": query, "hits": [{"text": texts[i], "score": row[i]} for i in best]})
            if not as_json:
                print_table(["score", f"nearest to: {query}"], [[f"{row[i]:.3f}", texts[i]] for i in best])
        if as_json:
            print_json(found)
    elif as_json:
        print_json({"texts": texts, "similarity": scores})
    elif len(texts) > _SQUARE:
        pairs = itertools.combinations(range(len(texts)), 2)
        best_pairs = heapq.nlargest(top, pairs, key=lambda pair: scores[pair[0]][pair[1]])
        head = ["score", "nearest pairs", f"of {len(texts):,} texts"]
        print_table(head, [[f"{scores[a][b]:.3f}", texts[a], texts[b]] for a, b in best_pairs])
    else:
        body = [[str(i), *(f"{x:.3f}" for x in row), texts[i]] for i, row in enumerate(scores)]
        print_table(["", *(str(i) for i in range(len(texts))), "text"], body)


def print_profile(profile: Profile) -> None:
    """Print the curve of intrinsic dimension, and the layers chosen by it."""
    widest = max(profile.curve)
    body = [
        [
            str(layer) + (" *" if layer in profile.layers else ""),
            f"{value:.2f}",
            "#" * round(30 * value / widest) + ("" if layer in profile.attention_layers else "  (no attention)"),
        ]
        for layer, value in enumerate(profile.curve)
    ]
    print_table(["layer", "ID", f"{profile.model}, {profile.count} {profile.texts} texts"], body)
    chosen = ",".join(map(str, profile.layers))
    print_line(f"* re-routed. To use them anywhere: --method kv --layers {chosen}")


def print_tuned(embedder: Embedder, model: str, output: Path | None, *, as_json: bool) -> None:
    """Print what a transform was fitted on, what it joins, and the command that uses it."""
    config, transform = embedder.config, embedder.transform
    if transform is None:
        return
    if as_json:
        views = [{"template": template, **dataclasses.asdict(one)} for template, one in config.views]
        print_json({**transform.info, "dim": transform.dim, "views": views, "output": output and str(output)})
        return
    from .self_written import SELF_WRITTEN

    for template in config.templates("document"):
        print_line(f"template  {template!r}")
    _print_readouts(config, transform.info)
    usual = METHODS[config.method]
    layers = ",".join(map(str, config.layers or ())) or "none"
    options = ["--model", model, "--method", config.method]
    options += ["--layers", layers] if config.layers != usual.layers else []
    options += ["--bias", f"{config.bias:g}"] if config.bias != usual.bias else []
    options += ["--dtype", embedder.dtype] if embedder.dtype == "float16" else []  # it rounds weights: another fit
    given = transform.info["texts"] != SELF_WRITTEN
    if given and output is None:
        print_line("kept      for these texts alone; -o FILE writes it to a file")
    options += ["--fitted", str(output or "FILE")] if given or output else []
    print_line(f"to use    kvembed embed {shlex.join(options)}")


def _print_readouts(config: EmbedConfig, fitted_on: Mapping[str, Any] | None) -> None:
    for one in config.readouts:
        if one.pooling == "static":
            print_line("read      static: the text's own tokens' input embeddings, whitened")
            continue
        place = "after the final norm" if one.output_layer is None else f"after layer {one.output_layer}"
        tokens = " over the text's own tokens" if one.mean_tokens == "content" else ""
        print_line(f"read      {one.pooling}{tokens}, {place}")
    if fitted_on:
        size = f"the best {config.dim} dimensions, " if config.dim else ""
        joined = fitted_on.get("self_written", 0)
        digest = f", digest {fitted_on['digest']}" if "digest" in fitted_on else ""
        more = f" (weight {fitted_on.get('weight_of_given', 1):.2f}) and {joined} self-written" if joined else ""
        print_line(
            f"transform {config.transform}: {size}fitted on {fitted_on['count'] - joined} {fitted_on['texts']} texts "
            f"({fitted_on['texts_sha256'][:8]}){more}{digest}; what the read-outs agree on comes first"
        )


def print_explanation(explanation: Explanation) -> None:
    """Print a text's tokens, coloured by how much they read the slot, and what was done."""
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
        line.append(_shown(token.replace("\n", "\\n")), style + (" underline" if first <= i < end else ""))
    console.print(line)
    cut = f", {explanation.tokens_cut} cut" if explanation.tokens_cut else ""
    chunks = f"; chunk 1 of {explanation.chunks}" if explanation.chunks > 1 else ""
    own = f"own {end - first} are underlined" if console.is_terminal else f"own are {first + 1} to {end}"
    own = own if end > first else "own are none"
    once = f"; the first {explanation.shared} are computed once for all texts" if explanation.shared else ""
    print_line(f"tokens    {len(explanation.tokens)}; the text's {own}{once}{cut}{chunks}")
    print_line(f"method    {config.method}, config {config.hash()}")
    _print_readouts(config, explanation.fitted_on)
    if not beta:
        why = ": read-outs that are whitened gain nothing by it (docs/method.md)" if config.transform != "none" else ""
        print_line(f"layers    none re-routed{why}")
        return
    print_line(f"layers    {', '.join(map(str, beta))} re-routed, bias {config.bias:g}")
    print_line(
        f"beta      share of attention on the slot, mean {sum(mean) / len(mean):.3f}; the deeper the colour the more"
    )
    order = sorted(range(len(mean)), key=lambda i: -mean[i])[:8]
    body = [
        [repr(explanation.tokens[i])[1:-1] or "…", f"{mean[i]:.3f}", *(f"{values[i]:.3f}" for values in beta.values())]
        for i in order
    ]
    print_table(["token", "mean beta", *(f"layer {layer}" for layer in beta)], body)
