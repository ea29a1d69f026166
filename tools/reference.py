"""Write docs/cli.md and docs/python.md, the references of the command line and of the Python names, from the code.

python tools/reference.py           writes them
python tools/reference.py --check   exits 1 if they are not what would be written now
"""

from __future__ import annotations

import html
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import griffe

ROOT = Path(__file__).resolve().parent.parent
MADE = "Made by `make reference` from {}; nothing here is typed by hand."
HEADS = {
    "parameters": "Arguments",
    "returns": "Returns",
    "raises": "Raises",
    "yields": "Yields",
    "attributes": "Fields",
}
# What docs/ show from modules of their own, each behind an extra: module -> name -> its methods for users. The rest of
# those modules serves the command line.
MORE: dict[str, dict[str, tuple[str, ...]]] = {
    "bulk": {"bulk": (), "Summary": ()},
    "bulk_ray": {"ray_engine": ()},
    "documents": {"Corpus": ("__init__", "calibration")},
    "index": {"Index": ("create", "open", "exists", "update", "search", "search_many")},
    "indexing": {"Indexed": ()},
    "hits": {"Hit": ()},
    "results": {"read_results": (), "mean": (), "difference": (), "Estimate": ("sign",), "Result": ()},
    "mteb_encoder": {"MtebEncoder": (), "run_mteb": ()},
}


def cli_page() -> str:
    """docs/cli.md: every command's help, as Typer's own tool writes it."""
    command = [sys.executable, "-m", "typer", "kvembed.cli", "utils", "docs", "--name", "kvembed", "--title", "TITLE"]
    text = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    text = re.sub(r"\*\*Commands\*\*:\n.*?(?=\n## )", "", text, count=1, flags=re.DOTALL)  # in full below
    return (
        html.unescape(text).replace("# TITLE", f"# Command line\n\n{MADE.format('`kvembed COMMAND --help`')}").strip()
        + "\n"
    )


def python_page() -> str:
    """docs/python.md: what users import, by its docstrings; read by griffe, which does not run the code."""
    package: Any = griffe.load(
        "kvembed",
        search_paths=[ROOT / "src"],
        docstring_parser="google",
        docstring_options={"returns_multiple_items": False},
    )
    lines = ["# Python", MADE.format("docstrings")]
    lines.append("What `import kvembed` offers comes first; then, by module, what needs an extra to be installed.")
    names = sorted(package.exports, key=lambda name: (name != "Embedder", name.startswith("__"), name.isupper(), name))
    for name in names:
        member = package[name]
        if member.is_attribute:
            value = f"`{member.annotation}`: " if member.annotation else ""
            told = {
                "METHODS": "the presets by name, see [choosing a model](models.md).",
                "Role": 'the type of a text\'s role, `"document"` or `"query"`: which template it is put in.',
                "__version__": "the version.",
            }
            lines += [f"## `{name}`", f"{value}{told[name]}"]
        else:
            lines += _entry(name, member, [one.name for one in member.members.values() if _is_public(one)])
    for module, entries in MORE.items():
        for name, methods in entries.items():
            lines += _entry(f"{module}.{name}", package[f"{module}.{name}"], methods)
    return "\n\n".join(lines) + "\n"


def _is_public(member: Any) -> bool:
    return bool(
        member.is_public
        and not member.name.startswith("_")
        and (member.is_function or (member.is_attribute and "property" in member.labels))
    )


def _entry(name: str, member: Any, methods: Sequence[str]) -> Iterator[str]:
    """A heading, a signature and the docstring, then those of methods."""
    yield f"## `{name}`"
    if member.is_function:
        yield _signature(member)
    yield from _docstring(member)
    for method in (member[one] for one in methods):
        yield f"### `{name}.{method.name}`" if method.name != "__init__" else f"### `{name}(...)`"
        yield f"Property, `{method.annotation}`." if method.is_attribute else _signature(method)
        yield from _docstring(method)


def _signature(function: Any) -> str:
    given = []
    for one in function.parameters:
        if one.name in ("self", "cls"):
            continue
        kind = one.kind.value
        if kind == "keyword-only" and "*" not in given:
            given.append("*")
        default = f" = {one.default}" if one.default is not None and not kind.startswith("variadic") else ""
        stars = "**" if kind == "variadic keyword" else ""
        given.append(f"{stars}{one.name}: {one.annotation}{default}")
    made = function.name == "__init__"
    name, returns = (function.parent.name, "") if made else (function.name, f" -> {function.returns}")
    call = f"{name}({', '.join(given)}){returns}"
    if len(call) > 100:
        call = f"{name}(\n" + "".join(f"    {part},\n" for part in given) + f"){returns}"
    return f"```python\n{call}\n```"


def _docstring(thing: Any) -> Iterator[str]:
    """The parts of a docstring as Markdown."""
    for part in thing.docstring.parsed if thing.docstring else ():
        if part.kind.value == "text":
            yield part.value
            continue
        rows = []
        for one in part.value:
            name = getattr(one, "name", "") or (f"{one.annotation}" if part.kind.value == "raises" else "")
            rows.append(f"- {f'`{name}`: ' if name else ''}{' '.join(one.description.split())}")
        yield f"{HEADS[part.kind.value]}:\n\n" + "\n".join(rows)


def main() -> int:
    """Returns the exit code."""
    made = {ROOT / "docs" / "cli.md": cli_page(), ROOT / "docs" / "python.md": python_page()}
    stale = [path for path, text in made.items() if not path.is_file() or path.read_text() != text]
    if "--check" in sys.argv[1:]:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is stale: run `make reference`", file=sys.stderr)
        return int(bool(stale))
    for path in stale:
        path.write_text(made[path])
    return 0


if __name__ == "__main__":
    sys.exit(main())
