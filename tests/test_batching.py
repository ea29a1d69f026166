"""Token budgets, order, and what happens when memory runs out."""

from __future__ import annotations

import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvembed import OutOfMemory
from kvembed.batching import blocks, run_batches, token_batches
from kvembed.device import is_device_lost


@given(lengths=st.lists(st.integers(0, 3_000_000), max_size=9), count=st.integers(0, 3000))
def test_blocks_hold_everything_in_order_within_bounds(lengths, count):
    items = [*lengths, *[1] * count]
    found = list(blocks(iter(items), int))
    assert [item for block in found for item in block] == items
    assert all(block and len(block) <= 1024 and (len(block) == 1 or sum(block) <= 2**20) for block in found)


@given(lengths=st.lists(st.integers(1, 300), max_size=60), budget=st.integers(1, 500), packed=st.booleans())
def test_every_text_once_within_the_budget(lengths, budget, packed):
    batches = token_batches(lengths, budget, packed=packed)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        of_each = [lengths[i] for i in batch]
        assert len(batch) == 1 or (sum(of_each) if packed else len(batch) * max(of_each)) <= budget
    longest = [max(lengths[i] for i in batch) for batch in batches]
    assert longest == sorted(longest, reverse=True)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        RuntimeError("MPS backend out of memory (MPS allocated: 5.43 GB, other allocations: 1.21 GB)"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_out_of_memory_halves_and_says_so(error, caplog):
    lengths = [10] * 13 + [4] * 9
    ran = []

    def run(batch):
        if sum(lengths[i] for i in batch) > 45:
            raise error
        ran.append(batch)
        return torch.tensor([[float(i)] for i in batch])

    with caplog.at_level(logging.WARNING):
        rows = {i: float(x) for batch, out in run_batches(lengths, 100, run) for i, x in zip(batch, out, strict=True)}
    assert rows == {i: float(i) for i in range(len(lengths))}
    assert caplog.messages == [
        "out of memory: batches cut from 100 tokens to 55",
        "out of memory: batches cut from 50 tokens to 30",
    ]
    assert all(sum(lengths[i] for i in batch) <= 45 for batch in ran)


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (torch.AcceleratorError("CUDA error: device-side assert triggered"), True),
        (torch.AcceleratorError("CUDA error: out of memory"), False),
        (torch.OutOfMemoryError("CUDA out of memory"), False),
        (RuntimeError("shape mismatch"), False),
    ],
)
def test_a_lost_device_is_told_from_a_full_one(error, lost):
    assert is_device_lost(error) == lost


def test_a_single_text_too_big_is_a_clear_error():
    def run(batch):
        raise MemoryError

    with pytest.raises(OutOfMemory, match="a text of 1,234 tokens does not fit in memory"):
        list(run_batches([1234], 10, run))


def test_other_errors_pass_through():
    def run(batch):
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape mismatch"):
        list(run_batches([5], 10, run))
