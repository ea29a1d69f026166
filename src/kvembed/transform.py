"""Transform: raw read-outs -> better vectors, by what unlabelled text shows of them. No label, no gradient.

Each read-out of a text (the prompt's last state, say, and the mean of the text's own states low in the model) is a view
of it. Raw views are poor vectors: a few directions that all texts share drown the rest. So

    x_v = unit((unit(r_v) - m_v) W_v)        every view centred (by role), and whitened: W_v W_v^T = C_v^(-1)
    y   = [x_1 .. x_V] U diag(l^(1/2))       U, l: eigenvectors and eigenvalues of the covariance of [x_1 .. x_V]

Whitening (Su et al. 2021, arXiv 2103.15316) is shrunk, so few texts do and no direction blows up:

    C_v = (1 - s) C + s mean(diag C) I       s = 1/2, for a view read after the final norm, which put it to scale
    C_v = (1 - s) C + s diag(C)              s = 0.15, for one read inside, where a few coordinates are often huge

The second line is generalised canonical correlation of the views (Kettenring 1971, MAXVAR): where whitened views agree,
l is large. What two views of a text agree on is its meaning, what they don't is how each was read; so directions are
ordered by l, and stretched by it once more. The first `dim` columns are therefore the best `dim` dimensions.

Letters: N texts, V views, D the model's width, K directions of a view that are kept, at most `DIRECTIONS`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .config import Role
from .errors import InputError
from .files import atomic_write, user_path, why

__all__ = ["FORMULA", "LEAST_TEXTS", "Transform", "check_count", "fit", "most_columns"]

# Counts changes of the formulas above, the constants below and what a view is (`kvembed.static`, `kvembed.pooling`): a
# stored fit of another, and views that were kept for it, are not used again.
FORMULA = 2
SHRINK_TOP, SHRINK_INSIDE, SHRINK_JOINT = 0.5, 0.15, 0.6
DIRECTIONS = 1024
LEAST_TEXTS = 100


@dataclasses.dataclass(frozen=True, eq=False)
class Transform:
    """A fitted transform. Make one with `fit`, or `load` one.

    Attributes:
        means: role -> (V,D) float32, the mean of the unit views.
        whiten: (V,D,K) float32.
        rotate: (V*K,dim) float32, best direction first.
        info: where it came from: `texts` (`"self-written"` or `"given"`), `texts_sha256`, `count`, of which
            `self_written` joined given ones, whose weight in all is `weight_of_given`; and what it is for:
            `fingerprint` of the model, `config_hash` and `formula`.
    """

    means: dict[str, Tensor]
    whiten: Tensor
    rotate: Tensor
    info: dict[str, Any]

    def common(self, views: NDArray[np.float32]) -> float:
        """Which part of documents' squared length is their mean: 0 to 1, next to 0 for texts that it was fitted on."""
        mean = _unit(torch.from_numpy(self(views, "document")).double()).mean(0)
        return float(mean @ mean)

    @property
    def dim(self) -> int:
        """The most dimensions that it gives."""
        return int(self.rotate.shape[1])

    def __call__(self, views: NDArray[np.float32], role: Role, dim: int | None = None) -> NDArray[np.float32]:
        """Turn the views of texts into vectors: (N,V,D) -> (N,dim) float32, not yet normalised.

        Args:
            views: raw read-outs; a view's length does not matter.
            role: whose mean is taken off.
            dim: how many of the dimensions, the best first. Default: all.
        """
        done = []
        with torch.autocast("cpu", enabled=False):  # a caller's, meant for a model
            for start in range(0, len(views), 4096):  # never a second copy of a whole corpus
                part = _unit(torch.from_numpy(np.ascontiguousarray(views[start : start + 4096])))
                whitened = torch.einsum("nvd,vdk->nvk", part - self.means[role], self.whiten)
                done.append(_unit(whitened).flatten(1) @ self.rotate[:, :dim])
        return torch.cat(done).numpy() if done else np.zeros((0, dim or self.dim), np.float32)

    def is_for(self, bound: dict[str, str]) -> bool:
        """Whether it was fitted for what `bound` names (see `kvembed.tuning.fitted_for`)."""
        return bound.items() <= self.info.items()

    def bound_to(self, fingerprint: str) -> Transform:
        """The same, taken for a model that is not quite the one it was fitted for: rounded or trained since."""
        return dataclasses.replace(self, info=self.info | {"fingerprint": fingerprint})

    def digest(self) -> str:
        """16 hex digits of the SHA-256 of its numbers."""
        return self._digest

    @functools.cached_property
    def _digest(self) -> str:
        digest = hashlib.sha256()
        for part in (*self.means.values(), self.whiten, self.rotate):
            digest.update(part.numpy().tobytes())
        return digest.hexdigest()[:16]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a `.safetensors` file, whole or not at all; `info` is in its header, as JSON."""
        tensors = {f"mean.{role}": mean for role, mean in self.means.items()}
        tensors |= {"whiten": self.whiten, "rotate": self.rotate}
        path = user_path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(save(tensors, {"info": json.dumps(self.info, sort_keys=True)}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Transform:
        """The inverse of `save`. Raises `InputError` for anything else, or no file."""
        path = user_path(path)
        if path.is_dir():
            raise InputError(f"{path} is a folder; a transform is a .safetensors file")
        try:
            path.stat()  # safetensors' own error names the file once more
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
                info = json.loads((file.metadata() or {})["info"])
            if not isinstance(info, dict):
                raise ValueError("its info is not an object")
            tensors = {name: tensor.float() for name, tensor in tensors.items()}  # the package's are in float16
            means = {name.removeprefix("mean."): tensors.pop(name) for name in list(tensors) if "mean." in name}
            transform = cls(means=means, info=info, **tensors)
            views, dim, kept = transform.whiten.shape
            fits = {mean.shape for mean in means.values()} == {(views, dim)} and {*means} == {"document", "query"}
            if not fits or transform.rotate.shape[0] != views * kept:
                raise ValueError("its parts do not fit together")
            if not all(part.isfinite().all() for part in (*means.values(), transform.whiten, transform.rotate)):
                raise ValueError("it holds numbers that are not finite")
        except OSError as error:
            raise InputError(f"{path}: {why(error)}") from None
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            raise InputError(f"{path} is not a transform of kvembed: {error}") from None
        return transform


def fit(
    views: dict[Role, NDArray[np.float32]],
    inside: Sequence[bool],
    info: dict[str, Any],
    weights: NDArray[np.float64] | None = None,
) -> Transform:
    """Fit a transform on unlabelled texts.

    Args:
        views: role -> (N,V,D) raw read-outs of texts, as documents and as queries; of queries only the mean is taken.
        inside: for each view, whether it was read below the final norm.
        info: see `Transform`.
        weights: (N,) of the documents, in means and covariances; only their proportions matter. Default: all alike.

    Raises:
        InputError: fewer than `LEAST_TEXTS` different texts, or states that do not tell them apart.
    """
    documents = np.unique(views["document"].reshape(len(views["document"]), -1), axis=0)
    check_count(len(documents))
    units = {role: _unit(torch.from_numpy(part).double()) for role, part in views.items()}
    count = len(units["document"])
    weight = torch.ones(count, dtype=torch.float64, device="cpu")  # (N,)
    if weights is not None:
        weight = torch.from_numpy(weights * count / weights.sum())
    means = {
        "document": torch.einsum("n,nvd->vd", weight, units["document"]) / count,
        "query": units["query"].mean(0),
    }  # (V,D)
    centred = units["document"] - means["document"]  # (N,V,D)
    root = weight.sqrt()[:, None]
    kept = min(centred.shape[-1], DIRECTIONS)
    whiten = []
    for view, is_inside in zip(centred.unbind(1), inside, strict=True):
        spread = ((root * view).square().sum(0) / (count - 1)).sqrt()  # (D,)
        if not spread.max() > 1e-7:
            raise InputError("the model's states are the same for all calibration texts")
        spread = spread.clip(1e-6 * spread.max()) if is_inside else torch.ones_like(spread)
        values, vectors = _spectrum(root * view / spread, SHRINK_INSIDE if is_inside else SHRINK_TOP)
        whiten.append(vectors[:, :kept] * values[:kept].rsqrt() / spread[:, None])
    matrix = torch.stack(whiten)  # (V,D,K)
    side_by_side = _unit(torch.einsum("nvd,vdk->nvk", centred, matrix)).flatten(1)  # (N,V*K)
    middle = weight @ side_by_side / count
    values, vectors = _spectrum(root * (side_by_side - middle), SHRINK_JOINT)
    rotate = (vectors * values.sqrt())[:, : most_columns(*centred.shape[1:])]
    return Transform(
        means={role: mean.float() for role, mean in means.items()},
        whiten=matrix.float().contiguous(),  # as they are in a file: the layout decides the last bit
        rotate=rotate.float().contiguous(),
        info=info | {"count": count},
    )


def most_columns(views: int, width: int) -> int:
    """How many dimensions a fit on views of that number and width gives: no more than the model is wide."""
    return min(width, views * min(width, DIRECTIONS))


def check_count(texts: int) -> None:
    """Raises `InputError` for fewer different texts than a transform can be fitted on."""
    if texts < LEAST_TEXTS:
        raise InputError(
            f"a transform is fitted on {LEAST_TEXTS} different texts or more, not {texts}; "
            "give more, or none: the model then writes its own"
        )


def _spectrum(centred: Tensor, shrink: float) -> tuple[Tensor, Tensor]:
    """Eigenvalues, largest first, and eigenvectors (columns) of the shrunk covariance of (N,D), its rows weighted."""
    values, vectors = torch.linalg.eigh(centred.T @ centred / (len(centred) - 1))
    values, vectors = values.flip(0).clip(0), vectors.flip(1)
    # The sign of an eigenvector is the solver's whim; ours makes the largest entry positive.
    signs = vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    return (1 - shrink) * values + shrink * values.mean(), vectors * signs


def _unit(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows, dim=-1)
