"""The three forms are one method; the hook reaches only the forward it is meant for and leaves no trace."""

from __future__ import annotations

import threading

import pytest
import torch
from conftest import tiny
from hypothesis import given
from hypothesis import strategies as st
from reference import fast_attention, rerouted_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvembed import EmbedConfig, UnsupportedModel
from kvembed.attention import closed, delegated, prepended, unrotate
from kvembed.attention_interface import attending, stock_attention
from kvembed.backbone import Backbone
from kvembed.hooks import keeping_rotations
from kvembed.reroute import Reroute

LOWEST = torch.finfo(torch.float32).min


def random_qkv(seed, texts, heads, kv_heads, length, size):
    torch.manual_seed(seed)
    query = torch.randn(texts, heads, length, size)
    key, value = torch.randn(2, texts, kv_heads, length, size).unbind()
    return query, key * 1.5, value


@given(
    seed=st.integers(0, 99),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    kv_heads=st.sampled_from([1, 2]),
    groups=st.sampled_from([1, 3]),
    size=st.sampled_from([2, 8]),
    bias=st.floats(-5, 5),
    slot_self=st.booleans(),
)
def test_closed_prepended_and_the_loop_agree(seed, lengths, kv_heads, groups, size, bias, slot_self):
    n, heads = max(lengths), kv_heads * groups
    query, key, value = random_qkv(seed, len(lengths), heads, kv_heads, n, size)
    last = torch.tensor(lengths) - 1
    rows = torch.arange(len(lengths))
    slot_key, slot_value = key[rows, :, last], value[rows, :, last]
    mask = torch.zeros(1, 1, n, n).masked_fill(torch.ones(n, n).triu(1).bool(), LOWEST)
    slot_mask = torch.full((len(lengths), 1, n), bias)
    if not slot_self:
        slot_mask[rows, :, last] = LOWEST
    a, beta_a = closed(query, key, value, slot_key, slot_value, 0.3, bias, None if slot_self else last)
    b, beta_b = prepended(query, key, value, slot_key, slot_value, mask, slot_mask, 0.3, True)
    assert beta_b is not None
    for row, length in enumerate(lengths):
        q, k, v, sk, sv = (x[row].double() for x in (query, key, value, slot_key, slot_value))
        k, v = (x.repeat_interleave(groups, 0)[:, :length] for x in (k, v))
        slot = sk.repeat_interleave(groups, 0), sv.repeat_interleave(groups, 0)
        loop = rerouted_attention(q[:, :length], k, v, 0.3, slot, bias, None)
        if not slot_self:
            loop[:, -1] = rerouted_attention(q[:, :length], k, v, 0.3, None, bias, None)[:, -1]
        for out in (a, b):
            torch.testing.assert_close(out[row, :, :length].double(), loop, atol=3e-6, rtol=1e-5)
        torch.testing.assert_close(beta_a[row, :, :length], beta_b[row, :, :length], atol=3e-6, rtol=1e-5)


def test_the_fast_oracle_is_the_slow_oracle():
    query, key, value = (x[0].double() for x in random_qkv(1, 1, 2, 2, 9, 4))
    for window in (None, 3):
        args = (query, key, value, 0.5, (key[:, -1], value[:, -1]), 1.0, window)
        torch.testing.assert_close(rerouted_attention(*args), fast_attention(*args))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_very_low_bias_is_plain_causal_attention(dtype):
    query, key, value = (x.to(dtype) for x in random_qkv(0, 2, 4, 2, 7, 8))
    slot = key[:, :, -1], value[:, :, -1]
    mask = torch.zeros(1, 1, 7, 7, dtype=dtype).masked_fill(torch.ones(7, 7).triu(1).bool(), torch.finfo(dtype).min)
    plain = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    off = -6e4 if dtype == torch.float16 else -1e9
    a, beta = closed(query, key, value, *slot, 8**-0.5, off, None)
    b, _ = prepended(query, key, value, *slot, mask, mask.new_full((2, 1, 7), off), 8**-0.5, False)
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-6}.get(dtype, 2e-2)
    torch.testing.assert_close(a, plain, atol=tolerance, rtol=0)
    torch.testing.assert_close(b, plain, atol=tolerance, rtol=0)
    assert float(beta.max()) == 0


