"""What `import kvembed` offers, and what it costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import kvembed


def test_the_public_names():
    assert kvembed.__all__ == sorted(kvembed.__all__, key=lambda name: (not name.isupper(), name.startswith("_"), name))
    assert set(kvembed.__all__) == {
        *("METHODS", "EmbedConfig", "Embedder", "Encoded", "Explanation", "Readout", "Role", "__version__"),
        *("InputError", "KvembedError", "ModelNotFound", "OutOfMemory", "TextTooLong", "UnsupportedModel"),
    }
    assert all(getattr(kvembed, name) is not None for name in kvembed.__all__)
    assert set(dir(kvembed)) == set(kvembed.__all__)


@pytest.mark.slow
def test_a_type_checker_knows_the_names(tmp_path):
    (tmp_path / "user.py").write_text(
        "from kvembed import Embeder, Embedder\ndef f(one: Embedder) -> None:\n    one.foo()\n"
    )
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path / "cache"), "user.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert 'Module "kvembed" has no attribute "Embeder"' in done.stdout
    assert '"Embedder" has no attribute "foo"' in done.stdout


def test_importing_the_package_or_the_command_line_does_not_import_torch():
    code = "import sys, kvembed, kvembed.cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_no_module_is_imported_by_one_it_imports():
    package = Path(kvembed.__file__).parent
    imported = {path.stem: set(_imported_at_once(path)) for path in package.glob("*.py")}
    assert imported["embedder"] >= {"backbone", "models", "config"}
    TopologicalSorter(imported).prepare()  # raises for a cycle, and names it


def _imported_at_once(path):
    """Modules of the package that one needs before its own first line has run: not those that functions import."""
    for statement in ast.parse(path.read_text()).body:
        if isinstance(statement, ast.ImportFrom) and statement.level == 1:
            yield from [statement.module] if statement.module else [alias.name for alias in statement.names]
