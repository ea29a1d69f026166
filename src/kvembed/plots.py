"""Pictures: the intrinsic-dimension curve of a profile."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .errors import InputError
from .extras import import_extra
from .files import atomic_write, check_writable, naming

if TYPE_CHECKING:
    from .layers import Profile

__all__ = ["check_plot", "plot_layers"]


def check_plot(path: Path | None) -> None:
    """Fail before the work, not after it. Raises `InputError` as `plot_layers` would."""
    if path is None:
        return
    if path.suffix.lower() not in (".svg", ".png"):
        raise InputError(f"{path}: a plot is .svg or .png")
    check_writable(path)
    import_extra("matplotlib", "plot")


def plot_layers(profile: Profile, path: Path) -> None:
    """Draw intrinsic dimension over depth, the chosen window shaded, to an `.svg` or `.png` file.

    Raises:
        InputError: another ending, a folder that does not exist, or matplotlib is missing.
    """
    check_plot(path)
    from matplotlib.figure import Figure  # not pyplot: no global state, no display
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    depth = len(profile.curve)
    axes.axvspan(-0.5, 0.2 * depth - 0.5, color="#e8e8e8", lw=0)
    axes.text(0.1 * depth - 0.5, 0.03, "first 20 %\nleft out", ha="center", va="bottom", color="#666666", fontsize=8,
              transform=axes.get_xaxis_transform())  # fmt: skip
    named: str | None = f"re-routed: layer{'s' * (len(profile.layers) > 1)} {', '.join(map(str, profile.layers))}"
    for layer in profile.layers:  # not all between the first and the last have attention
        axes.axvspan(layer - 0.5, layer + 0.5, color="#f3b04b", alpha=0.45, lw=0, label=named)
        named = None
    axes.plot(range(depth), profile.curve, color="#1f5fa8", marker="o", ms=3.5, lw=1.5)
    axes.set_xlim(-0.5, depth - 0.5)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("decoder layer")
    axes.set_ylabel("intrinsic dimension (TwoNN)")
    axes.set_title(f"{profile.model}: last token's states over {profile.count:,} {profile.texts} texts", fontsize=10)
    axes.legend(loc="lower right", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    kind = path.suffix.lower()[1:]
    with naming(path), atomic_write(path) as file:
        figure.savefig(file, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