def test_a_soft_cap_is_left_to_the_models_own_function_and_the_bias_added_after_it():
    """Against the definition: logit = cap * tanh(scale * q.k / cap), then the slot's bias, then softmax."""
    module = tiny("gemma2").model.layers[0].self_attn
    query, key, value = random_qkv(0, 2, 4, 2, 6, 12)
    slot_key, slot_value = key[:, :, -1], value[:, :, -1]
    mask = torch.zeros(1, 1, 6, 6).masked_fill(torch.ones(6, 6).triu(1).bool(), LOWEST)
    out, beta = delegated(
        module, {"softcap": 2.0}, query, key, value, slot_key, slot_value, mask, torch.full((2, 1, 6), 1.5), 0.3, True
    )
    k = torch.cat([slot_key[:, :, None], key], 2).repeat_interleave(2, 1).double()
    v = torch.cat([slot_value[:, :, None], value], 2).repeat_interleave(2, 1).double()
    logits = 2 * torch.tanh(query.double() @ k.transpose(2, 3) * 0.3 / 2)
    logits[..., 0] += 1.5
    logits[..., 1:] = logits[..., 1:].masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf)
    torch.testing.assert_close(out.double(), logits.softmax(-1) @ v, atol=1e-5, rtol=0)
    assert beta is not None
    torch.testing.assert_close(beta.double(), logits.softmax(-1)[..., 0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("model_type", ["gpt_oss", "granite_swa"])
def test_what_a_sink_takes_is_not_the_slots(model_type):
    """gpt_oss has its sinks among the weights that its function returns, granite_swa scales what comes out."""
    module = tiny(model_type).model.layers[0].self_attn
    query, key, value = random_qkv(0, 2, 4, 2, 6, 12)
    slot_key, slot_value = key[:, :, -1], value[:, :, -1]
    mask = torch.zeros(1, 1, 6, 6).masked_fill(torch.ones(6, 6).triu(1).bool(), LOWEST)
    module.sinks.data = torch.linspace(-1, 2, 4)
    kwargs, slot_mask = {"s_aux": module.sinks}, torch.full((2, 1, 6), 1.0)
    _, beta = delegated(module, kwargs, query, key, value, slot_key, slot_value, mask, slot_mask, 0.3, True)
    k = torch.cat([slot_key[:, :, None], key], 2).repeat_interleave(2, 1).double()
    logits = query.double() @ k.transpose(2, 3) * 0.3
    logits[..., 0] += 1.0
    logits[..., 1:] = logits[..., 1:].masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf)
    sinks = module.sinks.double().view(1, 4, 1, 1).expand(2, 4, 6, 1)
    torch.testing.assert_close(beta.double(), torch.cat([logits, sinks], -1).softmax(-1)[..., 0], atol=1e-5, rtol=0)


def reroute(backbone, lengths, layers=(1, 3), **options):
    return Reroute(frozenset(layers), backbone.layer_calls, torch.as_tensor(lengths) - 1, **options)


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {}),
        ("mistral", {"sliding_window": 4}),
        ("gemma3_text", {"sliding_window": 4, "sliding_window_pattern": 2}),
        ("gemma2", {"sliding_window": 4, "attn_logit_softcapping": 2.0}),
        ("qwen3", {}),
    ],
)
@pytest.mark.parametrize("slot_self", [True, False])
def test_right_padding_left_padding_and_both_forms_agree(model_type, changes, slot_self):
    backbone = Backbone(tiny(model_type, **changes))
    torch.manual_seed(3)
    texts = [torch.randint(2, 400, (n,)).tolist() for n in (1, 3, 11, 6)]
    ids, lengths = backbone.pad(texts)
    config = EmbedConfig(layers=(1, 3), bias=1.0, slot_self=slot_self)
    right = backbone.states(ids, lengths, config)

    with (
        torch.inference_mode(),
        attending(backbone.decoder, reroute(backbone, lengths, slot_self=slot_self, prefer_closed=False)),
    ):
        slow = backbone.decoder(input_ids=ids, use_cache=False).last_hidden_state

    width = ids.shape[1]
    shifted = torch.zeros_like(ids)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        shifted[row, width - len(text) :] = torch.tensor(text)
        mask[row, width - len(text) :] = 1
    with (
        torch.inference_mode(),
        attending(backbone.decoder, reroute(backbone, [width] * len(texts), slot_self=slot_self)),
    ):
        left = backbone.decoder(input_ids=shifted, attention_mask=mask, use_cache=False).last_hidden_state

    for row, text in enumerate(texts):
        n = len(text)
        alone = backbone.states(ids[row : row + 1, :n], lengths[row : row + 1], config)[0]
        for other in (right[row, :n], slow[row, :n], left[row, width - n :]):
            assert (other - alone).norm() / alone.norm() < 1e-5


