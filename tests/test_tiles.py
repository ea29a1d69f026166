"""Tiles give the definition's attention, in bfloat16, for any mix of lengths; and states as near to float32's."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import rerouted_attention

from kvembed import EmbedConfig, backbone, reroute
from kvembed.backbone import Backbone
from kvembed.tiles import TILES, Tiles, prefers_tiles

CPU = torch.device("cpu")


def definition(query, key, value, lengths, scale, routed, bias, slot_self, slot_key=None, before=None, window=None):
    """(1,T,Hq,Dv) in float64, text by text."""
    groups = query.shape[1] // key.shape[1]
    parts = []
    for text, part in enumerate(torch.arange(sum(lengths)).split(lengths)):
        q = query[0][:, part].double()
        k, v = (x[0][:, part].double().repeat_interleave(groups, 0) for x in (key, value))
        if before is not None:  # queries of its tokens, which are thrown away again, may be anything
            k, v = (
                torch.cat([y.double().repeat_interleave(groups, 0), x], 1) for x, y in zip((k, v), before, strict=True)
            )
            q = torch.cat([k[:, : before[0].shape[1]], q], 1)
        slot_k = k[:, -1] if slot_key is None else slot_key[text].double().repeat_interleave(groups, 0)
        slot = (slot_k, v[:, -1]) if routed else None
        out = rerouted_attention(q, k, v, scale, slot, bias, window)
        if routed and not slot_self:
            out[:, -1] = rerouted_attention(q, k, v, scale, None, bias, window)[:, -1]
        parts.append(out.transpose(0, 1)[-len(part) :])
    return torch.cat(parts)[None]


def random_packed(seed, tokens, heads, kv_heads, size):
    torch.manual_seed(seed)
    return [torch.randn(1, tokens, count, size).bfloat16().transpose(1, 2) for count in (heads, kv_heads, kv_heads)]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 99),
    lengths=st.lists(
        st.sampled_from([1, 2, 5, 40, *TILES, *(size + 1 for size in TILES), 2 * TILES[-1], 300]),
        min_size=1,
        max_size=6,
    ),
    kv_heads=st.sampled_from([1, 2]),
    groups=st.sampled_from([1, 3]),
    size=st.sampled_from([8, 16]),
    bias=st.sampled_from([-1e9, -2.0, 0.0, 1.0, 5.0]),
    slot_self=st.booleans(),
    routed=st.booleans(),
    turned=st.booleans(),
    prefix=st.sampled_from([0, 1, 17, 48]),
    window=st.sampled_from([None, 1, 3, 50, 128, 200]),
)
def test_tiles_are_the_definition(
    seed, lengths, kv_heads, groups, size, bias, slot_self, routed, turned, prefix, window
):
    lengths = sorted(lengths, reverse=True)
    query, key, value = random_packed(seed, sum(lengths), kv_heads * groups, kv_heads, size)
    slot_key = torch.randn(len(lengths), kv_heads, size).bfloat16() if turned else None
    before = None
    if prefix and not routed:
        before = tuple(torch.randn(kv_heads, prefix, size).bfloat16() for _ in range(2))
    tiles = Tiles(lengths, bias, slot_self, routed, prefix if before else 0, window)
    out = tiles.attend(query, key, value, 0.3, slot_key if routed else None, before)
    expected = definition(query, key, value, lengths, 0.3, routed, bias, slot_self, slot_key, before, window)
    torch.testing.assert_close(out.double(), expected, atol=0.04, rtol=0)
    assert float((out.double() - expected).abs().mean()) < 4e-3


def test_a_long_text_has_few_widths_and_no_square_mask(monkeypatch):
    tiles = Tiles([5000], 1.0, True, True)
    query, key, value = random_packed(0, 5000, 2, 1, 16)
    out = tiles.attend(query, key, value, 0.25)
    expected = definition(query, key, value, [5000], 0.25, True, 1.0, True)
    torch.testing.assert_close(out.double(), expected, atol=0.04, rtol=0)
    assert tiles._mask.numel() + tiles._corner.numel() < 5000**2 / 50
    made = []
    product = torch.baddbmm
    monkeypatch.setattr(torch, "baddbmm", lambda *args, **options: made.append(product(*args, **options)) or made[-1])
    tiles.attend(query, key, value, 0.25)
    assert len({part.shape for part in made}) <= 8  # a new shape costs more than the product


def test_a_text_does_not_depend_on_its_batch_mates():
    query, key, value = random_packed(1, 90, 4, 2, 16)
    alone = Tiles([40], 1.0, True, True).attend(*(part[:, :, :40] for part in (query, key, value)), 0.25)
    tiles = Tiles([40, 30, 20], 1.0, True, True)
    together = tiles.attend(query, key, value, 0.25)[:, :40]
    torch.testing.assert_close(alone, together, atol=1e-2, rtol=0)
    key[:, :, 40:] *= 30
    assert torch.equal(tiles.attend(query, key, value, 0.25)[:, :40], together)


@pytest.mark.parametrize("prefix", [0, 20])
def test_logits_in_the_hundreds_keep_their_differences(prefix):
    """As Qwen2.5's: a bias in all keys. Rounded to bfloat16 as they are, such logits are a whole number apart."""
    query, key, value = (part.float() for part in random_packed(2, prefix + 200, 2, 1, 16))
    query[..., 0] += 20
    key[..., 0] += 40
    query, key, value = query.bfloat16(), key.bfloat16(), value.bfloat16()
    expected = definition(query, key, value, [prefix + 200], 1.0, not prefix, 1.0, True)[:, prefix:]
    before = (key[0, :, :prefix], value[0, :, :prefix]) if prefix else None
    own = (part[:, :, prefix:] for part in (query, key, value))
    out = Tiles([200], 1.0, True, not prefix, prefix).attend(*own, 1.0, None, before).double()
    logits = (query @ key.repeat_interleave(2, 1).transpose(2, 3))[0]
    logits += torch.full_like(logits, float("-inf")).triu(1)
    naive = (logits.softmax(-1) @ value[0].repeat_interleave(2, 0)).transpose(0, 1)[None].double()[:, prefix:]
    assert (out - expected).abs().mean() < (naive - expected).abs().mean() / 4


