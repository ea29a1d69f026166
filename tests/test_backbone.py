"""One plain forward of the decoder, read where asked; unfit models are refused by name."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import tiny
from transformers import AutoConfig, AutoModelForCausalLM

from kvembed import EmbedConfig, Embedder, InputError, UnsupportedModel
from kvembed.backbone import Backbone


def test_what_the_probe_finds(llama):
    backbone = Backbone(llama)
    assert backbone.attention_layers == (0, 1, 2, 3, 4)
    assert (len(backbone.layers), backbone.dim, backbone.max_tokens) == (5, 48, 1024)
    assert backbone.decoder is llama.model


def test_a_hybrid_offers_only_its_attention_layers():
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            "qwen3_next",
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=4,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            linear_num_key_heads=2,
            linear_num_value_heads=2,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
            num_experts=2,
            num_experts_per_tok=1,
            intermediate_size=32,
        )
    ).eval()
    backbone = Backbone(model)
    assert len(backbone.layers) == 4
    assert backbone.attention_layers == (3,)
    with pytest.raises(InputError, match="layer 1 of qwen3_next has no attention; those with: 3"):
        backbone.changed_layers(EmbedConfig(layers=(1,)))


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("bloom", "does not go through transformers' attention interface"),
        ("mamba", "it has no attention"),
        ("bert", "not causal"),
    ],
)
def test_refused_by_name_with_the_reason(model_type, reason):
    config = AutoConfig.for_model(model_type, vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(UnsupportedModel, match=f"^{model_type} .*can't be re-routed: .*{reason}"):
        Backbone(model)


def test_exactly_one_decoder_forward_without_cache_head_or_hidden_states(llama):
    calls, heads = [], []
    decoder_hook = llama.model.register_forward_hook(
        lambda module, args, kwargs, output: calls.append((kwargs, output)), with_kwargs=True
    )
    head_hook = llama.lm_head.register_forward_hook(lambda *_: heads.append(1))
    backbone = Backbone(llama)
    ids, lengths = backbone.pad([[5, 6, 7], [8, 9, 10]])
    calls.clear()
    try:
        backbone.states(ids, lengths, EmbedConfig(layers=(1, 2)))
    finally:
        decoder_hook.remove()
        head_hook.remove()
    ((kwargs, output),) = calls
    assert kwargs["use_cache"] is False
    assert output.past_key_values is None
    assert output.hidden_states is None
    assert heads == []


def test_output_layer_reads_before_the_final_norm(llama):
    backbone = Backbone(llama)
    ids, lengths = backbone.pad([[5, 6, 7]])
    with torch.inference_mode():
        hidden = llama(ids, output_hidden_states=True).hidden_states
        below_norm = backbone.states(ids, lengths, EmbedConfig(output_layer=4))
        assert torch.equal(backbone.states(ids, lengths, EmbedConfig(output_layer=1)), hidden[2])
        assert torch.equal(backbone.states(ids, lengths, EmbedConfig()), hidden[-1])
        assert torch.equal(llama.model.norm(below_norm), hidden[-1])


def test_no_layer_runs_above_the_one_that_is_read(llama):
    backbone = Backbone(llama)
    ids, lengths = backbone.pad([[5, 6, 7]])
    ran = []
    with backbone.observing({index: lambda _, index=index: ran.append(index) for index in range(5)}):
        backbone.states(ids, lengths, EmbedConfig(layers=(1, 4), output_layer=2))
        assert ran == [0, 1, 2]
        betas = {}
        backbone.states(ids, lengths, EmbedConfig(layers=(1, 4), output_layer=2), betas)
    assert ran[3:] == [0, 1, 2]
    assert sorted(betas) == [1]  # what no vector sees is not shown


@pytest.mark.parametrize("layers", [[5], [0, 99]])
def test_layers_out_of_range(llama, layers):
    with pytest.raises(InputError, match=f"layer {layers[-1]} is out of range: llama has layers 0 to 4"):
        Backbone(llama).changed_layers(EmbedConfig(layers=layers))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(llama, dtype):
    config = EmbedConfig(layers=(1, 2))
    full, half = Backbone(llama), Backbone(copy.deepcopy(llama).to(dtype))
    ids, lengths = full.pad([list(range(2, 40))])
    a, b = full.states(ids, lengths, config)[0], half.states(ids, lengths, config)[0]
    assert b.dtype == dtype
    assert torch.nn.functional.cosine_similarity(a, b.float()).mean() > 0.99


def test_a_compressed_attention_that_shows_itself_late_is_refused_then(llama):
    """A probe of 16 tokens can't see an attention that compresses keys from 128 on."""
    from kvembed.reroute import Reroute

    backbone = Backbone(llama)
    module = backbone.layers[1].self_attn
    route = Reroute(frozenset({4}), backbone.layer_calls, torch.tensor([3]))
    query, key = torch.randn(1, 4, 4, 12), torch.randn(1, 2, 5, 12)
    with pytest.raises(UnsupportedModel, match="sees 5 keys for 4 tokens"):
        route(module, query, key, key, None)
    with pytest.raises(UnsupportedModel, match="takes block_indices, indices"):
        route(module, query, key[:, :, :4], key[:, :, :4], None, indices=key, block_indices=key, sliding_window=None)


