"""Five tasks that no choice was made on, from packages of Debian; and how methods do on them.

    python tools/unseen.py make FOLDER
    python tools/unseen.py run FOLDER smollm2 gemma3-270m=FILE.gguf all-MiniLM-L6-v2=FOLDER

`make` needs `apt-get` and `dpkg-deb`, with Debian's packages listed. `run` writes to the ledger under the suite
`unseen`; models are named as in `tools/results.py`. What a task is was written down before anything was scored on it,
`auto` being what it is; tasks are cut to the sizes of `mini`. Licences: those of the packages; no text is part of this
project.

| task            | kind           | texts, and their gold                                                             |
|-----------------|----------------|-----------------------------------------------------------------------------------|
| debian-sections | clustering     | packages in a line each, by section of the archive                                |
| foldoc-fields   | classification | what FOLDOC says of a term of computing, by its field                             |
| fortunes        | classification | sayings and jokes, by subject                                                     |
| wordnet-kinds   | clustering     | WordNet's glosses of nouns, by lexicographers' file                               |
| wordnet-webster | retrieval      | Webster's of 1913 on a noun, by WordNet's gloss of it (nouns of one sense alone)  |
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import random
import re
import string
import subprocess
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from results import embedders, references, run

from kvembed.tasks import load_tasks, sample

PACKAGES = ("dict-foldoc", "dict-gcide", "fortunes", "fortunes-min", "wordnet-base")
METHODS = ("auto", "static", "kv", "prompt-eol", "mean")
LONGEST = 400  # characters of a text
# Of the archive's sections, those that say what a program is about, not in which form it comes.
SECTIONS = (
    *("admin", "comm", "database", "editors", "electronics", "fonts", "games", "gnome", "graphics", "hamradio"),
    *("mail", "math", "net", "news", "science", "shells", "sound", "text", "video", "web"),
)
SUBJECTS = (
    *("art", "computers", "education", "food", "kids", "law", "love", "medicine", "news", "pets", "politics"),
    *("science", "sports", "work"),
)
FIELDS = 12
OF_EACH = 50  # texts of a cluster
DIGITS = string.ascii_uppercase + string.ascii_lowercase + string.digits + "+/"  # of dictd's numbers


def main() -> None:
    """Make the tasks, or run what the ledger lacks of them."""
    arguments = asked(__doc__)
    if arguments.what == "make":
        make(arguments.folder)
        return
    tasks = sample(load_tasks(arguments.folder), "mini")
    for subject in itertools.chain(references(arguments.models, "mini"), embedders(arguments.models, "mini", METHODS)):
        run(subject, tasks, "unseen")


def asked(about: str | None) -> argparse.Namespace:
    """What to do, in which folder, with which models."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["make", "run"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("models", nargs="*", default=["smollm2"])
    return parser.parse_args()


def make(folder: Path) -> None:
    """Write the tasks' folders."""
    with tempfile.TemporaryDirectory() as place:
        subprocess.run(["apt-get", "download", "--quiet", *PACKAGES], cwd=place, check=True)  # noqa: S607
        for package in Path(place).glob("*.deb"):
            subprocess.run(["dpkg-deb", "--extract", package, place], check=True)  # noqa: S607
        share = Path(place, "usr/share")
        write_task(folder / "debian-sections", test=labelled(_sections(), OF_EACH))
        for name, found in (("foldoc-fields", _fields(share / "dictd")), ("fortunes", _fortunes(share / "games"))):
            rows = labelled(found)
            write_task(folder / name, train=rows[::2], test=rows[1::2])
        write_task(folder / "wordnet-kinds", test=labelled(_kinds(share / "wordnet"), OF_EACH))
        pairs = list(_pairs(share))
        write_task(
            folder / "wordnet-webster",
            corpus=[{"id": noun, "text": entry} for noun, _, entry in pairs],
            queries=[{"id": noun, "text": gloss} for noun, gloss, _ in pairs],
            qrels=[{"qid": noun, "did": noun, "rel": 1} for noun, _, _ in pairs],
        )


