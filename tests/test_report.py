import dataclasses
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from conftest import ground

from kvembed.config import EmbedConfig
from kvembed.errors import InputError
from kvembed.explanation import Explanation
from kvembed.layers import Profile
from kvembed.page import DARK, LIGHT
from kvembed.report import report_html
from kvembed.results import Result

NASTY = """<script>alert("x")</script> & 'quotes'\n\U0001f63a \ud800"""


def result(method="kv", task="stsb", score=50.0, **changes):
    config = changes.pop("config", {"method": method, "bias": 1.0})
    fields = {
        "suite": "mini",
        "model": "smollm2",
        "method": method,
        "task": task,
        "kind": "sts",
        "metric": "spearman",
        "score": score,
        "low": score - 3,
        "high": score + 3,
        "n": 250,
        "texts": 500,
        "tokens": 10_000,
        "truncated": 7,
        "passes": 1,
        "seconds": 12.5,
        "config": config,
        "identity": "0123456789abcdef",
        "config_hash": json.dumps(config, default=str),
        "data": f"digest of {task}",
        "device": "cpu, 2 threads, float32",
        "hardware": "Some Processor",
        "versions": {"kvembed": "0.1.0"},
        "replicates": (score - 2, score, score + 2),
    }
    return Result(**fields | changes)


def profile(model="smollm2"):
    return Profile(model, "f", "{text}", "self-written", "s", 1000, (9.0, 7.5, 8.0, 12.0), (0, 1, 2, 3), (1,))


def explanation(tokens=("Context", ": ", NASTY, "\n", "word:")):
    beta = {layer: tuple((layer + i) / 20 for i in range(len(tokens))) for layer in (1, 2)}
    return Explanation("".join(tokens), tokens, tuple(range(len(tokens))), (2, 3), 0, EmbedConfig(method="kv"), beta)


def full(text="a < b", long=False):
    methods = [f"method-{i}" for i in range(9)] if long else ["kv", "mean"]
    tasks = [f"task{i}" for i in range(11)] if long else ["stsb", "mrpc"]
    results = [
        result(method, task, 40.0 + i + j, model=model, tokens=8000 + 900 * i)
        for model in ("smollm2", "other")
        for i, method in enumerate(methods)
        for j, task in enumerate(tasks)
    ]
    results += [result("tf-idf", task, 30.0 + j, model="tf-idf") for j, task in enumerate(tasks)]
    sweep = [result(config={"method": "kv", "bias": bias}, score=40 - bias) for bias in (2.0, -1.0, 0.0)]
    similarity = ([text, "b", "c"], np.array([[1, 0.5, 0.25], [0.5, 1, 0.1], [0.25, 0.1, 1]], np.float32))
    return report_html(
        results,
        profiles=[profile(), profile("other")],
        explanation=explanation(),
        similarity=similarity,
        sweep=sweep,
    )


class Outline(HTMLParser):
    """Headings, the rows of all tables as texts, and whether every tag is closed."""

    VOID = ("meta", "link", "br")

    def __init__(self, page):
        super().__init__()
        self.open, self.headings, self.rows, self.tags = [], [], [], []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & {*self.open}:
            self.rows[-1][-1] += data
        elif self.open and self.open[-1] == "h2":
            self.headings.append(data)


def row(page, name):
    return next(row for row in Outline(page).rows if row[0].startswith(name))


def test_report_sections_follow_the_data():
    everything = [
        "Scores",
        "Quality against cost",
        "Intrinsic dimension",
        "Attention to the slot",
        "Similarity",
        "Bias",
    ]
    assert Outline(full()).headings == everything
    assert Outline(report_html([])).headings == []
    assert "nothing to show" in report_html([])
    assert Outline(report_html([], profiles=[profile()])).headings == ["Intrinsic dimension"]
    assert Outline(report_html([], explanation=explanation())).headings == ["Attention to the slot"]
    assert Outline(report_html([result("tf-idf", model="tf-idf")])).headings == ["Scores"]
    assert Outline(report_html([], sweep=[result()])).headings == ["Bias"]
    assert Outline(report_html([], sweep=[result("tf-idf", config={})])).headings == []
    without_slot = dataclasses.replace(explanation(), beta={})
    assert "Method kv re-routes nothing, so no token reads a slot." in report_html([], explanation=without_slot)


def test_report_is_deterministic():
    assert full() == full()
    assert report_html([result("kv"), result("mean")]) == report_html([result("mean"), result("kv")])