def test_a_decoder_that_does_not_run_is_told_apart_from_one_that_cannot_be_hooked(llama):
    broken = copy.deepcopy(llama)
    broken.model.embed_tokens.weight = torch.nn.Parameter(torch.zeros(400, 7))
    with pytest.raises(UnsupportedModel, match="a plain forward of its decoder fails"):
        Backbone(broken)


def test_longrope_texts_on_either_side_of_the_border_do_not_share_a_batch(tokenizer):
    """Its angles depend on the longest text of a batch; a vector must not."""
    import numpy as np

    from kvembed import Embedder

    rope = {"rope_type": "longrope", "short_factor": [1.0] * 6, "long_factor": [4.0] * 6, "rope_theta": 1e4}
    rope |= {"original_max_position_embeddings": 40}
    model = tiny("phi3", rope_parameters=rope, sliding_window=None, original_max_position_embeddings=40)
    embedder = Embedder.from_model(model, tokenizer, method="kv", layers=[1], batch_tokens=10_000)
    texts = ["short", "a middling text", "word " * 40, "again short", "word " * 60]
    assert Backbone(model).rope_border == 40
    assert Backbone(tiny()).rope_border is None
    np.testing.assert_allclose(embedder.encode(texts), np.stack([embedder.encode(text) for text in texts]), atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, on its way to compile
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_compiled_is_the_same(family):
    ids = torch.arange(60).reshape(3, 20) + 3
    plain, compiled = Backbone(tiny(family)), Backbone(tiny(family))
    compiled.compile()
    routed = EmbedConfig(layers=(1, 3), slot_position="first")
    for lengths in ([20, 20, 20], [20, 3, 9], [1, 2, 3]):
        n = max(lengths)
        args = (ids[:, :n], torch.tensor(lengths), routed)
        torch.testing.assert_close(compiled.states(*args)[0, :1], plain.states(*args)[0, :1], atol=1e-4, rtol=1e-4)
    assert all(part._compiled_call_impl is not None for part in compiled.layers[0].children())


def test_a_vocabulary_of_letters():
    assert len(Backbone(tiny(vocab_size=12)).layers) == 5


def test_layers_of_another_width_than_the_top_are_not_read(tokenizer):
    model = tiny("opt", word_embed_proj_dim=24, ffn_dim=64)
    for options in ({"method": "kv"}, {"method": "token-prepending"}, {"method": "mean", "output_layer": 1}):
        with pytest.raises(UnsupportedModel, match="give a token 1 x 48 numbers, and the top 24"):
            Embedder.from_model(model, tokenizer, **options)
    assert Embedder.from_model(model, tokenizer, method="kv", layers=[1, 2]).encode(["a"]).shape == (1, 24)
