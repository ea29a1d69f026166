"""The report: scores, costs, layers and one text's attention as a single HTML page that needs no network."""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from . import __version__
from .charts import BOTTOM, LEFT, RIGHT, TOP, WIDTH, Axis, apart, chart, label_beside, line, linear_axis, log_axis, mark
from .heatmaps import BETA, beta_map, coloured, cosine_map, count, grid, legend, number, panel
from .page import LINES, STEPS, page, safe
from .results import REFERENCES, Result, mean

if TYPE_CHECKING:
    from .explanation import Explanation
    from .layers import Profile

__all__ = ["report_html"]

_NOTHING = "&ndash;"

Column = tuple[str, str]  # a task and the digest of its data: other data is another task


def report_html(
    results: Sequence[Result],
    *,
    profiles: Sequence[Profile] = (),
    explanation: Explanation | None = None,
    similarity: tuple[Sequence[str], NDArray[Any]] | None = None,
    sweep: Sequence[Result] = (),
) -> str:
    """One self-contained page; sections without data are left out. The same input gives the same page.

    Args:
        results: a heat table and a chart of quality against cost for each suite and model. Of two results of the same
            suite, model, config, task and data, the later one counts.
        profiles: a curve of intrinsic dimension each.
        explanation: a heat map of one text's attention to the slot.
        similarity: n texts and the (n, n) cosines of each with each.
        sweep: results that differ in `config["bias"]`; those without one are ignored.

    Raises:
        InputError: `similarity` has another shape.
    """
    tables = _tables(results)
    models = sorted({table.model for table in tables if table.model} | {profile.model for profile in profiles})
    sections = [
        _section("Scores", _SCORES, map(_scores, tables)),
        _section("Quality against cost", _COST, map(_cost_chart, tables)),
        _section("Intrinsic dimension", _CURVES, map(_curve, profiles)),
        _section("Attention to the slot", BETA, [beta_map(explanation)] if explanation else []),
        _section("Similarity", _SIMILARITY, [cosine_map(*similarity)] if similarity else []),
        _section("Bias", _BIAS, [_sweep_chart(sweep)]),
    ]
    options = "".join(f"<option>{safe(model)}</option>" for model in models)
    choice = f'<label>Model <select id="model"><option value="">all</option>{options}</select></label>'
    body = "\n".join(filter(None, sections)) or "<p>There is nothing to show.</p>"
    return page(_TITLE, _LEAD, _facts(results, sweep), choice if len(models) > 1 else "", body)


@dataclasses.dataclass(frozen=True)
class _Row:
    """A method and config: its result for each column, and the mean with its 95 % interval if there are all."""

    label: str
    cells: tuple[Result | None, ...]
    mean: float | None = None
    low: float | None = None
    high: float | None = None

    @property
    def done(self) -> list[Result]:
        return [cell for cell in self.cells if cell]

    @property
    def kind(self) -> str:
        reference = REFERENCES.get(self.done[0].method)
        return f"{reference} reference" if reference else ""

    @property
    def tokens(self) -> float:
        """Read for a text, over all tasks."""
        return sum(cell.tokens for cell in self.done) / max(1, sum(cell.texts for cell in self.done))


@dataclasses.dataclass(frozen=True)
class _Table:
    suite: str
    model: str  # "": references alone
    columns: list[Column]
    rows: list[_Row]


def _tables(results: Sequence[Result]) -> list[_Table]:
    """For each suite and model, with the suite's references as far as they have the model's tasks."""
    groups: dict[Column, list[Result]] = defaultdict(list)
    for result in results:
        groups[result.suite, "" if result.method in REFERENCES else result.model].append(result)
    tables = []
    for suite, model in sorted(groups):
        own, references = groups[suite, model], groups.get((suite, ""), []) if model else []
        columns = sorted({(result.task, result.data) for result in own})
        if model or not any(other == suite and name for other, name in groups):
            rows = _rows([*own, *references], columns)
            rows.sort(key=lambda row: (row.kind, row.mean is None, -(row.mean or 0), row.label))
            tables.append(_Table(suite, model, columns, rows))
    return tables


