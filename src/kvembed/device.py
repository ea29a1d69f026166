"""Devices: the best one here and its dtype, and what their errors mean."""

from __future__ import annotations

from typing import Any

import torch

from .errors import InputError

__all__ = [
    "best_device",
    "best_dtype",
    "empty_device_cache",
    "is_device_lost",
    "is_out_of_memory",
    "usable_device",
]


def best_device() -> torch.device:
    """The first accelerator, or else the CPU."""
    # torch built for CUDA names it on a machine without a GPU too, unless told to look.
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def best_dtype(device: torch.device) -> str:
    """The name of the dtype that `device` is fastest in: `bfloat16`, or `float32` where that can't be multiplied."""
    return "bfloat16" if _multiplies_bfloat16(device) else "float32"


def _multiplies_bfloat16(device: torch.device) -> bool:
    """In hardware; else it is slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return True
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # from torch 2.11 on
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def usable_device(device: str) -> torch.device:
    """Raises `InputError` for a device that this machine does not have."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        here = torch.accelerator.current_accelerator(check_available=True)
        known = ["cpu"]
        if here:
            known += [f"{here.type}:{number}" for number in range(torch.accelerator.device_count())]
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"device {device!r} can't be used; here are {', '.join(known)} ({reason:.60})") from None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error means that memory ran out, so that less at a time may help."""
    # The allocators of CPUs and Macs raise plain RuntimeErrors, CUDA itself and its libraries errors of their own.
    message = str(error)
    signs = ("DefaultCPUAllocator", "out of memory", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(sign in message for sign in signs)


def is_device_lost(error: BaseException) -> bool:
    """Whether the accelerator will fail in all that this process asks of it from now on."""
    # Before torch 2.8 the class is missing, and such an error is a RuntimeError like others.
    kind = getattr(torch, "AcceleratorError", ())
    return isinstance(error, kind) and not is_out_of_memory(error)


def empty_device_cache() -> None:
    """Let the accelerator, if there is one, have what torch keeps of it for later."""
    if torch.accelerator.is_available():
        torch.get_device_module().empty_cache()
