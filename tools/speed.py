"""docs/speed.md, from the files of results/speed that `tools/bench.py` writes, one folder for each dtype."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from markdown_table import table

__all__ = ["speed_page"]

# What the project aims at: the least that a figure should be, or the most.
LEAST = {
    "echo, over re-routed in every layer": 1.9,
    "two passes, over re-routed in every layer": 1.9,
    "prepended, with a mask, over re-routed in every layer": 1.3,
    "llama.cpp": 1.0,
    "sentence-transformers, batches of 32": 5.0,
    "sentence-transformers, batches of 8": 2.0,
    "sentence-transformers, batches of 1": 2.0,
    "model FLOP/s over GEMM FLOP/s": 0.8,
    "real tokens over computed tokens": 0.97,
    "least cosine to float32 on a CPU, plain": 0.999,
    "least cosine to float32 on a CPU, re-routed in kv's layers": 0.999,
}
MOST = {
    "re-routed in kv's layers over plain": 1.02,
    "peak of many over few": 1.05,
    "one sentence, whole process": 5.0,
}
ONLY_AT = {"prepended, with a mask, over re-routed in every layer": 2048}  # tokens
ON_A_GPU = {"model FLOP/s over GEMM FLOP/s": 0.6}
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
    "corpus": " Mean pooling without a prompt on both sides. Matrix products alone, where they were measured, are the "
    "ceiling: what would be left of kvembed's time with no attention, norms, rotation, tokenising or pooling at all.",
    "growth": " One text, re-routed in every layer.",
    "llama": " Mean pooling without a prompt on both sides. llama.cpp was built on the machine, for its own "
    "instructions. kvembed reads the first file; llama.cpp made the others of it.",
}


def speed_page(folder: Path) -> str:
    """Markdown; empty if nothing was measured."""
    parts = [
        "# Speed",
        "Made by `make tables` from what `make bench` wrote to `results/speed/`. Ratios are of interleaved runs in one "
        "process: the median over rounds, and in brackets the quartiles. bfloat16 is the default where a processor "
        "multiplies it, float32 elsewhere; each was measured on such a machine, or on one that was kept to what such a "
        "machine has (AVX2 alone). A goal is what the project aims at, **missed** where it has not been reached."
        + " There are no figures of a GPU: nothing has been run on one yet."
        * (not any(folder.glob("cuda-*"))),
    ]
    for section, title in TITLES.items():
        paths = sorted(folder.glob(f"*/{section}.json"))
        parts += [f"## {title}"] if paths else []
        for path in paths:
            told = json.loads(path.read_text())
            versions = ", ".join(f"{name} {version}" for name, version in told["versions"].items())
            instructions = f" ({told['instructions']})" if "instructions" in told else ""
            machine = f"{told['device']}, {told['threads']} threads, {told['hardware']}{instructions}; {versions}"
            rounds = f"; {told['rounds']} rounds" if told["rounds"] > 1 else ""
            model = "a tiny random model" if section == "memory" else told["model"]
            about = f"{model}, {told['dtype']}; {machine}{rounds}.{NOTES.get(section, '')}"
            parts += [about, _table(section, told["rows"], told["device"])]
        if section == "growth" and paths:
            parts.append("![Seconds against tokens](growth.svg)")
    return "\n\n".join(parts) + "\n" if len(parts) > 2 else ""


def _table(section: str, rows: list[dict[str, Any]], device: str) -> str:
    if section == "growth":
        body = [[f"{row['tokens']:,}", f"{row['seconds']:.2f}"] for row in rows]
        return table(["tokens of a text", "seconds"], "lr", body)
    body = []
    for row in rows:
        what, size = row.get("what", ""), ""
        measured = f"{row['ratio']:.2f}" if "ratio" in row else ""
        measured += f" ({row['low']:.2f} to {row['high']:.2f})" if "low" in row else ""
        if section == "overhead":
            size = f"{row['tokens']:,} x {row['texts']}"
        elif "tokens_per_second" in row:
            size = f"{row['texts']} texts, {row['tokens']:,} tokens"
            compared = f"; {rows[0]['what']} {measured} times that" if measured else ""
            measured = f"{row['tokens_per_second']:,} tokens/s{compared}"
        elif "seconds" in row:
            measured = f"{row['seconds']:.2f} s"
        elif "cosine" in row:
            measured = f"{row['cosine']:.5f}"
        elif "peak_mib" in row:
            what, size, measured = "peak", f"{row['texts']:,} texts", f"{row['peak_mib']} MiB"
        body.append([what, size, measured, _goal(row, device)])
    return table(["what", "size", "measured", "goal"], "lrrr", body)


def _goal(row: dict[str, Any], device: str) -> str:
    """Of a row, if there is one."""
    what = row.get("what", "")
    name = what if what in LEAST or what in MOST else what.partition(",")[0]
    value = row.get("ratio", row.get("seconds", row.get("cosine")))
    if value is None or ONLY_AT.get(name, row.get("tokens")) != row.get("tokens"):
        return ""
    if name in MOST:
        return f"at most {MOST[name]:g}" + ", **missed**" * bool(round(value, 2) > MOST[name])
    if name in LEAST:
        least = ON_A_GPU.get(name, LEAST[name]) if device == "cuda" else LEAST[name]
        return f"at least {least:g}" + ", **missed**" * bool(round(value, 3) < least)
    return ""
