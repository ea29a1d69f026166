"""Hooks of a model's modules, which act in one thread and are gone afterwards."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

__all__ = ["in_this_thread", "keeping_rotations", "read_output"]


def in_this_thread(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A module hook is seen by every thread that uses the model; this one acts only in the thread that made it."""
    owner = threading.get_ident()

    def act(*args: Any) -> Any:
        return hook(*args) if threading.get_ident() == owner else None

    return act


def read_output(reader: Callable[[Tensor], None], _module: nn.Module, _args: Any, output: Any) -> None:
    """A hook, but for its first argument: `reader` is given a layer's output."""
    reader(output[0] if isinstance(output, tuple) else output)


@contextlib.contextmanager
def keeping_rotations(decoder: nn.Module, rotations: dict[Any, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """While open, `rotations` is given the cosines and sines of each forward, by kind of layer (None: of all)."""
    with contextlib.ExitStack() as stack:
        for name, module in decoder.named_modules():
            if name.endswith("rotary_emb"):
                keep = in_this_thread(functools.partial(_keep_rotation, rotations))
                stack.callback(module.register_forward_hook(keep, with_kwargs=True).remove)
        yield


def _keep_rotation(
    rotations: dict[Any, Any], _module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any
) -> None:
    layer_type = kwargs.get("layer_type", args[2] if len(args) > 2 else None)
    if isinstance(output, tuple) and len(output) == 2:
        rotations[layer_type] = output
