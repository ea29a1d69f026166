"""Packed texts come out as each alone; a model that mixes tokens outside its attention is padded."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import tiny
from families import build
from hypothesis import given
from hypothesis import strategies as st

from kvembed import EmbedConfig
from kvembed.backbone import Backbone
from kvembed.packing import pack
from kvembed.reroute import Reroute

CONFIGS = {
    "plain": EmbedConfig(),
    "re-routed": EmbedConfig(layers=(1, 3)),
    "slot at 0": EmbedConfig(layers=(1, 3), slot_position="first", slot_self=False, bias=2.0),
    "bidirectional": EmbedConfig(layers=(2,), attention="bidirectional"),
    "inside": EmbedConfig(layers=(1,), output_layer=2),
}


@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    extra=st.integers(0, 3),
    seed=st.integers(0, 9),
    multiple=st.sampled_from([1, 8, 32]),
)
def test_pack_takes_the_padding_out_and_unpack_puts_it_back(lengths, extra, seed, multiple):
    torch.manual_seed(seed)
    n = max(lengths) + extra
    real = torch.arange(n) < torch.tensor(lengths)[:, None]
    ids = torch.randint(1, 99, (len(lengths), n)) * real
    packed = pack(ids, torch.tensor(lengths), multiple)
    filling = -sum(lengths) % multiple
    assert packed.ids.shape == packed.positions.shape == (1, sum(lengths) + filling)
    assert list(packed.lengths) == sorted([*lengths, filling] if filling else lengths, reverse=True)
    assert torch.equal(packed.unpack(packed.ids[..., None])[..., 0], ids)
    assert torch.equal(packed.unpack(packed.positions[..., None])[..., 0], torch.arange(n).expand_as(ids) * real)
    assert torch.equal(packed.ids[0, packed.starts], ids[:, 0])


FAMILIES = ["llama", "gpt2", "gemma3_text", "gemma2", "gpt_oss", "deepseek_v3", "qwen3_moe"]
OTHER_ROTATION = ["gpt2", "gpt_oss", "deepseek_v3"]  # or none: nothing to turn back


@pytest.mark.parametrize("multiple", [1, 64])
@pytest.mark.parametrize(
    ("family", "config"),
    [(f, c) for f in FAMILIES for c in CONFIGS if c != "slot at 0" or f not in OTHER_ROTATION],
)
def test_packed_is_each_text_alone(family, config, multiple, monkeypatch):
    monkeypatch.setattr(Backbone, "_multiple", lambda self, lengths: multiple)
    backbone = Backbone(build(family))
    assert backbone.can_pack
    torch.manual_seed(1)
    texts = [torch.randint(3, 99, (n,)).tolist() for n in (3, 21, 1, 9, 21, 2)]
    ids, lengths = backbone.pad(texts)
    below = []
    together = backbone.states(ids, lengths, CONFIGS[config], readers={0: below.append})
    for row, text in enumerate(texts):
        alone_below = []
        alone = backbone.states(*backbone.pad([text]), CONFIGS[config], readers={0: alone_below.append})
        for one, all_ in ((alone, together), (alone_below[0], below[0])):
            torch.testing.assert_close(all_[row, : len(text)], one[0], atol=1e-4 * float(one.abs().max()), rtol=0)


def test_no_padding_is_computed(llama):
    backbone = Backbone(llama)
    assert backbone.can_pack
    seen = []
    hook = llama.model.embed_tokens.register_forward_hook(lambda _, args, output: seen.append(args[0].shape))
    try:
        backbone.states(*backbone.pad([[5] * 30, [6], [7] * 9]), EmbedConfig(layers=(2,)))
        backbone.states(*backbone.pad([[5] * 9, [6] * 9]), EmbedConfig(layers=(2,)))
    finally:
        hook.remove()
    assert seen == [(1, 40), (2, 9)]  # nothing to gain from the second


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_tokens_in_bfloat16_are_filled_up_to_whole_vectors(llama, dtype):
    """Or else matrix products take up to a third longer on a CPU."""
    backbone = Backbone(copy.deepcopy(llama).to(dtype))
    assert backbone.can_pack
    seen = []
    backbone.model.model.embed_tokens.register_forward_hook(lambda _, args, output: seen.append(args[0].numel()))
    for sizes in ([1, 126], [3, 127], [60, 41, 30, 5]):
        states = backbone.states(*backbone.pad([[5] * n for n in sizes]), EmbedConfig(layers=(2,)))
        assert states.shape[:2] == (len(sizes), max(sizes))
        assert states.isfinite().all()
    assert seen == ([127, 136, 136] if dtype == torch.bfloat16 else [127, 130, 136])


def test_no_square_mask_for_full_attention(llama):
    """The mask of packed texts would be (T,T)."""
    backbone = Backbone(llama)
    masks = []

    class Watched(Reroute):
        def _attend(self, module, layer, last, query, key, value, attention_mask, *rest):
            masks.append(attention_mask)
            return super()._attend(module, layer, last, query, key, value, attention_mask, *rest)

    backbone.rerouting = Watched
    ids, lengths = backbone.pad([[5] * 30, [6]])
    backbone.forward(ids, lengths, EmbedConfig(), packed=pack(ids, lengths))
    assert masks == [None] * 2 * 5


@pytest.mark.parametrize("family", ["lfm2", "qwen3_next", "jamba", "recurrent_gemma"])
def test_a_model_that_mixes_tokens_elsewhere_is_padded(family):
    assert not Backbone(build(family)).can_pack


def test_a_control_may_look_at_its_batch_mates():
    backbone = Backbone(tiny())

    class Other(Reroute):
        def slot(self, module, layer, key, value, last):
            return tuple(part.roll(1, 0) for part in super().slot(module, layer, key, value, last))

    ids, lengths = backbone.pad([[5] * 30, [6, 7]])
    config = EmbedConfig(layers=(1, 2))
    own = backbone.states(ids, lengths, config)
    backbone.rerouting = Other
    assert (backbone.states(ids, lengths, config) - own)[:, :2].abs().max() > 1e-2
