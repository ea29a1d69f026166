"""The audit of dependencies tells a finding from a service that is silent; and nothing of ours runs what it loads."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def audit():
    spec = importlib.util.spec_from_file_location("audit", ROOT / "tools" / "audit.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(audit, monkeypatch, capsys):
    """Run the tool against made-up answers: of pip-audit (one for the question of trust, one for the rest) and pip."""

    def run(*answers, pip="", pip_code=0, offline=()):
        given = iter(answers)

        def ran(command, **_):
            if "pip_audit" in command:
                return SimpleNamespace(stdout=next(given), stderr="", returncode=1)
            return SimpleNamespace(stdout="", stderr=pip, returncode=pip_code)

        monkeypatch.setattr(audit.subprocess, "run", ran)
        monkeypatch.setattr(audit, "offline", lambda: list(offline))
        monkeypatch.setattr(audit.sys, "argv", ["audit.py"])
        code = audit.main()
        return code, *capsys.readouterr()

    return run


def answer(*rows):
    return json.dumps({"dependencies": rows, "fixes": []})


HOLE = answer({"name": "jinja2", "version": "3.1.2", "vulns": [{"id": "CVE-1"}]})
SKIPPED = answer({"name": "jinja2", "skip_reason": "not found"})
CLEAN = answer({"name": "numpy", "version": "2", "vulns": []})


def test_all_is_well(run):
    assert run(HOLE, CLEAN) == (0, "", "")


@pytest.mark.parametrize("trust", [SKIPPED, CLEAN, "", "Traceback"])
def test_a_service_that_does_not_know_the_known_hole_clears_nothing(run, trust):
    code, out, error = run(trust)
    assert (code, out) == (3, "")
    assert "does not answer" in error


def test_findings_are_told_and_fail(run):
    assert run(HOLE, HOLE)[:2] == (1, "jinja2 3.1.2: CVE-1\n")
    assert run(SKIPPED, offline=["numpy: licence not told"])[:2] == (1, "numpy: licence not told\n")
    warning = "WARNING: The candidate selected for download or install is a yanked version: 'a' candidate (version 1)\n"
    assert run(HOLE, CLEAN, pip=warning)[:2] == (1, "yanked version: 'a' candidate (version 1)\n")


def test_what_was_not_audited_is_no_finding(run):
    assert run(HOLE, SKIPPED)[0] == 3
    assert run(HOLE, "")[0] == 3
    assert run(HOLE, CLEAN, pip_code=1)[0] == 3


def test_pins(audit):
    installed = {"torch": "2.13.0+cpu", "a": "1", "b": "2", "pip": "23"}
    assert list(audit.unpinned(installed, {"torch": "2.13.0", "b": "3", "c": "4"})) == [
        "a: 1 installed, not pinned",
        "b: 2 installed, 3 pinned",
    ]
    assert audit.pins()["huggingface-hub"]


@pytest.mark.parametrize(
    ("text", "fine"),
    [
        ("Apache-2.0 AND CNRI-Python", True),
        ("BSD License", True),
        ("MPL-2.0 AND MIT", True),
        ("GPLv2", False),
        ("MIT; GNU Lesser General Public License v3 (LGPLv3)", False),
        ("Other/Proprietary License", False),
        ("", False),
        ("PERMITTED", False),
    ],
)
def test_licences(audit, text, fine):
    assert audit.acceptable(text) == fine


def test_nothing_runs_what_it_loads():
    """What ruff's security rules do not know of: pickles through torch and NumPy, and code that comes with a model."""
    for path in sorted((ROOT / "src").rglob("*.py")):
        found = re.findall(r"torch\.load\b|allow_pickle=True|trust_remote_code=True|\bjoblib\b", path.read_text())
        assert not found, path
