"""Which layers to re-route: intrinsic dimension over depth, the paper's rule, and profiles that remember the choice."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Sequence
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .backbone import Backbone
from .bars import Bar
from .batching import run_batches
from .config import EmbedConfig
from .errors import InputError
from .files import cache_folder, json_hash, store
from .fingerprint import fingerprint as fingerprint_of
from .models import label, load
from .prompts import UNLIMITED, Prompter
from .self_written import SELF_WRITTEN, generated_texts, texts_digest

__all__ = ["Profile", "choose_layers", "id_curve", "profile_of", "shipped_profiles", "twonn", "window"]

logger = logging.getLogger(__name__)

_MOST_TOKENS = 512  # of a calibration text, beside its template's
_TEXTS = 1000  # self-written ones
_LEAST_POINTS = 20  # that TwoNN can say anything of


@dataclasses.dataclass(frozen=True)
class Profile:
    """A stored choice of layers, with everything it came from.

    Attributes:
        model: name it was loaded by; for people.
        fingerprint: of the model (`kvembed.fingerprint`); what a profile is found by.
        template: the document template the texts were put in.
        texts: where they came from: `"self-written"` or `"given"`.
        texts_sha256: of the texts, joined by newlines.
        count: how many texts.
        curve: intrinsic dimension of the last token's states at each decoder layer's output.
        attention_layers: the layers that could be chosen.
        layers: the choice.
    """

    model: str
    fingerprint: str
    template: str
    texts: str
    texts_sha256: str
    count: int
    curve: tuple[float, ...]
    attention_layers: tuple[int, ...]
    layers: tuple[int, ...]

    def to_json(self) -> str:
        """Indented JSON with a newline at the end."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Profile:
        """The inverse of `to_json`. Raises `ValueError`, `KeyError` or `TypeError` for anything else."""
        stored: Any = json.loads(text)
        fields = {field.name: stored[field.name] for field in dataclasses.fields(cls)}
        return cls(**fields | {name: tuple(fields[name]) for name in ("curve", "attention_layers", "layers")})


def twonn(states: NDArray[Any]) -> float:
    """TwoNN intrinsic dimension (Facco et al. 2017, doi 10.1038/s41598-017-11873-y).

    The ratio mu of the distances to a point's second and first neighbour is Pareto with the dimension as its exponent,
    so -log(1 - F(mu)) is a line through the origin in log(mu), fitted by least squares. The largest tenth of the ratios
    is left out, as in the paper. Duplicates, whose first distance is zero, are dropped first.

    Args:
        states: (N, D) any float dtype; distances are taken in float64.

    Returns:
        The dimension, a positive number.

    Raises:
        InputError: fewer than 20 distinct points, values that are not finite, or a grid.
    """
    points = torch.from_numpy(np.unique(states.astype(np.float64), axis=0))
    if len(points) < _LEAST_POINTS:
        raise InputError(f"intrinsic dimension needs at least {_LEAST_POINTS} distinct texts, not {len(points)}")
    if not torch.isfinite(points).all():
        raise InputError("the model's states are not finite (try another dtype)")
    nearest = []
    for row in range(0, len(points), 256):  # never an (N, N) matrix
        rows = points[row : row + 256]
        distances = torch.cdist(rows, points, compute_mode="donot_use_mm_for_euclid_dist")  # (256, N)
        nearest.append(distances.topk(3, largest=False).values[:, 1:])  # without the point itself
    first, second = torch.cat(nearest).T
    log_mu = (second / first).log().sort().values
    kept = int(len(points) * 0.9)
    x = log_mu[:kept]
    y = -torch.log1p(-torch.arange(1, kept + 1, dtype=torch.float64, device="cpu") / len(points))
    if not x @ x > 0:
        raise InputError("intrinsic dimension says nothing of points that are all equally far from their neighbours")
    return float((x @ y) / (x @ x))


def window(curve: Sequence[float], attention_layers: Sequence[int]) -> tuple[int, ...]:
    """The paper's rule: from the layer of least intrinsic dimension, a tenth of the depth upwards.

    l* = argmin ID with the first 20 % of the layers left out; S = {l*, ..., l* + floor(0.1 L)}, cut at L - 1. In a
    model where only some layers have attention, both l* and S are taken among those.

    Args:
        curve: intrinsic dimension by layer, bottom first; L values.
        attention_layers: layers that can be re-routed, ascending.
    """
    depth = len(curve)
    allowed = _allowed(depth, attention_layers)
    best = min(allowed, key=lambda layer: curve[layer])
    return tuple(layer for layer in attention_layers if best <= layer <= best + int(0.1 * depth))


def _allowed(depth: int, attention_layers: Sequence[int]) -> list[int]:
    return [layer for layer in attention_layers if layer >= 0.2 * depth] or list(attention_layers)


