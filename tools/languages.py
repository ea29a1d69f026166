"""Other languages than English: what Debian's translators made of package descriptions; and how methods do on them.

    python tools/languages.py make FOLDER
    python tools/languages.py run FOLDER smollm2 gemma3-270m=FILE.gguf all-MiniLM-L6-v2=FOLDER

`make` needs `apt-get`, no rights, and leaves the machine's own lists as they are. `run` writes to the ledger under the
suite `languages`, for `auto` twice: fitted on self-written text, and on descriptions in the language. Models are named
as in `tools/results.py`. No text is part of this project.

| task        | kind       | texts, and their gold                                               |
|-------------|------------|---------------------------------------------------------------------|
| packages-xx | retrieval  | 300 long descriptions, by the lines that stand above 100 of them    |
| sections-xx | clustering | such lines of other packages, by section of the archive (not zh_CN) |
| xx.txt      |            | all the long descriptions, to fit on                                |
"""

from __future__ import annotations

import dataclasses
import itertools
import random
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from results import embedders, is_trained, references, run
from unseen import SECTIONS, asked, labelled, one_line, paragraphs, write_task

from kvembed import Embedder
from kvembed.subjects import Subject, embedder_subject
from kvembed.tasks import MINI_TOKENS, load_tasks, sample
from kvembed.texts import read_texts

# One or two of a family or script. Of zh_CN there is enough for retrieval alone, of the others there are a thousand.
LANGUAGES = ("da", "de", "fr", "ja", "ko", "pl", "ru", "zh_CN")
UNSPACED = ("ja", "zh_CN")  # where a line's end is no space
METHODS = ("auto", "static", "kv")
GIVEN = "auto, fitted on the language's texts"
DOCUMENTS, QUERIES, OF_EACH = 300, 100, 25
LONGEST = 200  # characters of a description: of Cyrillic and the like, up to three times as many tokens


def main() -> None:
    """Make the tasks, or run what the ledger lacks of them."""
    arguments = asked(__doc__)
    if arguments.what == "make":
        make(arguments.folder)
        return
    tasks = {task.name: task for task in sample(load_tasks(arguments.folder), "mini")}
    for subject in itertools.chain(references(arguments.models, "mini"), embedders(arguments.models, "mini", METHODS)):
        run(subject, list(tasks.values()), "languages")
    for language in LANGUAGES:
        texts = read_texts([arguments.folder / f"{language}.txt"])
        of_language = [tasks[name] for name in tasks if name.endswith(f"-{language}")]
        for subject in _fitted(arguments.models, texts):
            run(subject, of_language, "languages")


def _fitted(models: Sequence[str], texts: Sequence[str]) -> Iterator[Subject]:
    """`auto` on each backbone among the models, fitted on given texts."""
    for model in models:
        name, _, path = model.partition("=")
        if not is_trained(path):
            embedder = Embedder.from_pretrained(
                path or name, method="auto", dtype="auto", max_tokens=MINI_TOKENS, texts=texts, progress=True
            )
            yield dataclasses.replace(embedder_subject(embedder, name), method=GIVEN)


def make(folder: Path) -> None:
    """Write the tasks' folders, and each language's texts."""
    with tempfile.TemporaryDirectory() as place:
        apt = _lists(Path(place))
        about = dict(_sections(apt))
        for language in LANGUAGES:
            rows = list(_translated(apt, language, about))
            random.Random(0).shuffle(rows)
            documents = [{"id": package, "text": text} for package, _, text in rows[:DOCUMENTS]]
            write_task(
                folder / f"packages-{language}",
                corpus=documents,
                queries=[{"id": package, "text": line} for package, line, _ in rows[:QUERIES]],
                qrels=[{"qid": package, "did": package, "rel": 1} for package, _, _ in rows[:QUERIES]],
            )
            lines = [(about[package], line) for package, line, _ in rows[DOCUMENTS:]]
            if len(lines) >= DOCUMENTS:
                write_task(folder / f"sections-{language}", test=labelled(lines, OF_EACH, shortest=10))
            texts = [text for _, _, text in rows]
            (folder / f"{language}.txt").write_text("\n".join(texts) + "\n")
            print(language, len(rows))


def _lists(place: Path) -> list[str]:
    """Options of apt's commands, for lists in `place`, with all the languages."""
    for part in ("lists/partial", "archives/partial"):
        (place / part).mkdir(parents=True)
    settings = place / "settings"
    languages = " ".join(f'"{language}";' for language in LANGUAGES)
    settings.write_text(f"#clear Acquire::Languages;\nAcquire::Languages {{ {languages} }};\n")
    options = ["-c", str(settings), "-o", f"Dir::State={place}", "-o", f"Dir::Cache={place}"]
    subprocess.run(["apt-get", *options, "update", "--quiet"], check=True)  # noqa: S607
    return options


def _sections(apt: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Package and section, one package of a source: the first that says what it is about."""
    seen: set[str] = set()
    for fields in paragraphs("apt-cache", *apt, "dumpavail"):
        package = fields.get("Package", "")
        source = fields.get("Source", package).partition(" ")[0]
        if fields.get("Section") in SECTIONS and source not in seen:
            seen.add(source)
            yield package, fields["Section"]


def _translated(apt: Sequence[str], language: str, about: dict[str, str]) -> Iterator[tuple[str, str, str]]:
    """Package, the line on it and its long description, of the packages in `about`."""
    found: dict[str, tuple[str, str]] = {}
    between = "" if language in UNSPACED else " "
    wanted = ("Created-By: Translations", f"ShortDesc: Translation-{language}")
    listed = ["apt-get", *apt, "indextargets", "--format", "$(FILENAME)", *wanted]
    for path in subprocess.run(listed, capture_output=True, text=True, check=True).stdout.splitlines():
        for fields in paragraphs("/usr/lib/apt/apt-helper", *apt, "cat-file", path):
            line, *rest = fields.get(f"Description-{language}", "").split("\n ")
            parts = "\n".join(rest).split("\n.\n")
            text = one_line(" ".join(part.replace("\n", between) for part in parts), LONGEST)
            if fields.get("Package") in about and len(line) >= 10 and len(text) >= 40:
                found.setdefault(fields["Package"], (line, text))
    seen: set[str] = set()
    for package, pair in sorted(found.items()):
        if not seen & {*pair}:  # the same words of another package
            seen |= {*pair}
            yield package, *pair


if __name__ == "__main__":
    main()
