"""Is the signal real? Controls of the slot, a bias sweep, and windows of layers against the one that ID chooses.

Runs on three tasks of `mini` (stsb, banking77, trecqa) and writes to the ledger under the suite `ablation`; a run that
was stopped goes on where it was. `precision` is what bfloat16 costs `kv` on all of `mini`. `make tables` makes the
tables and plots from it.

    python tools/ablation.py --data ../shared/eval-data [--model smollm2] [--name NAME] [PART ...]

Parts: controls, bias, windows, precision; by default all. `rerouting` is the control that matters most, alone and in
float32: on some models it is worth less than what bfloat16 rounds.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kvembed import Embedder
from kvembed.evaluate import evaluate
from kvembed.models import label
from kvembed.reroute import Reroute
from kvembed.results import mean
from kvembed.subjects import Subject, embedder_subject, marked
from kvembed.tasks import MINI_TOKENS, load_tasks, mini

ROOT = Path(__file__).parent.parent
TASKS = ("banking77", "stsb", "trecqa")
BIASES = (-4.0, -2.0, 0.0, 1.0, 2.0, 3.0, 5.0)


class FirstToken(Reroute):
    """The slot is the first token, which every token sees already: a second copy of the attention sink."""

    def slot(self, module: nn.Module, layer: int, key: Tensor, value: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """As the base class."""
        return super().slot(module, layer, key, value, torch.zeros_like(last))


class RandomToken(Reroute):
    """The slot is a token of the same text at a place that depends on the text's length alone, spread like chance."""

    def slot(self, module: nn.Module, layer: int, key: Tensor, value: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """As the base class."""
        return super().slot(module, layer, key, value, ((last + 1) * 2654435761 >> 16) % (last + 1))


class OtherText(Reroute):
    """The slot is the last token of the next text in the batch."""

    def slot(self, module: nn.Module, layer: int, key: Tensor, value: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """As the base class."""
        slot_key, slot_value = super().slot(module, layer, key, value, last)
        return slot_key.roll(1, 0), slot_value.roll(1, 0)


class KeyOnly(Reroute):
    """The last token's key with a value of zeros: it can take attention away, but gives no content."""

    def slot(self, module: nn.Module, layer: int, key: Tensor, value: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """As the base class."""
        slot_key, slot_value = super().slot(module, layer, key, value, last)
        return slot_key, torch.zeros_like(slot_value)


class ValueOnly(Reroute):
    """The last token's value with a key of zeros: every token reads it with the same logit, the bias."""

    def slot(self, module: nn.Module, layer: int, key: Tensor, value: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """As the base class."""
        slot_key, slot_value = super().slot(module, layer, key, value, last)
        return torch.zeros_like(slot_key), slot_value


# name -> what differs from `kv`: another slot, or other fields of its config
CONTROLS: dict[str, type[Reroute] | dict[str, Any]] = {
    "kv": {},
    "no re-routing": {"layers": ()},
    "slot from the first token": FirstToken,
    "slot from a random token": RandomToken,
    "slot from another text": OtherText,
    "key only (value of zeros)": KeyOnly,
    "value only (key of zeros)": ValueOnly,
    "slot turned back to position 0": {"slot_position": "first"},
    "last token does not see the slot": {"slot_self": False},
    "no prompt": {"document": "{text}", "query": "{text}"},
    "causal mask off in the same layers": {"attention": "bidirectional"},
    "mean over the text's own tokens": {"mean_tokens": "content"},
    "last token only": {"pooling": "last"},
    "mean only": {"pooling": "mean"},
}
REROUTING = ("kv", "no re-routing", "slot from another text")


def asked(description: str | None, parts: Sequence[str]) -> argparse.Namespace:
    """The command line: data, model, its name in tables, ledger, and which of `parts` to run; by default all."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--name")
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    parser.add_argument("parts", nargs="*", choices=[*parts, []], default=[])
    arguments = parser.parse_args()
    arguments.name = arguments.name or label(arguments.model)
    arguments.parts = arguments.parts or parts
    return arguments


def main() -> None:
    """Run what is asked for."""
    arguments = asked(__doc__, ("controls", "bias", "windows", "precision", "rerouting"))
    parts = arguments.parts
    tasks = [mini(task) for task in load_tasks(arguments.data, TASKS)]
    dtype = "float32" if [*parts] == ["rerouting"] else "bfloat16"
    kv = Embedder.from_pretrained(arguments.model, method="kv", dtype=dtype, max_tokens=MINI_TOKENS)
    subjects: dict[str, Subject] = {}
    name = arguments.name
    wanted = CONTROLS if "controls" in parts else REROUTING if "rerouting" in parts else ()
    for control in wanted:
        change = CONTROLS[control]
        if isinstance(change, dict):
            subjects[control] = embedder_subject(kv.replace(**change), name)
        else:
            subjects[control] = _controlled(kv.replace(), control, change, name)
    for bias in BIASES if "bias" in parts else ():
        subjects[f"bias {bias:g}"] = embedder_subject(kv.replace(bias=bias), name)
    for told, rerouting in (("a random token", RandomToken), ("another text", OtherText)) if "bias" in parts else ():
        control = f"slot from {told}, bias {BIASES[-1]:g}"  # what is said louder should matter more
        subjects[control] = _controlled(kv.replace(bias=BIASES[-1]), control, rerouting, name)
    attention, chosen = kv.backbone.attention_layers, kv.config.layers
    step = 1 if len(attention) < 25 else 2
    starts = range(len(attention) - len(chosen or ()) + 1)
    for start in starts if "windows" in parts else ():
        window = attention[start : start + len(chosen or ())]
        if start % step == 0 or window == chosen:
            subjects[f"window {window[0]}-{window[-1]}"] = embedder_subject(kv.replace(layers=window), name)
    for control, subject in subjects.items():
        subject = dataclasses.replace(subject, method=control)
        rows = list(evaluate(subject, tasks, suite="ablation", results=arguments.results, progress=True))
        print(f"{mean(rows).value:6.2f}  {control}", flush=True)
    for dtype in ("float32", "bfloat16") if "precision" in parts else ():  # all tasks, against the row of `mini`
        embedder = Embedder.from_pretrained(arguments.model, method="kv", dtype=dtype, max_tokens=MINI_TOKENS)
        subject = marked(embedder_subject(embedder, name), "dtype", dtype)
        tasks = [mini(task) for task in load_tasks(arguments.data)]
        rows = list(evaluate(subject, tasks, suite="precision", results=arguments.results, progress=True))
        print(f"{mean(rows).value:6.2f}  kv in {dtype}", flush=True)


def _controlled(embedder: Embedder, control: str, rerouting: type[Reroute], name: str) -> Subject:
    embedder.backbone.rerouting = rerouting
    return marked(embedder_subject(embedder, name), "control", control)


if __name__ == "__main__":
    main()