@pytest.mark.parametrize(
    ("family", "changes"),
    [("llama", {}), ("qwen2", {}), ("gemma3_text", {"sliding_window": 16, "sliding_window_pattern": 2})],
)
@pytest.mark.parametrize("config", [EmbedConfig(), EmbedConfig(layers=(1, 3), slot_position="first", slot_self=False)])
def test_states_are_as_near_to_float32s_as_the_fused_kernels(family, changes, config, monkeypatch):
    exact = Backbone(tiny(family, **changes))
    half = Backbone(tiny(family, **changes).to(torch.bfloat16))
    exact.decoder.load_state_dict({name: part.float() for name, part in half.decoder.state_dict().items()})
    torch.manual_seed(1)
    ids, lengths = half.pad([torch.randint(3, 99, (n,)).tolist() for n in (150, 40, 33, 2, 1)])
    real = torch.arange(ids.shape[1]) < lengths[:, None]
    expected = exact.states(ids, lengths, config)[real]
    used = []
    attend = Tiles.attend
    monkeypatch.setattr(Tiles, "attend", lambda self, *args: used.append(1) or attend(self, *args))
    monkeypatch.setattr(reroute, "prefers_tiles", lambda device, dtype: dtype == torch.bfloat16)
    ours = half.states(ids, lengths, config)[real].float()
    assert used
    used.clear()
    for module in (reroute, backbone):
        monkeypatch.setattr(module, "prefers_tiles", lambda device, dtype: False)
    fused = half.states(ids, lengths, config)[real].float()
    assert not used
    assert (ours - expected).norm() < 1.5 * (fused - expected).norm()


def test_texts_that_would_leave_a_third_of_small_tiles_empty_share_larger_ones():
    tiles = Tiles([20] * 90, 1.0, True, False, prefix=180)
    assert tiles._tile == 64
    assert tiles._shared * tiles._tile < 1.1 * 20 * 90
    assert Tiles([31] * 90, 1.0, True, False, prefix=180)._tile == 32
    assert Tiles([20], 1.0, True, False, prefix=180)._tile == 32


def test_a_mask_is_taken_for_a_window_only_if_it_is_one():
    def is_window(mask, window):
        one = reroute.Reroute(frozenset(), {}, torch.tensor([0]), packed=(6, 2))
        return one._is_window(mask, window)

    place = torch.arange(6)
    apart = place[:, None] - place
    mask = ((apart >= 0) & (apart < 3))[None, None]
    assert is_window(mask, 3)
    assert not is_window(mask, 4)
    assert not is_window(mask.float(), 3)
    assert not is_window(mask[..., :5, :5], 3)
    blocks = ((apart >= 0) & (place[:, None] // 3 == place // 3))[None, None]  # as llama4's
    assert not is_window(blocks, 3)


def test_where_tiles_are_used(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert prefers_tiles(CPU, torch.bfloat16)
    assert not prefers_tiles(CPU, torch.float32)
    assert not prefers_tiles(torch.device("cuda"), torch.bfloat16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert not prefers_tiles(CPU, torch.bfloat16)
