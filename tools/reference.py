"""Write docs/cli.md and docs/python.md, the references of the command line and of the Python names, from the code.

python tools/reference.py           writes them
python tools/reference.py --check   exits 1 if they are not what would be written now
"""

from __future__ import annotations

import html
import re
import subprocess
import sys
from collections.abc import Iterator
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
    """docs/python.md: what `import kvembed` offers, by its docstrings; read by griffe, which does not run the code."""
    package: Any = griffe.load("kvembed", search_paths=[ROOT / "src"], docstring_parser="google")
    lines = ["# Python", MADE.format("the docstrings of what `import kvembed` offers")]
    names = sorted(package.exports, key=lambda name: (name != "Embedder", name.startswith("__"), name.isupper(), name))
    for name in names:
        member = package[name]
        lines.append(f"## `{name}`")
        if member.is_attribute:
            value = f"`{member.annotation}`: " if member.annotation else ""
            told = {"METHODS": "the presets by name, see [choosing a model](models.md).", "__version__": "the version."}
            lines.append(f"{value}{told[name]}")
            continue
        lines += _docstring(member)
        for method in member.members.values():
            if method.is_function and method.is_public and not method.name.startswith("_"):
                lines += [f"### `{name}.{method.name}`", _signature(method), *_docstring(method)]
            elif method.is_attribute and method.is_public and "property" in method.labels:
                lines += [f"### `{name}.{method.name}`", f"Property, `{method.annotation}`.", *_docstring(method)]
    return "\n\n".join(lines) + "\n"


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
    call = f"{function.name}({', '.join(given)}) -> {function.returns}"
    if len(call) > 100:
        call = f"{function.name}(\n" + "".join(f"    {part},\n" for part in given) + f") -> {function.returns}"
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