def id_curve(
    backbone: Backbone,
    prompter: Prompter,
    texts: Sequence[str],
    template: str,
    *,
    batch_tokens: int = 2048,
    progress: bool = False,
) -> tuple[float, ...]:
    """Intrinsic dimension of the last token's states at each decoder layer's output, without re-routing.

    A layer that may not be chosen gets 0 if it has too few distinct states: in a model that begins with short
    convolutions, the last token's are those of the template's end, whatever the text.

    Holds one state a text and layer, (L, N, D) float32, and never the states of other tokens.

    Args:
        backbone, prompter: the model and its tokenizer.
        texts: calibration texts; N of them are left when repeated ones are dropped, and those of the same tokens.
        template: with `{text}`.
        batch_tokens: as in `Embedder`.
        progress: show a bar on a terminal.

    Raises:
        InputError: as in `twonn`.
        OutOfMemory: a single text does not fit.
    """
    backbone.check_readable()
    (around,) = prompter(["a"], template, UNLIMITED)
    found = prompter(list(texts), template, min(around.tokens + _MOST_TOKENS, backbone.max_tokens or UNLIMITED))
    # The same tokens in another batch differ in the last bit, and TwoNN would see it.
    prompts = list({prompt.ids: prompt for prompt in found}.values())
    states = np.empty((len(backbone.layers), len(prompts), backbone.dim), np.float32)
    plain = EmbedConfig()
    lengths = [len(prompt.ids) for prompt in prompts]
    with Bar(total=len(prompts), desc="reading layers", unit="text", progress=progress) as bar:

        def read(batch: list[int]) -> Tensor:
            ids, real = backbone.pad([prompts[i].ids for i in batch])
            readers = {layer: partial(_keep_last, states[layer], batch, real) for layer in range(len(states))}
            backbone.states(ids, real, plain, readers=readers)
            return real

        for batch, _ in run_batches(lengths, batch_tokens, read, backbone.rope_border, packed=backbone.packs):
            bar.update(len(batch))
    allowed = _allowed(len(states), backbone.attention_layers)
    return tuple(
        twonn(points) if layer in allowed or len(np.unique(points, axis=0)) >= _LEAST_POINTS else 0.0
        for layer, points in enumerate(states)
    )


def _keep_last(states: NDArray[np.float32], batch: list[int], lengths: Tensor, output: Tensor) -> None:
    """Of one layer's output (B,n,D), each text's last token into its row of `states` (N, D)."""
    last = output[torch.arange(len(batch)), lengths.to(output.device) - 1]
    states[batch] = last.float().cpu().numpy()


def choose_layers(
    fingerprint: str,
    backbone: Backbone,
    prompter: Prompter,
    template: str,
    write: Callable[[int], list[str]],
    *,
    texts: Sequence[str] | None = None,
    model: str = "",
    batch_tokens: int = 2048,
    progress: bool = False,
) -> Profile:
    """The layers for this model: from a shipped or cached profile, or worked out now and cached.

    Args:
        fingerprint: of the model.
        backbone: the model.
        prompter: of its tokenizer.
        template: the document template in use; the last token's states depend on it.
        write: gives that many texts that the model wrote itself; called if there are no others and nothing is stored.
        texts: calibration texts.
        model: name to write into the profile.
        batch_tokens: as in `Embedder`.
        progress: show bars on a terminal.

    Raises:
        InputError: too few distinct texts, or a model that can't write any.
    """
    source, digest = (SELF_WRITTEN, None) if texts is None else ("given", texts_digest(texts))

    def fits(profile: Profile) -> bool:
        return (profile.fingerprint, profile.template, profile.texts) == (fingerprint, template, source) and digest in (
            None,
            profile.texts_sha256,
        )

    name = json_hash([fingerprint, template, source, texts and [*texts]])
    cached = cache_folder() / "profiles" / f"{name}.json"
    for profile in (*shipped_profiles(), *_read(cached)):
        if fits(profile):
            return profile
    logger.info("choosing layers for %s by intrinsic dimension, once", model or backbone.model_type)
    if texts is None:
        texts = write(_TEXTS)
    curve = id_curve(backbone, prompter, texts, template, batch_tokens=batch_tokens, progress=progress)
    profile = Profile(
        model=model or backbone.model_type,
        fingerprint=fingerprint,
        template=template,
        texts=source,
        texts_sha256=texts_digest(texts),
        count=len(texts),
        curve=tuple(round(value, 4) for value in curve),
        attention_layers=backbone.attention_layers,
        layers=window(curve, backbone.attention_layers),
    )
    store(cached, profile.to_json(), "the choice of layers")
    return profile


def profile_of(
    name: str,
    template: str,
    *,
    texts: Sequence[str] | None = None,
    dtype: str = "auto",
    progress: bool = False,
) -> Profile:
    """`choose_layers` for a model by name (see `kvembed.models.load`)."""
    model, tokenizer = load(name, dtype=dtype)
    backbone, prompter = Backbone(model), Prompter(tokenizer)
    fingerprint = fingerprint_of(backbone, prompter)

    def write(count: int) -> list[str]:
        return generated_texts(model, tokenizer, fingerprint, count, progress=progress)

    return choose_layers(
        fingerprint, backbone, prompter, template, write, texts=texts, model=label(name), progress=progress
    )


def shipped_profiles() -> list[Profile]:
    """The profiles that come with the package."""
    return [
        Profile.from_json(entry.read_text()) for entry in (files("kvembed") / "profiles").iterdir() if entry.is_file()
    ]


def _read(path: Path) -> list[Profile]:
    try:
        return [Profile.from_json(path.read_text())]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("ignoring the profile %s, which can't be read: %s", path, error)
        return []
