"""Plots for docs/: score against window and intrinsic dimension, bias, and length of text; seconds against length."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt

from kvembed.layers import Profile, shipped_profiles
from kvembed.results import Result, by_method, mean

_BOLD = {"kv": "black", "auto": "darkred"}  # lines among many

__all__ = ["draw"]

# The same file for the same data: fixed ids, no date.
mpl.rcParams.update({"svg.hashsalt": "kvembed", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False})


def draw(results: Sequence[Result], speed: Path, folder: Path) -> None:
    """Write every plot that there are results for; `speed` is where `tools/bench.py` writes."""
    ablation = [result for result in results if result.suite == "ablation"]
    for model in sorted({result.model for result in ablation}):
        groups = {
            method: rows for (name, method, _), rows in by_method(ablation).items() if name == model and len(rows) == 3
        }
        if "kv" not in groups:
            continue
        if windows := {method: rows for method, rows in groups.items() if method.startswith("window ")}:
            _windows(model, list(windows.values()), groups["kv"], folder)
        if biases := [rows for method, rows in groups.items() if method.startswith("bias ")]:
            _biases(model, biases, groups["no re-routing"], folder)
    long = [result for result in results if result.suite == "long"]
    if long:
        _long(long, folder)
    # The default model's on a CPU alone: those of other shapes and devices are in folders named after these.
    if growth := [json.loads(path.read_text()) for path in sorted(speed.glob("*float*/growth.json"))]:
        _growth(growth, folder)


def _windows(model: str, windows: list[list[Result]], base: list[Result], folder: Path) -> None:
    windows = sorted(windows, key=lambda rows: rows[0].config["layers"])
    figure, axis = plt.subplots(figsize=(7, 3.6))
    starts = [rows[0].config["layers"][0] for rows in windows]
    scores = [mean(rows) for rows in windows]
    axis.fill_between(starts, [s.low for s in scores], [s.high for s in scores], alpha=0.15, color="C0", lw=0)
    axis.plot(starts, [s.value for s in scores], "o-", ms=3, color="C0", label="score")
    axis.axvline(base[0].config["layers"][0], color="0.4", ls=":", label="chosen by ID")
    axis.set(
        xlabel=f"first re-routed layer of {len(base[0].config['layers'])}", ylabel="mean of three tasks", title=model
    )
    profile = _profile(model)
    if profile:
        other = axis.twinx()
        other.plot(range(len(profile.curve)), profile.curve, "--", color="C1", lw=1)
        other.set_ylabel("intrinsic dimension (dashed)", color="C1")
        other.spines["right"].set_visible(True)
    axis.legend(frameon=False, loc="lower right")
    _save(figure, folder / f"windows-{model}.svg")


def _profile(model: str) -> Profile | None:
    return next((profile for profile in shipped_profiles() if profile.model == model), None)


def _biases(model: str, biases: list[list[Result]], off: list[Result], folder: Path) -> None:
    biases = sorted(biases, key=lambda rows: rows[0].config["bias"])
    figure, axis = plt.subplots(figsize=(7, 3.2))
    values, scores = [rows[0].config["bias"] for rows in biases], [mean(rows) for rows in biases]
    axis.fill_between(values, [s.low for s in scores], [s.high for s in scores], alpha=0.15, color="C0", lw=0)
    axis.plot(values, [s.value for s in scores], "o-", ms=3, color="C0")
    axis.axhline(mean(off).value, color="0.4", ls=":", label="no re-routing")
    axis.set(xlabel="bias", ylabel="mean of three tasks", title=model)
    axis.legend(frameon=False)
    _save(figure, folder / f"bias-{model}.svg")


def _long(results: list[Result], folder: Path) -> None:
    models = sorted({result.model for result in results})
    figure, axes = plt.subplots(1, len(models), figsize=(5 * len(models) + 2, 3.8), sharey=True, squeeze=False)
    for axis, model in zip(axes[0], models, strict=True):
        lines: dict[str, list[Result]] = {}
        for result in results:
            if result.model == model:
                lines.setdefault(result.method, []).append(result)
        for index, (method, rows) in enumerate(sorted(lines.items())):
            rows.sort(key=lambda row: row.config["max_tokens"])
            style: dict[str, Any] = {"lw": 1, "color": f"C{index % 10}"}
            if method in _BOLD:
                style = {"lw": 2, "color": _BOLD[method]}
            line = "o-" if method in _BOLD or index < 10 else "o--"  # there are ten colours
            axis.plot(
                [r.config["max_tokens"] for r in rows], [r.score for r in rows], line, ms=3, label=method, **style
            )
        axis.set_xscale("log", base=2)
        limits = sorted({row.config["max_tokens"] for rows in lines.values() for row in rows})
        axis.set_xticks(limits, [f"{limit:,}" for limit in limits])
        axis.minorticks_off()
        axis.set(xlabel="tokens read of a meeting", title=model)
    axes[0][0].set_ylabel("nDCG@10, QMSum summaries")
    axes[0][-1].legend(frameon=False, bbox_to_anchor=(1.02, 1), loc="upper left")
    _save(figure, folder / "long.svg")


def _growth(found: list[dict[str, Any]], folder: Path) -> None:
    figure, axis = plt.subplots(figsize=(7, 3.6))
    for index, told in enumerate(found):
        tokens, seconds = ([row[name] for row in told["rows"]] for name in ("tokens", "seconds"))
        axis.loglog(tokens, seconds, "o-", ms=4, color=f"C{index}", label=told["dtype"])
        for power, style in ((1, ":"), (2, "--")):
            line = [seconds[-1] * (n / tokens[-1]) ** power for n in tokens]
            axis.loglog(tokens, line, style, color=f"C{index}", lw=0.7, alpha=0.6)
    for style, name in ((":", "n"), ("--", "n²")):
        axis.plot([], [], style, color="0.6", lw=1, label=f"as {name}")
    least = min(row["seconds"] for told in found for row in told["rows"])
    axis.set_xticks(tokens, [f"{n:,}" for n in tokens])
    axis.yaxis.set_major_formatter("{x:g}")
    axis.minorticks_off()
    axis.set(xlabel="tokens of a text (n)", ylabel="seconds", ylim=(least / 3, None))
    axis.set_title(f"{told['model']}, a text re-routed in every layer, {told['device']}, {told['threads']} threads")
    axis.legend(frameon=False)
    _save(figure, folder / "growth.svg")


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