def test_report_escapes_every_text():
    names = {
        name: NASTY for name in ("suite", "model", "method", "task", "metric", "device", "hardware", "config_hash")
    }
    odd = [result(**names, config={"method": NASTY, "bias": bias}, versions={NASTY: NASTY}) for bias in (1.0, 2.0)]
    page = report_html(
        odd,
        profiles=[dataclasses.replace(profile(NASTY), texts=NASTY)],
        explanation=dataclasses.replace(explanation(), config=EmbedConfig(method=NASTY)),
        similarity=([NASTY], np.ones((1, 1))),
        sweep=odd,
    )
    outline = Outline(page)
    assert [tag for tag, _ in outline.tags].count("script") == 1
    assert not [name for _, attributes in outline.tags for name in attributes if name.startswith("on")]
    assert "alert(&quot;x&quot;)" in page
    page.encode()  # a lone surrogate would not go into a file


def test_report_has_the_scores_and_their_tooltips():
    page = report_html([result("kv", "stsb", 61.26), result("kv", "mrpc", 40.0)])
    assert row(page, "kv") == ["kv", "40.0", "61.3", "50.648.7 to 52.5", "20", "1", "25.0"]
    assert "kv, stsb: 61.3 (58.3 to 64.3), n = 250, 7 of 500 texts truncated" in page


def test_report_means_replicates_index_by_index():
    one, other = result(task="a", replicates=(10.0, 90.0)), result(task="b", replicates=(90.0, 10.0))
    assert "50.050.0 to 50.0" in row(report_html([one, other]), "kv")


def test_report_has_no_mean_where_tasks_are_missing():
    some = [result("kv", "a"), result("kv", "b"), result("mean", "a"), result("tf-idf", "a"), result("tf-idf", "c")]
    page = report_html(some)
    assert row(page, "mean") == ["mean", "50.0", "–", "1 of 2 tasks", "–", "1", "–"]  # noqa: RUF001
    assert row(page, "smollm2lexical")[3] == "1 of 2 tasks"  # a task that the model lacks is no column
    assert len(re.findall("<circle", page)) == 1


def test_report_tells_apart_what_only_the_dtype_does():
    both = [result("kv", device=f"cpu, {dtype}", identity=dtype) for dtype in ("float32", "bfloat16")]
    page = report_html([*both, result("mean")])
    assert row(page, "kv, cpu, float32")[1] == row(page, "kv, cpu, bfloat16")[1]
    assert row(page, "mean")
    both = [result("kv", device="cpu", identity=identity) for identity in ("0123456789", "abcdefghij")]
    assert row(report_html(both), "kv, cpu, 01234567")[1] == row(report_html(both), "kv, cpu, abcdefgh")[1]


def test_report_takes_other_data_for_another_task():
    page = report_html([result("kv"), result("mean", data="other")])
    assert "stsb, data digest o" in page
    assert row(page, "kv")[3] == "1 of 2 tasks"


def test_report_puts_references_last_in_each_table_of_their_suite():
    own = [result("kv", score=20.0, model=model) for model in ("a", "b")]
    references = [
        result("tf-idf", score=90.0, model="tf-idf"),
        result("sentence-transformer", score=95.0, model="tiny"),
    ]
    elsewhere = result("tf-idf", score=10.0, model="tf-idf", suite="full")
    outline = Outline(report_html([*references, elsewhere, *own]))
    names = [row[0] for row in outline.rows]
    suite = ["method", "kv", "tf-idflexical reference", "tinytrained reference"]
    assert names == ["method", "tf-idflexical reference", *suite, *suite]


def test_report_tells_configs_of_a_method_apart():
    page = report_html([result(config={"method": "kv", "bias": bias}) for bias in (1.0, 2.0)])
    assert row(page, "kv, bias 1.0")
    assert row(page, "kv, bias 2.0")
    long = "a long template that goes on and on, up to "
    page = report_html([result(config={"method": "kv", "document": long + end}) for end in "ab"])
    assert len({row[0] for row in Outline(page).rows}) == 3


def test_report_colours_by_rank_within_the_column():
    scores = {"a": 1.0, "b": 98.0, "c": 99.0, "d": 98.0}
    page = report_html([result(method, score=score) for method, score in scores.items()])
    steps = {
        method: re.search(rf'class="h(\d)" title="{method}, stsb', page)[1]  # a: 0, b and d: halfway, c: top
        for method in scores
    }
    assert steps == {"a": "0", "b": "4", "d": "4", "c": "9"}


def test_report_sorts_the_sweep_by_bias_and_names_what_it_leaves_out():
    biases = (2.0, -1.0, 0.0)
    sweep = [
        result(f"bias {bias:g}", config={"method": "kv", "bias": bias}, task=task)
        for bias in biases
        for task in ("a", "b")
    ]
    page = report_html([], sweep=[*sweep, result("bias 9", config={"method": "kv", "bias": 9.0}, task="a")])
    points = re.search(r'<polyline class="l0" points="([^"]*)"', page)[1].split()
    xs = [float(point.split(",")[0]) for point in points]
    assert xs == sorted(xs)
    assert len(xs) == 3
    assert "2 tasks; without bias 9, where tasks are missing" in page
    two = report_html([], sweep=[*sweep, *(dataclasses.replace(one, model="other") for one in sweep)])
    assert len(re.findall("<polyline", two)) == 2


