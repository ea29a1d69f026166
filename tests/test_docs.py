"""The documentation: what it shows is run, what is generated is fresh, and the site needs nothing from elsewhere."""

from __future__ import annotations

import functools
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import NOTICES, ground, tiny
from pages import Runner, blocks, differs, shown_by
from selenium.webdriver.support.ui import WebDriverWait

from kvembed import Embedder, models

ROOT = Path(__file__).parent.parent
GENERATED = {"cli.md", "python.md", "families.md", "results.md", "speed.md"}
PAGES = [ROOT / "README.md", *sorted(path for path in (ROOT / "docs").glob("*.md") if path.name not in GENERATED)]
PAGES = [path for path in PAGES if blocks(path.read_text())]


@pytest.fixture(scope="module")
def tiny_folder(tokenizer, tmp_path_factory):
    """A plain random model, deep and wide enough for any number on the pages."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny(num_hidden_layers=10, hidden_size=256, max_position_embeddings=2048).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def loaded():
    """Models are loaded once for all pages."""
    load, kept = models.load, {}

    def cached(name, **options):
        key = json.dumps([os.path.abspath(models._local_folder(name) or name), options], default=str)
        if key not in kept:
            kept[key] = load(name, **options)
        return kept[key]

    return cached


@pytest.fixture(scope="module")
def real(loaded):
    """The default model's folder, and an embedder."""
    folder = models.pull("smollm2")
    return folder, Embedder.from_model(*loaded(str(folder), dtype="auto", device="auto"))


@pytest.fixture
def runner(tmp_path, tiny_folder, real, loaded, monkeypatch):
    """Runs blocks in a folder that has what the pages speak of."""
    home = tmp_path / "home"
    (home / "corpus").mkdir(parents=True)
    (home / "notices.txt").write_text("\n".join(NOTICES) + "\n")
    (home / "notes.txt").write_text("\n".join(NOTICES[:12]) + "\n")
    texts = [f"{a.split()[-2]} {a.split()[-1]} {b.split()[-1]}" for a in NOTICES[:12] for b in NOTICES[12:22]]
    (home / "my-texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    rows = [{"key": f"note {i}", "text": text, "body": text} for i, text in enumerate(NOTICES)]
    (home / "corpus" / "notes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (home / "notes").mkdir()
    (home / "notes" / "ferry.md").write_text("# Ferry\n\n" + "\n\n".join(NOTICES))
    rows = [row | {"key": f"note-{number}", "lang": "de", "year": 2000 + number} for number, row in enumerate(rows)]
    (home / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (home / "queries.jsonl").write_text("".join(json.dumps({"id": i, "text": NOTICES[i]}) + "\n" for i in range(3)))
    smollm2, embedder = real
    monkeypatch.setenv("KVEMBED_CACHE", str(tmp_path / "cache"))  # what pages store outlives no test
    monkeypatch.setattr("kvembed.self_written.write_texts", lambda *_, **__: texts)  # a random model's say nothing more
    monkeypatch.setattr(models, "load", loaded)
    monkeypatch.setattr("kvembed.layers.load", loaded)
    names = {"Embedder": Embedder, "embedder": embedder, "model": embedder.model, "tokenizer": embedder.tokenizer}
    runner = Runner(home, names, smollm2, tiny_folder, monkeypatch)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # most of this is short, and two threads on busy cores wait for each other
    for block in blocks((ROOT / "docs" / "evaluation.md").read_text()):
        if block.title:
            runner.run(block)
    with runner.stack:
        yield runner
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("shown", "got", "same"),
    [
        ("a  b\n", "a b", True),
        ("a ...\nc", "a b\n\nc", True),
        ("a ... c", "a b", False),
        ("[[0.90 1.5]]", "[[0.91 1.5]]", True),
        ("[[0.90 1.5]]", "[[0.95 1.5]]", False),
        ("x 12", "x 13", False),
        ("a", "a b", False),
    ],
)
def test_what_counts_as_the_same_output(shown, got, same):
    assert (differs(shown, got) is None) == same


def test_what_a_snippet_says_it_prints():
    code = "x = 1  # one\n# a remark\nprint(x)  # 1\n# 2\n\nfor y in ():\n    print(y)\n# 3\nx = 2  # no\n"
    assert shown_by(code) == "1\n2\n3"


@pytest.mark.real
def test_a_page_that_is_wrong_fails(runner):
    wrong = ["```console\n$ kvembed embed --gone\n```", "```python\nprint(1)  # 2\n```", "```console\n$ echo a\nb\n```"]
    wrong += ["```console\n$ kvembed embed gone.txt\n```", "```console\n$ kvembed eval --mteb Some --gone\n```"]
    for text in wrong:
        (block,) = blocks(text)
        with pytest.raises(AssertionError):
            runner.run(block)


@pytest.mark.real
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_shows_is_so(runner, page):
    for block in blocks(page.read_text()):
        runner.run(block)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site, behind a server that has nothing else."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder]
    subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"})
    handler = functools.partial(Quiet, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves a folder and says nothing."""

    def log_message(self, *_):
        pass


def test_no_page_loads_anything_from_elsewhere(site):
    """Links lead out; scripts, styles, fonts and pictures do not."""
    folder, _ = site
    pages = [*folder.rglob("*.html")]
    assert {path.stem for path in PAGES} - {"README", "index"} < {page.parent.name for page in pages}
    for page in pages:
        text = page.read_text()
        tags = re.findall(r"<(?!a\b)[a-z]+\b[^>]*>", text)
        assert not [tag for tag in tags if re.search(r"""(src|href|srcset|data|action)=["']?(https?:)?//""", tag)], page
        assert not re.search(r"@import|url\(\s*[\"']?(https?:)?//", text)
    for style in folder.rglob("*.css"):
        assert not re.search(r"@import|url\(\s*[\"']?(https?:)?//", style.read_text())


def test_the_site_in_a_browser_light_and_dark_with_search(site, browser):
    _, address = site
    browser.set_window_size(1300, 1000)
    for name in ("", "method", "faq", "results"):
        browser.get(f"{address}/{name}")
        loaded = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
        assert all(one.startswith((address, "data:", "blob:")) for one in loaded), loaded
    grounds = [sum(ground(browser))]
    for palette in (1, 2):  # from the system's to light, and to dark
        browser.execute_script(f"document.querySelector('label.md-header__button[for=__palette_{palette}]').click()")
        grounds.append(sum(ground(browser)))
    assert min(grounds) < 200 < 600 < max(grounds)
    box = browser.find_element("css selector", "input.md-search__input")
    browser.execute_script("document.querySelector('#__search').click()")
    box.send_keys("crash")
    # Read in one go: while one types, the page makes its list anew.
    links = "return [...document.querySelectorAll('.md-search-result__link')].map(link => link.href)"
    WebDriverWait(browser, 20).until(lambda browser: "/faq/" in "".join(browser.execute_script(links)[:1]))
    severe = [line for line in browser.get_log("browser") if line["level"] == "SEVERE"]
    assert not severe


def test_the_readme_says_what_every_module_holds():
    """The table of files names each module once, and none that is gone."""
    table = (ROOT / "README.md").read_text().partition("| file | what it holds |")[2].partition("\n\n")[0]
    told = [name for row in table.splitlines() for name in re.findall(r"`(\w+)`", row.partition(" | ")[0])]
    modules = {path.stem for path in (ROOT / "src" / "kvembed").glob("*.py")} - {"__init__", "__main__"}
    assert sorted(told) == sorted(modules)
