"""`auto` asking in German, saved as a folder. `python examples/auto_in_german.py MODEL FOLDER [TEXTS]`

TEXTS: a file of German texts, one a line, to fit on too. Then: `kvembed embed notes.txt --model FOLDER`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from kvembed import Embedder

DOCUMENT = "Kontext: {text}\nFasse den Kontext in einem Wort zusammen:"
QUERY = "Anfrage: {text}\nFasse die Anfrage in einem Wort zusammen:"
# Sentences of many kinds, and the word that each is summed up in.
EXAMPLES = (
    ("Ein Jockey reitet ein Pferd.", "Reitsport"),
    ("Wie setze ich mein Passwort zurück?", "Konto"),
    ("Der Ausschuss hat den Jahreshaushalt gebilligt.", "Finanzen"),
    ("Auf hohen Bergen kocht Wasser bei niedrigerer Temperatur.", "Druck"),
    ("Zwei Kinder spielen im Park Fußball.", "Fußball"),
    ("Der Akku meines Laptops ist zu schnell leer.", "Akku"),
    ("Nach der Gewinnwarnung der Bank fielen die Kurse.", "Aktien"),
    ("Welcher Impfstoff schützt vor Masern?", "Impfung"),
)


def template(question: str) -> str:
    """The question after examples of itself, each with its answer."""
    return "".join(f"{question.format(text=text)} {word}\n\n" for text, word in EXAMPLES) + question


def main(model: str, folder: str, texts: str | None = None) -> None:
    """Fit and save, in minutes on a CPU."""
    embedder = Embedder.from_pretrained(
        model,
        method="auto",
        document=template(DOCUMENT),
        query=template(QUERY),
        texts=None if texts is None else Path(texts).read_text().splitlines(),
        progress=True,
    )
    embedder.save_pretrained(folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