def test_report_shows_beta_by_layer_and_its_mean():
    page = report_html([], explanation=explanation(("a b", "", "\n", "d", "e")))
    rows = Outline(page).rows
    assert rows[0][1:4] == ["a·b", "∅", "↵"]
    assert [row[:2] for row in rows[1:]] == [["layer 1", "5"], ["layer 2", "10"], ["mean", "8"]]


def test_report_takes_awkward_numbers():
    costless = [result(tokens=0, texts=0, score=score) for score in (0.0, -0.0)]
    single = dataclasses.replace(profile(), curve=(0.0,), layers=(0,))
    page = report_html(costless, profiles=[single], similarity=([], np.ones((0, 0))), sweep=costless)
    assert "nan" not in page
    assert Outline(page).headings == ["Scores", "Quality against cost", "Intrinsic dimension", "Bias"]


def test_report_refuses_a_similarity_of_another_shape():
    with pytest.raises(InputError, match=r"\(2, 2\)"):
        report_html([], similarity=(["a", "b"], np.ones((2, 3))))


def test_report_is_accessible_and_self_contained():
    outline = Outline(full())
    assert ("html", {"lang": "en"}) in outline.tags
    assert all("scope" in attributes for tag, attributes in outline.tags if tag == "th")
    assert all(a.get("role") == "img" and a.get("aria-label") for tag, a in outline.tags if tag == "svg")
    assert not [a for _, attributes in outline.tags for a in attributes if a in ("src", "action", "srcset")]
    assert "http://" not in full()
    assert "https://" not in full()


@pytest.mark.parametrize(("scale", "ink"), [(LIGHT, lambda i: i >= 7), (DARK, lambda i: i < 6)])
def test_report_scale_has_contrast_and_order(scale, ink):
    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        return np.dot(
            [c / 12.92 if c <= 0.04 else ((c + 0.055) / 1.055) ** 2.4 for c in parts], [0.2126, 0.7152, 0.0722]
        )

    values = [luminance(colour) for colour in scale]
    assert values == sorted(values, reverse=scale is LIGHT)
    ratios = [1.05 / (v + 0.05) if ink(i) else (v + 0.05) / 0.05 for i, v in enumerate(values)]
    assert min(ratios) >= 4.5


@pytest.fixture
def show(browser, tmp_path):
    def show(page, theme="light", width=1400):
        path = tmp_path / "page.html"
        path.write_text(page, encoding="utf-8")
        media = {"features": [{"name": "prefers-color-scheme", "value": theme}]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.get(path.as_uri())
        return browser

    return show


@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_report_in_a_browser(show, theme, width):
    browser = show(full(NASTY, long=True), theme, width)
    assert browser.title.startswith("kvembed")
    assert (ground(browser)[0] > 128) == (theme == "light")
    assert browser.execute_script("return performance.getEntriesByType('resource')") == []
    assert browser.execute_script("return innerWidth") == width
    browser.execute_script("scrollTo(500, 0)")
    assert browser.execute_script("return [scrollX, document.documentElement.scrollWidth <= innerWidth]") == [0, True]
    sizes = browser.execute_script(
        "return [...document.querySelectorAll('table, svg')].map(e => [e.getClientRects()[0].width, "
        "e.parentNode.getClientRects()[0].width])"
    )
    assert all(min(pair) > 0 for pair in sizes)
    assert any(inner > outer for inner, outer in sizes) == (width == 400)  # there it scrolls in its own box
    assert browser.get_log("browser") == []


def test_report_theme_button(show):
    browser = show(full(), "dark")
    seen = [ground(browser)]
    for _ in range(2):
        browser.find_element("id", "theme").click()
        seen.append(ground(browser))
    assert seen[0] == seen[2] != seen[1]
    assert seen[1] == [255, 255, 255]


def test_report_model_choice(show):
    browser = show(full())
    visible = "return [...document.querySelectorAll('article')].filter(e => e.offsetHeight).map(e => e.dataset.model)"
    assert {*browser.execute_script(visible)} == {"", "smollm2", "other"}
    browser.find_element("id", "model").send_keys("other")
    assert {*browser.execute_script(visible)} == {"", "other"}
    assert browser.get_log("browser") == []


def test_report_labels_do_not_cover_each_other(show):
    browser = show(full(long=True))
    boxes = browser.execute_script(
        "return [...document.querySelector('svg').querySelectorAll('.label')].map(e => {const r = "
        "e.getBoundingClientRect(); return [r.left, r.top + 3, r.right, r.bottom - 3]})"
    )
    pairs = [(a, b) for i, a in enumerate(boxes) for b in boxes[:i]]
    assert len(boxes) == 10
    assert not [1 for a, b in pairs if a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]]
