"""The GPU's path on a CPU: a stand-in with the kernel's own interface, and what happens where no kernel is."""

from __future__ import annotations

import inspect

import pytest
import torch
from families import build
from torch.nn.attention import varlen

from kvembed import EmbedConfig, flash
from kvembed.backbone import Backbone

CONFIGS = {
    "plain": EmbedConfig(),
    "re-routed": EmbedConfig(layers=(1, 3)),
    "slot at 0, not seen by the last": EmbedConfig(layers=(1, 3), slot_position="first", slot_self=False, bias=2.0),
    "bidirectional": EmbedConfig(layers=(2,), attention="bidirectional"),
}


def stand_in(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux, scale, window_size, enable_gqa):
    """(T,H,D) each; within each text causal or full, as flash attention does it for the two windows."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert (max_q, max_k) == (int(cu_seq_q.diff().max()), int(cu_seq_k.diff().max()))
    assert (len(query), len(key)) == (int(cu_seq_q[-1]), int(cu_seq_k[-1]))
    assert window_size in ((-1, 0), (-1, -1))
    assert enable_gqa
    assert return_aux.lse
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    out, lse = torch.empty_like(query), query.new_empty(query.shape[1], len(query))
    bounds = torch.stack([cu_seq_q[:-1], cu_seq_q[1:], cu_seq_k[:-1], cu_seq_k[1:]], 1).tolist()
    for start, end, first, last in bounds:
        q, k, v = query[start:end].transpose(0, 1), *(part[first:last].transpose(0, 1) for part in (key, value))
        logits = q @ k.transpose(1, 2) * scale
        if window_size == (-1, 0):
            logits += torch.full_like(logits, float("-inf")).triu(1)
        out[start:end] = (logits.softmax(-1) @ v).transpose(0, 1)
        lse[:, start:end] = logits.logsumexp(-1)
    return out, lse


def as_on_a_gpu(monkeypatch):
    """As if the CPU had the GPU's kernel only; returns how many texts it is given, call by call."""
    seen = []

    def counting(*args, **kwargs):
        seen.append(len(args[3]) - 1)
        return stand_in(*args, **kwargs)

    monkeypatch.setattr(flash, "_CPU", None)
    monkeypatch.setattr(flash, "has_causal", lambda query: True)
    monkeypatch.setattr(flash, "has_varlen", lambda query: True)
    monkeypatch.setattr(flash, "serves", lambda device, dtype: True)
    monkeypatch.setattr(varlen, "varlen_attn", counting)
    return seen


def test_stand_in_has_the_kernels_interface():
    ours, its = (inspect.signature(one).parameters for one in (stand_in, varlen.varlen_attn))
    assert {name: part.kind for name, part in ours.items()}.items() <= {n: p.kind for n, p in its.items()}.items()


@pytest.mark.parametrize("lengths", [(3, 21, 1, 9, 21, 2), (9, 9, 9)], ids=["many lengths", "one"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_the_kernel_for_many_lengths_gives_the_cpus_states(family, config, lengths, monkeypatch):
    backbone = Backbone(build(family))
    torch.manual_seed(1)
    ids, sizes = backbone.pad([torch.randint(3, 99, (n,)).tolist() for n in lengths])
    expected = backbone.states(ids, sizes, config)
    calls = as_on_a_gpu(monkeypatch)
    states = backbone.states(ids, sizes, config)
    for row, n in enumerate(lengths):
        torch.testing.assert_close(states[row, :n], expected[row, :n], atol=1e-4, rtol=1e-4)
    assert set(calls) <= {len(lengths)}  # all texts of a batch in one call
    assert calls  # for texts of one length, too: no other kernel has to be prepared for it


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_the_kernel_takes_a_common_beginning(family, monkeypatch):
    backbone = Backbone(build(family))
    torch.manual_seed(1)
    beginning = torch.randint(3, 99, (20,)).tolist()
    ids, sizes = backbone.pad([torch.randint(3, 99, (n,)).tolist() for n in (3, 21, 1, 9)])
    expected = backbone.states(ids, sizes, EmbedConfig(), prefix=backbone.prefix(beginning))
    calls = as_on_a_gpu(monkeypatch)
    states = backbone.states(ids, sizes, EmbedConfig(), prefix=backbone.prefix(beginning))
    assert calls
    for row, n in enumerate(sizes.tolist()):
        torch.testing.assert_close(states[row, :n], expected[row, :n], atol=1e-4, rtol=1e-4)


def test_an_accelerator_without_the_kernel_pads(llama, monkeypatch):
    """There packed texts would take a call for each length."""
    backbone = Backbone(llama)
    assert backbone.packs
    monkeypatch.setattr(Backbone, "device", torch.device("cuda"))
    assert not backbone.packs
    monkeypatch.setattr(flash, "serves", lambda device, dtype: device.type == "cuda")
    assert backbone.packs


def test_a_trial_that_finds_no_memory_says_nothing_of_the_model(llama, monkeypatch):
    def out_of_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    backbone = Backbone(llama)
    with monkeypatch.context() as patch:
        patch.setattr(backbone, "_states", out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            assert backbone.can_pack
    assert backbone.can_pack
    assert backbone.can_share


def test_without_a_kernel_the_definition_does_it(llama, monkeypatch):
    backbone = Backbone(llama)
    ids, sizes = backbone.pad([[5, 6, 7, 8], [9, 10]])
    config = CONFIGS["re-routed"]
    expected = backbone.states(ids, sizes, config)
    monkeypatch.setattr(flash, "_CPU", None)
    states = backbone.states(ids, sizes, config)
    for row, n in enumerate(sizes.tolist()):
        torch.testing.assert_close(states[row, :n], expected[row, :n], atol=1e-5, rtol=1e-5)