def test_the_slot_is_visible_in_a_windowed_layer():
    """Text 1 differs from text 2 only outside everybody's window but the last token's: the first token must notice."""
    model = tiny("mistral", sliding_window=2, num_hidden_layers=1)
    backbone = Backbone(model)
    a, b = torch.arange(2, 12)[None], torch.arange(2, 12)[None].clone()
    b[0, -1] = 99
    length = torch.tensor([10])
    plain, routed = EmbedConfig(), EmbedConfig(layers=(0,))
    assert torch.equal(backbone.states(a, length, plain)[0, 0], backbone.states(b, length, plain)[0, 0])
    assert (backbone.states(a, length, routed)[0, 0] - backbone.states(b, length, routed)[0, 0]).norm() > 1e-3


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_slot_position_first_turns_the_key_back(model_type):
    """The slot's key at position 0 is what the key projection gives before rotation."""
    model = tiny(model_type)
    backbone = Backbone(model)
    ids, length = torch.randint(2, 400, (1, 7)), torch.tensor([7])
    got = backbone.states(ids, length, EmbedConfig(layers=(2,), slot_position="first"))[0].double()

    from reference import states

    want = states(backbone.decoder.state_dict(), backbone.decoder.config, ids[0].tolist(), {2}, first=True)
    kept = states(backbone.decoder.state_dict(), backbone.decoder.config, ids[0].tolist(), {2})
    assert (got - want).norm() / want.norm() < 1e-5
    assert (kept - want).norm() / want.norm() > 1e-3


def implementations(model):
    return [module.config._attn_implementation for module in model.modules() if hasattr(module, "config")]


def test_the_hook_is_gone_afterwards_and_after_an_exception(llama):
    backbone = Backbone(llama)
    before = implementations(llama)
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in llama.modules())
    ids, lengths = backbone.pad([[5, 6, 7]])
    plain = llama(ids).logits
    backbone.states(ids, lengths, EmbedConfig(layers=(1,), output_layer=2, slot_position="first"))
    with pytest.raises(IndexError):
        backbone.states(ids + 10_000, lengths, EmbedConfig(layers=(1,), output_layer=2, slot_position="first"))
    assert implementations(llama) == before
    assert hooks == sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in llama.modules())
    assert torch.equal(llama(ids).logits, plain)


