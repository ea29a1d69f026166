"""docs/speed.md, from the files of results/speed that `tools/bench.py` writes, one folder for each dtype."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from markdown_table import table

__all__ = ["speed_page"]

# What the project aims at: section, what, and whether more is better than this or less.
GOALS = {
    "re-routed in kv's layers over plain": "at most 1.02",
    "echo, over re-routed in every layer": "at least 1.9",
    "two passes, over re-routed in every layer": "at least 1.9",
    "prepended, with a mask, over re-routed in every layer": "at least 1.3 at 2,048",
    "llama.cpp": "at least 1 at its best threads and batch",
    "sentence-transformers, batches of 32": "at least 5",
    "sentence-transformers, batches of 8": "at least 2 at its best batch size",
    "sentence-transformers, batches of 1": "at least 2 at its best batch size",
    "model FLOP/s over GEMM FLOP/s": "at least 0.8, on a GPU 0.6",
    "real tokens over computed tokens": "at least 0.97",
    "least cosine to float32 on a CPU, plain": "at least 0.999",
    "least cosine to float32 on a CPU, re-routed in kv's layers": "at least 0.999",
    "peak of many over few": "at most 1.05",
    "one sentence, whole process": "at most 5 s",
}
TITLES = {
    "overhead": "One forward",
    "corpus": "A corpus of mixed lengths",
    "llama": "Against llama.cpp",
    "packing": "Packed against padded",
    "preface": "A template with a long beginning",
    "machine": "How near to the machine's limit",
    "growth": "Seconds by length",
    "agreement": "How near to float32",
    "memory": "Memory",
    "start": "From the command line",
}


NOTES = {
    "llama": " llama.cpp was built on the machine, for its own instructions. kvembed reads the first file; llama.cpp "
    "made the others of it.",
}


def speed_page(folder: Path) -> str:
    """Markdown; empty if nothing was measured."""
    parts = [
        "# Speed",
        "Made by `make tables` from what `make bench` wrote to `results/speed/`. Ratios are of interleaved runs in one "
        "process: the median over rounds, and in brackets the quartiles. bfloat16 is the default where a processor "
        "multiplies it, float32 elsewhere; each was measured on such a machine, or on one that was kept to what such a "
        "machine has (AVX2 alone). There are no figures of a GPU: nothing has been run on one yet.",
    ]
    for section, title in TITLES.items():
        paths = sorted(folder.glob(f"*/{section}.json"))
        parts += [f"## {title}"] if paths else []
        for path in paths:
            told = json.loads(path.read_text())
            versions = ", ".join(f"{name} {version}" for name, version in told["versions"].items())
            instructions = f" ({told['instructions']})" if "instructions" in told else ""
            machine = f"{told['device']}, {told['threads']} threads, {told['hardware']}{instructions}; {versions}"
            model = "a tiny random model" if section == "memory" else told["model"]
            about = f"{model}, {told['dtype']}; {machine}; {told['rounds']} rounds.{NOTES.get(section, '')}"
            parts += [about, _table(section, told["rows"])]
        if section == "growth" and paths:
            parts.append("![Seconds against tokens](growth.svg)")
    return "\n\n".join(parts) + "\n" if len(parts) > 2 else ""


def _table(section: str, rows: list[dict[str, Any]]) -> str:
    if section == "growth":
        body = [[f"{row['tokens']:,}", f"{row['seconds']:.2f}"] for row in rows]
        return table(["tokens of a text", "seconds"], "lr", body)
    body = []
    for row in rows:
        what, size = row.get("what", ""), f"{row['tokens']:,} x {row['texts']}" if section == "overhead" else ""
        goal = GOALS.get(what) or GOALS.get(what.partition(",")[0], "")
        if "tokens_per_second" in row:
            what, size = (
                f"{what}: {row['tokens_per_second']:,} tokens/s",
                f"{row['texts']} texts, {row['tokens']:,} tokens",
            )
        if "peak_mib" in row:
            what = f"peak with {row['texts']:,} texts: {row['peak_mib']} MiB"
        if "cosine" in row:
            what = f"{what}: {row['cosine']:.5f}"
        value = f"{row['seconds']:.2f} s" if "seconds" in row else f"{row['ratio']:.2f}" if "ratio" in row else ""
        spread = f" ({row['low']:.2f} to {row['high']:.2f})" if "low" in row else ""
        body.append([what, size, value + spread, goal])
    return table(["what", "size", "measured", "goal"], "lrrr", body)
