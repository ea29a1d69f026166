"""Write docs/families.md: which language models of transformers kvembed can re-route, found out by trying each of them.

python tools/families.py           writes it (half a minute)
python tools/families.py --check   exits 1 if it is not what would be written now
"""

from __future__ import annotations

import collections
import importlib.util
import pathlib
import sys
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto import modeling_auto as auto

from kvembed.attention_interface import attending, stock_attention
from kvembed.backbone import Backbone
from kvembed.errors import UnsupportedModel

ROOT = pathlib.Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs" / "families.md"

# Encoders with a causal head, and decoders that are half of an encoder-decoder: not what kvembed is for.
ENCODERS = {"bert-generation", "git", "musicgen", "musicgen_melody", "trocr", "whisper", "xlnet"}
ENCODERS.update(auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES)
ENCODERS -= {"moss_transcribe_diarize", "reformer"}

# transformers' own checks turn down every configuration of these: all their layers must share keys, and some must not.
UNBUILDABLE = dict.fromkeys(
    ("gemma4_assistant", "gemma4_unified_assistant"),
    "a draft model without keys and values of its own; transformers builds it from no configuration",
)


class Row(NamedTuple):
    """What became of one family.

    Attributes:
        family: model type.
        result: "works", "refused", "not built" or "wrong" (it was accepted, and its states are not as defined).
        note: what is special about it, or the reason.
    """

    family: str
    result: str
    note: str


def census() -> list[Row]:
    """Build and verify every family."""
    return [_try(family) for family in _checks.FAMILIES]


def _try(family: str) -> Row:
    if family in UNBUILDABLE:
        return Row(family, "not built", UNBUILDABLE[family])
    model = _checks.build(family)
    try:
        _checks.verify(model)
    except UnsupportedModel as error:
        return Row(family, "refused", str(error).partition("can't be re-routed: ")[2] or str(error))
    except AssertionError as error:
        return Row(family, "wrong", str(error))
    notes = [f"tried as `{_checks.STAND_INS[family]}`"] if family in _checks.STAND_INS else []
    backbone = Backbone(model)
    return Row(family, "works", ", ".join(notes + _kinds(backbone) + _without_auto(backbone)))


def _without_auto(backbone: Backbone) -> list[str]:
    """What a model that can be re-routed may still lack."""
    try:
        backbone.check_readable()
        _ = backbone.static
    except UnsupportedModel:
        return ["no `auto`"]
    return []


def _kinds(backbone: Backbone) -> list[str]:
    """What is special about the attention of a model, seen in one forward."""
    seen: dict[str, None] = {}
    if len(backbone.attention_layers) < len(backbone.layers):
        seen["attention in some layers only"] = None
    if max(collections.Counter(layer for layers in backbone.layer_calls.values() for layer in layers).values()) > 1:
        seen["several attentions in a layer"] = None

    def look(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        given = {name for name, argument in kwargs.items() if argument is not None}
        for kind, present in {
            "MLA (Dk != Dv)": key.shape[-1] != value.shape[-1],
            "soft cap": "softcap" in given,
            "sinks": bool(given & {"s_aux", "sinks"}),
            "position bias": "position_bias" in given,
            **_mask_kinds(attention_mask),
        }.items():
            if present:
                seen[kind] = None
        return stock_attention(module, query, key, value, attention_mask, **kwargs)

    with attending(backbone.decoder, look), torch.inference_mode():
        backbone.decoder(input_ids=torch.arange(32)[None] + 1, use_cache=False)
    return list(seen)


def _mask_kinds(mask: Tensor | None) -> dict[str, bool]:
    if mask is None:
        return {}
    visible = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    earlier = torch.ones(visible.shape[-2:], dtype=torch.bool).tril()
    hidden = ~visible & earlier
    resumes = hidden[..., 1:] & visible[..., :-1] & earlier[..., 1:]  # a hidden token after a visible one: no window
    return {
        "sliding window or chunks": bool(hidden.any()) and not bool(resumes.any()),
        "sparse mask": bool(resumes.any()),
        "mask per head": mask.shape[1] > 1,
    }


def render(rows: list[Row]) -> str:
    """The whole file."""
    decoders = [row for row in rows if row.family not in ENCODERS]
    others = [row for row in rows if row.family in ENCODERS]
    count = collections.Counter(row.result for row in decoders)
    phrases = {"works": "work", "refused": "are refused", "not built": "can't be built", "wrong": "come out wrong"}
    summary = ", ".join(f"{count[result]} {phrase}" for result, phrase in phrases.items() if count[result])
    lines = [
        "# Model families",
        "",
        f"Every causal language model type of transformers {transformers.__version__}, tried with a tiny random model: "
        f"{summary}. *Works* means that the re-routed states of a right-padded batch equal those of an independent "
        "attention function written from the definition, text by text, and that without re-routing they equal the "
        "model's own. *No `auto`*: the states between its layers, or its input embeddings, have another shape "
        "than those at the top, and `auto` reads both. What can't be re-routed, or would be re-routed wrongly, is "
        "refused with the reason given here. "
        "Made by `python tools/families.py`.",
        "",
        "| model type | result | note |",
        "|---|---|---|",
        *(f"| `{row.family}` | {row.result} | {row.note} |" for row in decoders),
        "",
        "## Encoders with a causal head, and halves of encoder-decoders",
        "",
        "In transformers' list too, but not what kvembed is for.",
        "",
    ]
    groups = collections.defaultdict(list)
    for row in others:
        groups[row.result if row.result == "works" else f"{row.result}: {row.note}"].append(f"`{row.family}`")
    lines += [f"- {group}: {', '.join(families)}" for group, families in sorted(groups.items(), reverse=True)]
    return "\n".join(lines) + "\n"


def _load_checks() -> Any:
    # By path: this file has the same name, so a plain import could find itself.
    spec = importlib.util.spec_from_file_location("family_checks", ROOT / "tests" / "families.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_checks = _load_checks()


def main() -> int:
    """Returns the exit code."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    rows = census()
    text = render(rows)
    for row in rows:
        if row.result == "wrong":
            print(f"{row.family} is accepted, but {row.note}", file=sys.stderr)
    if "--check" in sys.argv[1:]:
        stale = not TABLE.exists() or TABLE.read_text(encoding="utf-8") != text
        if stale:
            print(f"{TABLE.relative_to(ROOT)} is stale: run `python tools/families.py`", file=sys.stderr)
        return int(stale)
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(text, encoding="utf-8")
    return int(any(row.result == "wrong" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
