"""The GPU's path on a CPU: a stand-in with the kernel's own interface, and what happens where no kernel is."""

from __future__ import annotations

import inspect

import pytest
import torch
from families import build

from kvembed import EmbedConfig, flash
from kvembed.backbone import Backbone

CONFIGS = {
    "plain": EmbedConfig(),
    "re-routed": EmbedConfig(layers=(1, 3)),
    "slot at 0, not seen by the last": EmbedConfig(layers=(1, 3), slot_position="first", slot_self=False, bias=2.0),
    "bidirectional": EmbedConfig(layers=(2,), attention="bidirectional"),
}


def stand_in(
    query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *,
    scale, window_size_left, window_size_right,
):  # fmt: skip
    """(T,H,D) each; within each text as flash attention does it: aligned at the end, in a window if there is one."""
    assert cum_seq_q.dtype == cum_seq_k.dtype == torch.int32
    assert (max_q, max_k) == (int(cum_seq_q.diff().max()), int(cum_seq_k.diff().max()))
    assert (len(query), len(key)) == (int(cum_seq_q[-1]), int(cum_seq_k[-1]))
    assert (dropout_p, return_debug_mask) == (0.0, False)
    assert window_size_right == (0 if is_causal or max_q == 1 else -1)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    out, lse = torch.empty_like(query), query.new_empty(query.shape[1], len(query), dtype=torch.float32)
    bounds = torch.stack([cum_seq_q[:-1], cum_seq_q[1:], cum_seq_k[:-1], cum_seq_k[1:]], 1).tolist()
    for start, end, first, last in bounds:
        q, k, v = query[start:end].transpose(0, 1), *(part[first:last].transpose(0, 1) for part in (key, value))
        logits = (q @ k.transpose(1, 2)).float() * scale
        apart = torch.arange(end - start)[:, None] + (last - first) - (end - start) - torch.arange(last - first)
        if window_size_right == 0:
            logits.masked_fill_(apart < 0, float("-inf"))
        if window_size_left >= 0:
            logits.masked_fill_(apart > window_size_left, float("-inf"))
        out[start:end] = (logits.softmax(-1).to(v.dtype) @ v).transpose(0, 1)
        lse[:, start:end] = logits.logsumexp(-1)
    return out, lse, None, None, None


def as_on_a_gpu(monkeypatch):
    """As if the CPU had the GPU's kernel only; returns how many texts it is given, call by call."""
    seen = []

    def counting(*args, **kwargs):
        seen.append(len(args[3]) - 1)
        return stand_in(*args, **kwargs)

    monkeypatch.setattr(flash, "_CPU", None)
    monkeypatch.setattr(flash, "_GPU", counting)
    monkeypatch.setattr(flash, "takes_causal", lambda query: True)
    monkeypatch.setattr(flash, "takes_packed", lambda query: True)
    monkeypatch.setattr(flash, "serves", lambda device, dtype: True)
    return seen


def test_stand_in_has_the_kernels_interface():
    its = torch.ops.aten._flash_attention_forward.default._schema
    kinds = {False: inspect.Parameter.POSITIONAL_OR_KEYWORD, True: inspect.Parameter.KEYWORD_ONLY}
    named = [(argument.name, kinds[argument.kwarg_only]) for argument in its.arguments]
    ours = [(name, part.kind) for name, part in inspect.signature(stand_in).parameters.items()]
    assert ours[:10] == named[:10]
    assert {*ours} <= {*named}
    assert [one.name for one in its.returns][:2] == ["output", "softmax_logsumexp"]


def another_base(*args, **kwargs):
    out, lse, *rest = stand_in(*args, **kwargs)
    return out, lse * 1.4427, *rest


def without_windows(*args, **kwargs):
    return stand_in(*args, **kwargs | {"window_size_left": -1})


def by_text(*args, **kwargs):
    out, lse, *rest = stand_in(*args, **kwargs)
    return out, lse[None], *rest


def refuses(*args, **kwargs):
    raise NotImplementedError("no kernel image is available")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_kernel_that_does_what_it_should_is_used(dtype, monkeypatch):
    monkeypatch.setattr(flash, "_CPU", None)
    monkeypatch.setattr(flash, "_GPU", stand_in)
    assert flash._agrees(torch.device("cpu"), dtype)


@pytest.mark.parametrize("kernel", [another_base, without_windows, by_text, refuses])
def test_a_kernel_that_does_something_else_is_not_used_and_that_is_told(kernel, monkeypatch, caplog):
    monkeypatch.setattr(flash, "_CPU", None)
    monkeypatch.setattr(flash, "_GPU", kernel)
    assert not flash._agrees(torch.device("cpu"), torch.bfloat16)
    assert "slower form" in caplog.text


def test_a_trial_of_the_kernel_that_finds_no_memory_says_nothing_of_it(monkeypatch):
    def out_of_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(flash, "_GPU", out_of_memory)
        patch.setattr(flash, "_CPU", None)
        with pytest.raises(torch.OutOfMemoryError):
            flash._agrees(torch.device("cpu"), torch.bfloat16)
    monkeypatch.setattr(flash, "_CPU", None)
    monkeypatch.setattr(flash, "_GPU", stand_in)
    assert flash._agrees(torch.device("cpu"), torch.bfloat16)


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
    assert set(calls) == {len(lengths)}  # all texts of a batch in one call, also of one length and in a window
    bidirectional = config.attention == "bidirectional"
    assert len(calls) == len(backbone.layers) + len(config.layers) * (-1 if bidirectional else 1)


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
        patch.setattr(backbone, "forward", out_of_memory)
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