def _rows(results: Sequence[Result], columns: Sequence[Column]) -> list[_Row]:
    found: dict[tuple[str, str, str], dict[Column, Result]] = defaultdict(dict)
    for result in results:
        if (result.task, result.data) in columns:
            found[result.model, result.method, result.identity + result.config_hash][result.task, result.data] = result
    first = [next(iter(row.values())) for row in found.values()]
    labels = _labels([(one.model if one.method in REFERENCES else one.method, one.config) for one in first])
    for more in ([one.device for one in first], [one.identity[:8] for one in first]):  # or two models of one name
        alike = Counter(labels)
        labels = [f"{label}, {what}" if alike[label] > 1 else label for label, what in zip(labels, more, strict=True)]
    rows = []
    for label, cells in zip(labels, found.values(), strict=True):
        row = tuple(map(cells.get, columns))
        rows.append(_Row(label, row, *(_mean(list(cells.values())) if len(cells) == len(columns) else ())))
    return rows


def _mean(cells: Sequence[Result]) -> tuple[float, ...]:
    """Mean over tasks, and its interval."""
    whole = mean(cells)
    return whole.value, whole.low, whole.high


def _labels(entries: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """Names, and where one is shared, the options that tell its bearers apart."""
    sharing: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for name, config in entries:
        sharing[name].append(config)
    labels = []
    for name, config in entries:
        differing = {key for other in sharing[name] for key in {*other, *config} if other.get(key) != config.get(key)}
        labels.append(", ".join([name, *(f"{key} {_option(str(config.get(key)))}" for key in sorted(differing))]))
    return labels


def _option(value: str) -> str:
    return value if len(value) <= 24 else f"{value[:12]}… ({zlib.crc32(value.encode()):08x})"


# Tables


def _scores(table: _Table) -> str:
    tasks = _labels([(task, {"data": data[:8]}) for task, data in table.columns])
    by_column = [[row.cells[index] for row in table.rows] for index in range(len(tasks))]
    heads = [
        f"{safe(task)}<small>{safe(next(filter(None, cells)).metric.replace('_', ' '))}</small>"
        for task, cells in zip(tasks, by_column, strict=True)
    ]
    heads += [f"mean<small>{count(len(tasks), 'task')}</small>", "tokens<small>per text</small>"]
    heads += ["passes<small>per text</small>", "seconds<small>in all</small>"]
    columns = [
        [_score_cell(row, cell, step) for row, cell, step in zip(table.rows, cells, steps, strict=True)]
        for cells, steps in ((cells, _ranks([cell.score if cell else None for cell in cells])) for cells in by_column)
    ]
    means = map(_mean_cell, table.rows, _ranks([row.mean for row in table.rows]))
    rows = [
        (_head(row), [*cells, mean, *_cost_cells(row)])
        for row, mean, *cells in zip(table.rows, means, *columns, strict=True)
    ]
    name = f"{table.model or 'references'}, suite {table.suite}"
    return panel(name, grid(name, "method", heads, rows, "scores"), table.model)


def _head(row: _Row) -> str:
    kind = f"<small>{row.kind}</small>" if row.kind else ""
    return f'<span title="config {safe(row.done[0].config_hash)}">{safe(row.label)}</span>{kind}'


def _score_cell(row: _Row, cell: Result | None, step: int | None) -> str:
    if cell is None:
        return coloured(_NOTHING, "not measured")
    title = f"{row.label}, {cell.task}: {number(cell.score)} ({number(cell.low)} to {number(cell.high)}), n = {cell.n}"
    return coloured(number(cell.score), f"{title}, {cell.truncated} of {cell.texts} texts truncated", step)


def _mean_cell(row: _Row, step: int | None) -> str:
    if row.mean is None:
        return coloured(
            f"{len(row.done)} of {count(len(row.cells), 'task')}", "no mean: the other means are over all tasks"
        )
    title = f"{row.label}, mean of {count(len(row.cells), 'task')}: {number(row.mean)}{_interval(row)}"
    small = "" if row.low is None or row.high is None else f"<small>{row.low:.1f} to {row.high:.1f}</small>"
    return coloured(f"{number(row.mean)}{small}", title, step)


def _cost_cells(row: _Row) -> list[str]:
    passes = coloured(str(row.done[0].passes), "forward passes", plain=True)
    if len(row.done) < len(row.cells):
        return [nothing := coloured(_NOTHING, "not all tasks are there"), passes, nothing]
    unit = "words" if row.done[0].method == "tf-idf" else "tokens"
    tokens = f"{sum(cell.tokens for cell in row.done):,} {unit} in all"
    devices = ", ".join(sorted({f"{cell.device} ({cell.hardware})" for cell in row.done}))
    seconds = f"{sum(cell.seconds for cell in row.done):,.1f}"
    return [coloured(f"{row.tokens:,.0f}", tokens, plain=True), passes, coloured(seconds, devices, plain=True)]


def _ranks(values: Sequence[float | None]) -> list[int | None]:
    """Steps of the colour scale by rank, equal values alike; a lone one stands in the middle."""
    known = sorted(value for value in values if value is not None)
    if len(known) == 1:
        return [None if value is None else STEPS // 2 for value in values]
    shares = {value: (known.index(value) + (known.count(value) - 1) / 2) / (len(known) - 1) for value in known}
    return [None if value not in shares else round(shares[value] * (STEPS - 1)) for value in values]


# Charts


def _cost_chart(table: _Table) -> str:
    known = [row for row in table.rows if row.mean is not None]
    rows, references = ([row for row in known if bool(row.kind) == wanted] for wanted in (False, True))
    if not rows:
        return ""
    x = log_axis([row.tokens for row in rows], LEFT, RIGHT)
    y = linear_axis(_ends(known), BOTTOM, TOP)
    spots = apart([(x(row.tokens), y(row.mean or 0)) for row in rows])
    body, taken = [], [(a - 7, b - 7, a + 7, b + 7) for a, b in spots]
    for row in references:
        at = y(row.mean or 0)
        body.append(f'<line class="reference" x1="{LEFT}" x2="{RIGHT}" y1="{at}" y2="{at}"/>')
        body.append(label_beside(f"{row.label}, {row.kind}", WIDTH, at - 9, taken))
    for row, (a, b) in sorted(zip(rows, spots, strict=True), key=lambda pair: pair[1]):
        title = f"{row.label}: {number(row.mean or 0)}{_interval(row)}, {row.tokens:,.0f} tokens per text"
        body.append(mark(f"{title}, forward passes: {row.done[0].passes}", a, b, (row.low, row.high), y))
        body.append(label_beside(row.label, a, b, taken))
    summary = "; ".join(f"{row.label}: {number(row.mean or 0)} at {row.tokens:.0f}" for row in rows)
    names = ("tokens read per text, over all passes (log)", f"mean score, {count(len(table.columns), 'task')}")
    drawing = chart(f"Mean score against tokens read per text. {summary}", x, y, names, body)
    return panel(f"{table.model}, suite {table.suite}", drawing, table.model)


def _curve(profile: Profile) -> str:
    depth = len(profile.curve)
    x = Axis(LEFT, RIGHT, -0.5, depth - 0.5, range(0, depth, depth // 16 + 1))
    y = linear_axis([0, *profile.curve], BOTTOM, TOP)
    body = [
        f'<rect class="chosen" x="{x(layer - 0.5)}" y="{TOP}" width="{x(1) - x(0):.1f}" height="{BOTTOM - TOP}"/>'
        for layer in profile.layers
    ]
    points = {layer: (x(layer), y(value)) for layer, value in enumerate(profile.curve)}
    body.append(line(points.values()))
    body += [
        f'<circle class="d0" cx="{a}" cy="{b}" r="3.5"><title>layer {layer}: {value:.2f}</title></circle>'
        for (layer, (a, b)), value in zip(points.items(), profile.curve, strict=True)
    ]
    chosen = ", ".join(map(str, profile.layers))
    label = f"Intrinsic dimension by layer; least {min(profile.curve):.1f}, most {max(profile.curve):.1f}"
    drawing = chart(f"{label}; chosen: {chosen}", x, y, ("decoder layer", "intrinsic dimension (TwoNN)"), body)
    note = f"<p>Chosen: {chosen}. Measured on {count(profile.count, 'text')}, {safe(profile.texts)}.</p>"
    return panel(profile.model, drawing + note, profile.model)


def _sweep_chart(sweep: Sequence[Result]) -> str:
    lines: dict[tuple[str, str], list[Result]] = defaultdict(list)
    for result in sweep:
        if isinstance(result.config.get("bias"), int | float):
            rest = {key: value for key, value in result.config.items() if key != "bias"}
            name = f"{result.model}, {result.config.get('method', result.method)}, suite {result.suite}"
            lines[name, json.dumps(rest, sort_keys=True)].append(result)
    keys = sorted(lines)
    drawn, keyed = [], []
    for index, (key, name) in enumerate(zip(keys, _labels([(n, json.loads(rest)) for n, rest in keys]), strict=True)):
        columns = sorted({(result.task, result.data) for result in lines[key]})
        rows = sorted(_rows(lines[key], columns), key=_bias)
        drawn.append((name, index % LINES, [row for row in rows if row.mean is not None]))
        lacking = ", ".join(f"{_bias(row):g}" for row in rows if row.mean is None)
        note = f"; without bias {lacking}, where tasks are missing" if lacking else ""
        keyed.append(f'<i class="k{index % LINES}"></i> {safe(name)}, {count(len(columns), "task")}{note}')
    known = [row for _, _, rows in drawn for row in rows]
    if not known:
        return ""
    x, y = linear_axis(map(_bias, known), LEFT + 8, RIGHT - 8), linear_axis(_ends(known), BOTTOM, TOP)
    body, labels = [], []
    for name, colour, rows in drawn:
        spots = [(x(_bias(row)), y(row.mean or 0)) for row in rows]
        body.append(line(spots, colour))
        for row, spot in zip(rows, spots, strict=True):
            labels.append(f"{name}, bias {_bias(row):g}: {number(row.mean or 0)}{_interval(row)}")
            body.append(mark(labels[-1], *spot, (row.low, row.high), y, colour))
    drawing = chart("; ".join(labels), x, y, ("bias added to the slot's logit", "mean score"), body)
    return panel("", f'{drawing}<p class="keys">{"<br>".join(keyed)}</p>')


def _bias(row: _Row) -> float:
    return float(row.done[0].config["bias"])


def _ends(rows: Iterable[_Row]) -> list[float]:
    return [end for row in rows for end in (row.mean, row.low, row.high) if end is not None]


# The page


def _section(title: str, note: str, panels: Iterable[str]) -> str:
    inside = "\n".join(filter(None, panels))
    return f"<section><h2>{title}</h2>\n<p>{note}</p>\n{inside}</section>" if inside else ""


def _facts(results: Sequence[Result], sweep: Sequence[Result]) -> str:
    every = [*results, *sweep]
    facts = {
        "results": [f"{len(results)}" + (f", and {len(sweep)} of the sweep" if sweep else "")],
        "suites": [result.suite for result in every],
        "models": [result.model for result in every if result.method not in REFERENCES],
        "hardware": [result.hardware for result in every],
        "device": [result.device for result in every],
        "made with": [f"{name} {version}" for result in every for name, version in result.versions.items()],
        "this page": [f"written by kvembed {__version__} from stored results; it loads nothing from the network"],
    }
    return "\n".join(
        f"<dt>{name}</dt><dd>{safe('; '.join(sorted(set(values))))}</dd>" for name, values in facts.items() if values
    )


def _interval(row: _Row) -> str:
    return "" if row.low is None or row.high is None else f" (95 % interval {row.low:.1f} to {row.high:.1f})"


_TITLE = "kvembed: text embeddings without training, measured"
_LEAD = "Frozen language models as text-embedding models: how well each method does, on what, and at what cost."
_SCORES = f"""In percent; more is better. Colours go by the rank within the column. Below a mean stands its 95 %
interval (bootstrap over the items of each task); only methods that have every task of the table get one. References
are other models: the lexical one counts words, the trained one was trained to embed.
{legend("lowest", "highest of its column")}"""
_COST = """A point a method, with the 95 % interval of its mean; dashed lines are the references. Points at the same
cost stand side by side. Methods without a mean are not drawn."""
_CURVES = """Of the last token's states, by decoder layer; the chosen layers are shaded. The rule looks for the
least dimension beyond the first fifth of the layers."""
_SIMILARITY = """Cosine of each text with each. The colours span the values off the diagonal."""
_BIAS = """Mean score by the bias of the slot's logit, with 95 % intervals."""
