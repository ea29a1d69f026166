"""Runs what a page of the documentation shows: its ```console and ```python blocks, from top to bottom, in one folder.

A block that shows output runs on the model it names, and must give that output: `...` stands for anything, white space
does not matter, and a number with a decimal point may be off by 0.03, since processors round bfloat16 differently. A
block that shows none, and starts no server, runs on a tiny random model under whatever name it uses, and must end well.
What can't be run here (pip, a container, the network, a package that isn't installed) must at least parse. A block with
a title is a file.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
import tokenize
from typing import NamedTuple

from conftest import running
from typer.testing import CliRunner

from kvembed import cli, models, saved, server

BLOCK = re.compile(r'^```(\w+)(?: title="(.+?)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
NOT_HERE = re.compile(r"^(pip|make|docker|serve|ray) |--mteb|--engine ray|--devices")
NOT_HERE_CODE = re.compile(
    r"mteb\.evaluate|langchain_(huggingface|openai)|llama_index\.embeddings|haystack_integrations"
)
ADDRESS = "http://127.0.0.1:8000"
NUMBER = re.compile(r"(-?\d+\.\d+)")


class Block(NamedTuple):
    language: str
    title: str
    text: str
    line: int


def blocks(text):
    return [
        Block(found[1], found[2] or "", found[3], text[: found.start()].count("\n") + 1)
        for found in BLOCK.finditer(text)
    ]


def differs(shown, got):
    """Why `got` is not what the page shows, or None."""
    parts = NUMBER.split(" ".join(shown.split()))  # words, number, words, ...
    parts[::2] = [re.escape(part).replace(r"\.\.\.", ".*?").replace(r"\ ", r"\s*") for part in parts[::2]]
    parts[1::2] = [NUMBER.pattern] * len(parts[1::2])
    found = re.fullmatch("".join(parts), " ".join(got.split()))
    if found is None:
        return "other words"
    pairs = zip(NUMBER.findall(shown), found.groups(), strict=True)
    off = [f"{a} but {b}" for a, b in pairs if abs(float(a) - float(b)) > 0.03]
    return ", ".join(off) or None


def shown_by(code):
    """What a snippet says that it prints: comments after a `print`, and on the lines that follow the statement."""
    lines, printing = [], False
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        if token.type == tokenize.COMMENT and printing:
            lines.append(token.string.removeprefix("#").removeprefix(" "))
        elif token.type not in (tokenize.NL, tokenize.COMMENT, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT):
            printing = "print(" in token.line
    return "\n".join(lines)


class Runner:
    """One page at work.

    Args:
        home: an empty folder to work in.
        names: what Python blocks find defined.
        smollm2, tiny: folders of the models.
        monkeypatch: pytest's.
    """

    def __init__(self, home, names, smollm2, tiny, monkeypatch):
        self.names, self.url, self.is_tiny = names, "", False
        self.stack = contextlib.ExitStack()
        self.folders = {"smollm2": smollm2, "tiny": tiny}
        self.known = models._local_folder
        monkeypatch.chdir(home)
        monkeypatch.setenv("COLUMNS", "90")
        monkeypatch.setenv("PATH", os.path.dirname(sys.executable), prepend=os.pathsep)
        monkeypatch.setattr(models, "_local_folder", self.folder)
        monkeypatch.setattr(saved, "hub_file", lambda *_, **__: None)  # the tiny one is no saved embedder
        monkeypatch.setattr(server, "serve", self.serve)

    def folder(self, name):
        """In place of `models._local_folder`."""
        is_tiny = self.is_tiny and not os.path.isdir(name)  # a folder that the page has made is what it is
        return self.folders["tiny"] if is_tiny else self.folders.get(name) or self.known(name)

    def run(self, block):
        """Raises `AssertionError` with the line if a block is not as the page has it."""
        if block.title:
            path = os.path.join(os.getcwd(), block.title)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "w") as file:
                file.write(block.text)
        elif block.language == "python":
            self.python(block)
        elif block.language == "console":
            assert block.text.startswith("$ "), f"line {block.line}: a console block begins with a command"
            joined = re.sub(r"\\\n\s*", "", block.text)  # a command may go on after a backslash
            steps = re.split(r"^\$ ", joined, flags=re.MULTILINE)[1:]
            shown = [step.partition("\n")[2] for step in steps]
            serves = any(step.startswith("kvembed serve") for step in steps)  # what it answers is shown further down
            self.is_tiny = not serves and not any(part.strip() for part in shown)
            for step, expected in zip(steps, shown, strict=True):
                self.command(block, step.partition("\n")[0], expected)

    def python(self, block):
        expected = shown_by(block.text)
        self.is_tiny = not expected
        code = compile(block.text.replace(ADDRESS, self.url or ADDRESS), f"line {block.line}", "exec")
        if NOT_HERE_CODE.search(block.text):
            return
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(code, self.names)
        self.compare(block, "python", expected, printed.getvalue())

    def command(self, block, line, expected):
        if NOT_HERE.search(line):
            if line.startswith("kvembed "):
                asked = CliRunner().invoke(cli.app, [*shlex.split(line, comments=True)[1:], "--help"])
                assert asked.exit_code == 0, f"line {block.line}: {line}: {asked.output}"
            return
        given = None
        for stage in line.split(" | "):
            code, out, given = self.stage(stage, given)
        failed = expected.rstrip().splitlines()[-1:] and expected.rstrip().splitlines()[-1].startswith("kvembed: ")
        assert code == 0 or failed, f"line {block.line}: {line}: exit code {code}: {out}"
        self.compare(block, line, expected, out)

    def stage(self, line, given):
        """A command of a pipe: exit code, what a terminal would show, standard output."""
        words = shlex.split(line, comments=True)
        if words[0] == "kvembed":
            words, target = (words[:-2], words[-1]) if words[-2:-1] == [">"] else (words, os.devnull)
            done = CliRunner().invoke(cli.app, words[1:], input=given)
            assert isinstance(done.exception, SystemExit | None), done.exception
            with open(target, "w") as file:
                file.write(done.stdout)
            return done.exit_code, done.output, done.stdout
        line = line.replace(ADDRESS, self.url or ADDRESS)
        ran = subprocess.run(["bash", "-c", line], input=given, capture_output=True, text=True, check=False)
        return ran.returncode, ran.stdout + ran.stderr, ran.stdout

    def compare(self, block, what, expected, got):
        if expected.strip() and (why := differs(expected, got)):
            raise AssertionError(f"line {block.line}: {what}: {why}\n--- shown\n{expected}\n--- printed\n{got}")

    def serve(self, embedder, names, listener, *, keys, limits):
        """In place of `server.serve`: on a free port, in a thread, until the page has ended."""
        listener.close()
        app = server.create_app(embedder, names, keys=keys, limits=limits)
        self.url = f"http://127.0.0.1:{self.stack.enter_context(running(app))}"