def test_threads_and_embedders_that_share_a_model_do_not_see_each_other(llama):
    """Three kinds of forward on one model at once, each in its own thread, each always the same as alone."""
    one, two = Backbone(llama), Backbone(llama)
    ids, lengths = one.pad([list(range(2, 60)), list(range(5, 30))])
    routed, other = EmbedConfig(layers=(1, 2)), EmbedConfig(layers=(4,), bias=3.0, output_layer=3)

    def plain():
        with torch.inference_mode():
            return llama(ids).logits

    jobs = [lambda: one.states(ids, lengths, routed), lambda: two.states(ids, lengths, other), plain]
    alone = [job() for job in jobs]
    wrong: list[str] = []
    start = threading.Barrier(len(jobs) * 2)

    def run(index):
        start.wait()
        wrong.extend(f"job {index}" for _ in range(25) if not torch.equal(jobs[index](), alone[index]))

    threads = [threading.Thread(target=run, args=(i % len(jobs),)) for i in range(len(jobs) * 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert set(implementations(llama)) == {"sdpa"}


def test_a_model_that_came_with_eager_attention_goes_back_to_it():
    model = tiny()
    model.set_attn_implementation("eager")
    backbone = Backbone(model)
    ids, lengths = backbone.pad([[5, 6, 7, 8]])
    backbone.states(ids, lengths, EmbedConfig(layers=(1,)))
    assert set(implementations(model)) == {"eager"}
    assert "eager" not in ALL_ATTENTION_FUNCTIONS  # nothing of ours was registered under a stock name


def test_without_routed_layers_the_hook_gives_the_stock_model_bit_for_bit(llama):
    backbone = Backbone(llama)
    ids, lengths = backbone.pad([[5, 6, 7, 8], [9, 10, 11, 12]])
    with torch.inference_mode():
        stock = backbone.decoder(input_ids=ids, use_cache=False).last_hidden_state
        with attending(backbone.decoder, stock_attention):
            hooked = backbone.decoder(input_ids=ids, use_cache=False).last_hidden_state
    assert torch.equal(stock, hooked)
    assert torch.equal(stock, backbone.states(ids, lengths, EmbedConfig()))


@pytest.mark.parametrize(
    ("model_type", "changes", "layer", "kept"),
    [
        ("smollm3", {"no_rope_layers": [1, 0, 1, 1, 1]}, 1, True),  # no rotary embedding there: nothing to turn
        ("cohere2", {"layer_types": ["full_attention"] * 5}, 1, True),
        ("hunyuan_v1_dense", {}, 2, None),  # key norm after rotation: turning back would not be exact
        ("gpt2", {}, 2, None),  # no rotary embedding at all
        ("gemma4_text", {"layer_types": ["full_attention"] * 5}, 2, None),  # another rotation function
    ],
)
def test_slot_position_first_where_there_is_nothing_to_turn_or_no_way_to(model_type, changes, layer, kept):
    model = tiny(model_type, **changes)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name and weight.ndim == 1:
                weight.uniform_(0.5, 1.5)
    backbone = Backbone(model)
    ids, length = torch.randint(2, 400, (1, 7)), torch.tensor([7])
    config = EmbedConfig(layers=(layer,), slot_position="first")
    if kept is None:
        with pytest.raises(UnsupportedModel, match=f"layer {layer} are not plainly rotated"):
            backbone.states(ids, length, config)
    else:
        last = backbone.states(ids, length, config.replace(slot_position="last"))
        assert torch.equal(backbone.states(ids, length, config), last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_bias_of_a_few_keys_does_not_hide_their_rotation(dtype):
    """As Qwen2.5's: one coordinate is hundreds of times as large as the others move."""
    model = tiny("qwen2")
    with torch.no_grad():
        model.model.layers[2].self_attn.k_proj.bias.zero_()[5] = 300.0
        model.model.layers[2].self_attn.k_proj.weight.mul_(0.05)
    assert Backbone(model.to(dtype))._rotary_layers == ({0, 1, 2, 3, 4}, set())


def test_slot_position_first_with_a_scaled_rotation():
    """YaRN multiplies cos and sin: the turned key must carry that factor once, as a key at position 0 does."""
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e4}
    backbone = Backbone(tiny(rope_parameters=rope))
    config = EmbedConfig(layers=(2,), slot_position="first")
    ids, length = torch.randint(2, 400, (1, 9)), torch.tensor([9])
    seen = {}

    def keep(module, query, key, *args, **kwargs):
        seen.setdefault(module, key)
        return stock_attention(module, query, key, *args, **kwargs)

    with torch.inference_mode(), attending(backbone.decoder, keep):
        backbone.decoder(input_ids=ids, position_ids=torch.zeros_like(ids), use_cache=False)
    at_zero = seen[backbone.layers[0].self_attn][:, :, -1]  # layer 0's input does not depend on positions
    rotations = {}
    with torch.inference_mode(), keeping_rotations(backbone.decoder, rotations), attending(backbone.decoder, keep):
        seen.clear()
        backbone.decoder(input_ids=ids, use_cache=False)
    module = backbone.layers[0].self_attn
    turned = unrotate(module, 0, seen[module][:, :, -1], rotations, length - 1)
    torch.testing.assert_close(turned, at_zero, atol=1e-4, rtol=1e-4)
    assert torch.isfinite(backbone.states(ids, length, config)).all()
