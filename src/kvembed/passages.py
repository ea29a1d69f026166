"""Long texts cut into passages, each with its first line: whole paragraphs, as many as a passage takes.

A paragraph that is longer than a passage is cut between lines, then after sentences, then between words. Nothing is
lost but white space.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator

__all__ = ["PASSAGE", "passages"]

PASSAGE = 1200  # characters, about 300 tokens of English


def passages(lines: Iterable[tuple[int, str]], *, headings: bool = False) -> Iterator[tuple[int, str]]:
    """Cut a text into passages of whole paragraphs, where they are not longer than `PASSAGE` characters.

    Args:
        lines: number and text of each line, without its end.
        headings: whether lines that begin with `#` are Markdown's headings, and a heading begins a passage. Front
            matter (YAML between `---` at the top) is left out: it is about the text.

    Yields:
        The number of the first line, and the passage.
    """
    passage: list[str] = []
    first = size = 0
    titles = True  # the passage has but headings so far
    for number, paragraph in _paragraphs(_without_front_matter(lines) if headings else lines, headings):
        for line, piece in _pieces(number, paragraph):
            title = headings and _HEADING.match(piece) is not None
            if passage and (size + len(piece) + 2 > PASSAGE or (title and not titles)):
                yield first, "\n\n".join(passage)
                passage, size, titles = [], 0, True
            if not passage:
                first = line
            passage.append(piece)
            size += len(piece) + 2
            titles = titles and title
    if passage:
        yield first, "\n\n".join(passage)


_HEADING = re.compile(r"#{1,6}\s")
_FENCE = re.compile(r"\s{0,3}(```|~~~)")


def _without_front_matter(lines: Iterable[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    rest, held = iter(lines), list[tuple[int, str]]()
    for number, line in rest:
        held.append((number, line))
        if len(held) == 1 and line.rstrip() != "---":
            break
        if len(held) > 1 and line.rstrip() in ("---", "..."):
            held = []
            break
    return itertools.chain(held, rest)


def _paragraphs(lines: Iterable[tuple[int, str]], headings: bool) -> Iterator[tuple[int, list[str]]]:
    """Lines up to an empty one; a heading, and what stands between Markdown's fences, is a paragraph of its own."""
    held: list[str] = []
    first, fence = 0, ""
    for number, line in lines:
        mark = _FENCE.match(line) if headings else None
        opens, closes = mark is not None and not fence, mark is not None and mark[1] == fence
        title = headings and not fence and _HEADING.match(line) is not None
        if held and not fence and (opens or title or not line.strip()):
            yield first, held
            held = []
        if line.strip() or fence:
            first = first if held else number
            held.append(line.rstrip())
        if mark and (opens or closes):
            fence = mark[1] if opens else ""
        if held and (title or closes):
            yield first, held
            held = []
    if held:
        yield first, held


def _pieces(number: int, paragraph: list[str]) -> Iterator[tuple[int, str]]:
    """A paragraph, cut between lines and then between words if it is too long."""
    held = ""
    first = number
    for at, line in enumerate(paragraph, number):
        if held and len(held) + 1 + len(line) > PASSAGE:
            yield first, held
            held = ""
        if not held:
            first = at
        held = f"{held}\n{line}" if held else line
        start = 0
        while len(held) - start > PASSAGE:
            low, high = start + PASSAGE // 2, start + PASSAGE
            cut = max(held.rfind(mark, low, high) for mark in (". ", "。", "! ", "? ")) + 1
            cut = cut or held.rfind(" ", low, high) + 1 or high
            yield first, held[start:cut].strip()
            start = cut
            while held[start : start + 1].isspace():
                start += 1
        held = held[start:]
    if held.strip():
        yield first, held