def write_task(home: Path, **files: Iterable[Mapping[str, object]]) -> None:
    """A folder with a JSON Lines file of each name."""
    home.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        (home / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def labelled(found: Iterable[tuple[str, str]], most: int | None = None, *, shortest: int = 20) -> list[dict[str, str]]:
    """(label, text) -> rows in random order, at most so many of a label; what is there twice, once."""
    by_label: dict[str, list[str]] = defaultdict(list)
    seen: set[str] = set()
    for label, text in found:
        if len(text) >= shortest and text not in seen:
            seen.add(text)
            by_label[label].append(text)
    draw = random.Random(0)
    rows = [
        {"label": label, "text": text}
        for label, texts in sorted(by_label.items())
        for text in draw.sample(texts, min(len(texts), most or len(texts)))
    ]
    draw.shuffle(rows)
    return rows


def one_line(text: str, longest: int = LONGEST) -> str:
    """In one line, whole words, if there are spaces between them, and at most so many characters."""
    text = " ".join(text.split())
    return text if len(text) <= longest else text[:longest].rpartition(" ")[0] or text[:longest]


def paragraphs(*command: str) -> Iterator[dict[str, str]]:
    """The fields of each paragraph that one of apt's commands prints; lines that go on, as they are."""
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for paragraph in text.split("\n\n"):
        yield dict(re.findall(r"^([\w-]+): (.*(?:\n .*)*)", paragraph, re.MULTILINE))


def _sections() -> Iterator[tuple[str, str]]:
    for package in paragraphs("apt-cache", "dumpavail"):
        if package.get("Section") in SECTIONS and "Description" in package:
            yield package["Section"], one_line(package["Description"].partition("\n")[0])


def _fields(dictd: Path) -> Iterator[tuple[str, str]]:
    found = []
    for _, entry in _entries(dictd, "foldoc"):
        body = re.search(r"<([a-z ]+)>(.+)", entry, re.DOTALL)
        if body:
            paragraphs = re.sub(r"[{}]", "", body[2]).split("\n\n")
            found.append((body[1], one_line(paragraphs[0])))
    counts = Counter(field for field, _ in found)
    chosen = sorted(counts, key=lambda field: (-counts[field], field))[:FIELDS]
    yield from (pair for pair in found if pair[0] in chosen)


def _fortunes(games: Path) -> Iterator[tuple[str, str]]:
    for subject in SUBJECTS:
        for saying in re.split(r"^%\s*$", (games / "fortunes" / subject).read_text(), flags=re.MULTILINE):
            yield subject, one_line(re.split(r"\n\s*-- ", saying)[0])


def _nouns(wordnet: Path) -> Iterator[tuple[str, list[str], str]]:
    """Lexicographer's file, words and gloss of each."""
    for line in (wordnet / "data.noun").read_text().splitlines():
        if not line.startswith(" "):
            fields, _, gloss = line.partition(" | ")
            parts = fields.split()
            words = parts[4 : 4 + 2 * int(parts[3], 16) : 2]
            yield parts[1], words, one_line(gloss.partition(';"')[0].partition('; "')[0])


def _kinds(wordnet: Path) -> Iterator[tuple[str, str]]:
    yield from ((kind, gloss) for kind, _, gloss in _nouns(wordnet) if kind != "03")  # of the topmost ones


def _pairs(share: Path) -> Iterator[tuple[str, str, str]]:
    """Noun, WordNet's gloss and Webster's entry, of nouns that have one of each."""
    glosses: dict[str, list[str]] = defaultdict(list)
    for _, words, gloss in _nouns(share / "wordnet"):
        for word in words:
            glosses[word.lower()].append(gloss)
    entries: dict[str, list[str]] = defaultdict(list)
    for word, entry in _entries(share / "dictd", "gcide"):
        head = re.match(r"[^\\]+\\[^\\]+\\,? n\.(.+)", entry, re.DOTALL)
        if head and "WordNet" not in entry and "1913 Webster" in entry:
            text = re.sub(r"\[[^\]]*\]|[{}]|^\s*\d+\.", "", head[1], flags=re.MULTILINE)
            entries[word.lower()].append(one_line(text))
    draw = random.Random(0)
    both = [noun for noun in sorted(glosses) if len(glosses[noun]) == 1 and len(entries[noun]) == 1 and noun.isalpha()]
    for noun in draw.sample(both, 2000):
        gloss, entry = glosses[noun][0], entries[noun][0]
        if len(gloss) >= 20 and len(entry) >= 20:
            yield noun, gloss, entry


def _entries(dictd: Path, name: str) -> Iterator[tuple[str, str]]:
    """Headword and text of a dictionary in dictd's format: an index of base-64 numbers, and a compressed file."""
    text = gzip.decompress((dictd / f"{name}.dict.dz").read_bytes())
    words: dict[tuple[int, int], str] = {}
    for line in (dictd / f"{name}.index").read_text().splitlines():
        word, start, length = line.split("\t")[:3]
        words.setdefault((_number(start), _number(length)), word)
    for (begin, size), word in sorted(words.items()):
        yield word, text[begin : begin + size].decode(errors="replace")


def _number(digits: str) -> int:
    value = 0
    for digit in digits:
        value = value * len(DIGITS) + DIGITS.index(digit)
    return value


if __name__ == "__main__":
    main()
