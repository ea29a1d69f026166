"""A beginning that prompts share is computed once, and their states come out as if it had been computed with each."""

from __future__ import annotations

import operator

import numpy as np
import pytest
import torch
from conftest import NOTICES, tiny
from families import build
from hypothesis import given
from hypothesis import strategies as st

from kvembed import EmbedConfig, Embedder, InputError, OutOfMemory, reroute
from kvembed import backbone as backbones
from kvembed.backbone import Backbone
from kvembed.config import Readout
from kvembed.methods import preset
from kvembed.prefix import PrefixCache, can_share_prefix, shared_prefix, without
from kvembed.prompts import Prompt, Prompter

EXAMPLES = "A committee approved the budget: finance. A jockey riding a horse: sport. {text}:"


@pytest.mark.parametrize("config", [EmbedConfig(), EmbedConfig(output_layer=2)], ids=["top", "inside"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "gemma2", "gpt_oss", "mistral", "deepseek_v3"])
def test_states_are_those_of_the_whole(family, config):
    """Among them families with windows shorter than the beginning, a soft cap, sinks, learned positions."""
    backbone = Backbone(build(family))
    assert backbone.can_share
    torch.manual_seed(1)
    beginning = torch.randint(3, 99, (19,)).tolist()
    texts = [torch.randint(3, 99, (n,)).tolist() for n in (3, 21, 1, 9, 21, *[2] * 20, 40)]
    below = []
    prefix = backbone.prefix(beginning)
    states = backbone.states(*backbone.pad(texts), config, readers={0: below.append}, prefix=prefix)
    for row, text in enumerate(texts):
        whole_below = []
        ids, lengths = backbone.pad([beginning + text])
        whole = backbone.states(ids, lengths, config, readers={0: whole_below.append})
        for ours, its in ((states, whole), (below[0], whole_below[0])):
            tolerance = 1e-4 * float(its.abs().max())
            torch.testing.assert_close(ours[row, : len(text)], its[0, 19:], atol=tolerance, rtol=0)


def test_chunks_of_attention_are_kept():
    backbone = Backbone(build("llama4_text"))
    assert not backbone.can_pack  # of queries that it scales by their place in the row
    backbone = Backbone(build("llama4_text"))
    backbone.model.config.attn_temperature_tuning = False
    assert backbone.can_share
    beginning, text = [5, 9, 7] * 7, [11, 30, 8, 64, 21]
    states = backbone.states(*backbone.pad([text, [7]]), EmbedConfig(), prefix=backbone.prefix(beginning))
    whole = backbone.states(*backbone.pad([beginning + text]), EmbedConfig())
    torch.testing.assert_close(states[0], whole[0, 21:], atol=1e-4 * float(whole.abs().max()), rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_trial_notices_another_beginning(dtype, monkeypatch):
    backbone = Backbone(tiny().to(dtype))
    right = backbone.prefix
    monkeypatch.setattr(backbone, "prefix", lambda ids: right(ids[::-1]))
    assert not backbone.can_share
    del vars(backbone)["can_share"]
    monkeypatch.undo()
    assert backbone.can_share


@pytest.mark.parametrize(
    ("family", "changes"),
    [("qwen2", {}), ("gemma3_text", {"sliding_window": 16, "sliding_window_pattern": 2})],
)
def test_bfloat16_is_as_near_to_float32_as_without(family, changes, monkeypatch):
    """In tiles, and in windows as with other kernels."""
    for module in (reroute, backbones):
        monkeypatch.setattr(module, "prefers_tiles", lambda device, dtype: dtype == torch.bfloat16)
    half = Backbone(tiny(family, **changes).to(torch.bfloat16))
    exact = Backbone(tiny(family, **changes))
    exact.decoder.load_state_dict({name: part.float() for name, part in half.decoder.state_dict().items()})
    torch.manual_seed(1)
    beginning = torch.randint(3, 99, (20,)).tolist()
    texts = [torch.randint(3, 99, (n,)).tolist() for n in (150, 40, 33, 2, 1)]
    assert half.can_share
    ids, lengths = half.pad(texts)
    real = torch.arange(ids.shape[1]) < lengths[:, None]
    shared = half.states(ids, lengths, EmbedConfig(), prefix=half.prefix(beginning))[real].float()
    wholes = half.pad([beginning + text for text in texts])
    whole, expected = (one.states(*wholes, EmbedConfig())[:, 20:][real].float() for one in (half, exact))
    assert (shared - expected).norm() < 1.5 * (whole - expected).norm()


def test_nothing_may_be_changed_after_a_common_beginning(llama):
    backbone = Backbone(llama)
    with pytest.raises(ValueError, match="nothing is changed"):
        backbone.states(*backbone.pad([[7] * 9]), EmbedConfig(layers=(1,)), prefix=backbone.prefix([5] * 20))


def test_no_square_mask_for_full_attention(llama, monkeypatch):
    backbone = Backbone(llama)
    prefix = backbone.prefix([5] * 20)
    masked = []
    monkeypatch.setattr(backbone.rerouting, "_attend", lambda *args: masked.append(args))
    backbone.states(*backbone.pad([[7] * 9, [8] * 4]), EmbedConfig(), prefix=prefix)
    assert not masked


@pytest.mark.parametrize("family", ["lfm2", "qwen3_next", "jamba"])
def test_not_where_texts_can_not_be_packed(family):
    assert not Backbone(build(family)).can_share


def test_not_where_the_longest_text_decides_how_positions_rotate():
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 64, "rope_theta": 1e4}
    rope |= {"short_factor": [1.0] * 6, "long_factor": [2.0] * 6, "factor": 8.0}
    backbone = Backbone(tiny("phi3", rope_parameters=rope, pad_token_id=0))
    assert backbone.can_pack
    assert not backbone.can_share


def test_a_model_that_makes_its_own_masks_is_left_alone(llama):
    """As if its masks had nothing to do with what attention asks for."""
    backbone = Backbone(llama)
    beginning = backbone.prefix([5] * 20)

    class Odd(backbone.rerouting):
        def __call__(self, module, query, key, value, attention_mask, **kwargs):
            mask = torch.ones(1, 1, query.shape[2], query.shape[2], dtype=torch.bool).tril()
            return super().__call__(module, query, key, value, mask, **kwargs)

    backbone.rerouting = Odd
    assert backbone.can_pack
    assert not backbone.can_share
    with pytest.raises(Exception, match="makes its masks itself"):
        backbone.states(*backbone.pad([[7] * 9]), EmbedConfig(), prefix=beginning)


@pytest.mark.parametrize(
    "options",
    [
        {"pooling": "last"},
        {"pooling": "mean", "mean_tokens": "content"},
        {"pooling": "last", "more_readouts": [Readout(mean_tokens="content", output_layer=1)], "transform": "whiten"},
    ],
    ids=["last", "mean", "several"],
)
def test_vectors_are_the_same(llama, tokenizer, options):
    config = EmbedConfig(document=(EXAMPLES, "{text}"), query=("{text}", EXAMPLES), **options)
    texts = [f"{notice} {number}" for notice in NOTICES for number in range(5)][:120]
    embedder = Embedder(llama, tokenizer, config, texts=texts)
    mixed = [*texts[:30], "", " ", ".", "a" * 300, *texts[30:40]]  # an empty text has nothing but its template
    computed = []
    hook = llama.model.layers[0].mlp.register_forward_hook(
        lambda _, args, output: computed.append(len(output.flatten(0, 1)))
    )
    try:
        shared = {role: embedder.encode_views(mixed, role=role) for role in ("document", "query")}
        tokens = sum(computed)
        computed.clear()
        vars(embedder.backbone)["can_share"] = False
        for role, ours in shared.items():
            apart = embedder.encode_views(mixed, role=role)
            torch.testing.assert_close(*map(torch.from_numpy, (ours.vectors, apart.vectors)), atol=1e-4, rtol=1e-4)
            assert ours.token_counts.tolist() == apart.token_counts.tolist()
    finally:
        hook.remove()
    assert tokens < 0.7 * sum(computed)


def test_out_of_memory_in_the_beginning_is_told_as_any_other(llama, tokenizer, monkeypatch):
    embedder = Embedder(llama, tokenizer, EmbedConfig(document=EXAMPLES, query=EXAMPLES, pooling="last"))

    def fail(ids):
        raise torch.OutOfMemoryError

    assert embedder.backbone.can_share
    monkeypatch.setattr(embedder._reader.prefixes, "_compute", fail)
    with pytest.raises(OutOfMemory):
        embedder.encode(NOTICES)


def test_limits_and_counts_are_without_what_is_shared(llama, tokenizer):
    config = EmbedConfig(document=EXAMPLES, query=EXAMPLES, pooling="last", max_tokens=30)
    embedder = Embedder(llama, tokenizer, config)
    long, short = (rendered[0] for rendered in embedder.prompts(["word " * 100, "a"]))
    assert (long.tokens, long.tokens_cut > 0, short.tokens_cut) == (30, True, 0)
    assert long.prefix_tokens == short.prefix_tokens == len(shared_prefix(short)) == len(short.ids) - short.tokens > 40
    report = embedder.encode_with_report(["word " * 100, "a"])
    assert report.token_counts.tolist() == [30, short.tokens]
    assert report.tokens_cut.tolist() == [long.tokens_cut, 0]
    with pytest.raises(InputError, match=r"text 0 takes \d\d\d tokens with its template; the limit is 30"):
        embedder.prompts(["word " * 100], truncate=False)
    rerouted = embedder.replace(layers=(1,), max_tokens=None)  # its examples are computed with every text, and count
    assert rerouted.encode_with_report(["a"]).token_counts.tolist() == [len(short.ids)]


def test_the_models_own_limit_holds_for_all_of_a_prompt(tokenizer, caplog):
    config = EmbedConfig(document=EXAMPLES, query=EXAMPLES, pooling="last")
    embedder = Embedder(tiny(max_position_embeddings=200), tokenizer, config)
    (prompt,) = embedder.prompts(["word " * 400])[0]
    assert 190 < len(prompt.ids) <= 200
    assert prompt.tokens_cut
    assert embedder.max_tokens == 200 - prompt.prefix_tokens  # what messages and servers name
    embedder.encode(["word " * 400])
    assert f"1 of 1 texts were cut to {embedder.max_tokens} tokens" in caplog.text
    with pytest.raises(InputError, match="the template alone takes more than the 40 tokens"):
        Embedder(tiny(max_position_embeddings=40), tokenizer, config).encode(["a"])


WHERE = (torch.device("cpu"), torch.float32)


def grouped(prompts):
    return PrefixCache(lambda ids: pytest.fail("computed"), lambda ids: pytest.fail("embedded")).groups(prompts, WHERE)


def prompts_of(model, tokenizer, config):
    embedder = Embedder(model, tokenizer, config.replace(transform="none", more_readouts=()))
    return [prompt for rendered in embedder.prompts(NOTICES) for prompt in rendered]


def test_presets_with_a_long_beginning_share_it(llama, tokenizer):
    some = {"knowledge": 1, "meta-eol": 8, "auto": 1, "prompt-eol": 0, "echo": 0, "kv": 0, "mean": 0, "static": 0}
    for method, count in some.items():
        config = preset(method, **({"layers": (1,)} if method == "kv" else {}))
        prompts = prompts_of(llama, tokenizer, config)
        assert sum(bool(ids) for ids, _ in grouped(prompts)) == count, method


def test_a_copy_of_the_text_is_no_beginning(llama, tokenizer):
    """Of a text that is there twice, or comes again, echo's first copy is the same; it must not be kept."""
    embedder = Embedder.from_model(llama, tokenizer, method="echo")
    embedder.encode([NOTICES[0], NOTICES[0], NOTICES[1]])
    embedder.encode(NOTICES[:2])
    assert embedder._reader.prefixes._kept == {}


def test_a_short_beginning_or_a_long_rest_is_not_worth_it(tokenizer):
    prompter = Prompter(tokenizer)
    prompts = prompter(NOTICES, EXAMPLES, 512, prefix_tokens=40)
    (_, alone), (_, some) = grouped(prompts)
    assert len(some) > 40
    assert grouped(prompter(NOTICES, "a: {text}", 512, prefix_tokens=3)) == [((), list(range(len(NOTICES))))]
    assert grouped([]) == [((), [])]
    long = prompter(["long " * 1000], EXAMPLES, 4096, prefix_tokens=40)  # little would be saved of it
    assert grouped([*prompts, *long]) == [((), [*alone, len(prompts)]), *grouped(prompts)[1:]]


def test_a_single_text_is_computed_whole_the_first_time_and_others_after_it_are_not(llama, tokenizer):
    embedder = Embedder(llama, tokenizer, EmbedConfig(document=EXAMPLES, query=EXAMPLES, pooling="last"))
    (whole,) = embedder.prompts([NOTICES[0]])[0]
    sizes = []
    hook = llama.model.layers[0].mlp.register_forward_hook(
        lambda _, args, output: sizes.append(len(output.flatten(0, 1)))
    )
    try:
        first = embedder.encode(NOTICES[:1])
        assert sizes == [len(whole.ids)]
        assert embedder.backbone.can_share
        sizes.clear()
        second, third = embedder.encode(NOTICES[:1]), embedder.encode(NOTICES[:1])
    finally:
        hook.remove()
    begun = len(shared_prefix(whole))
    own = len(whole.ids) - begun
    assert sizes == [begun, own + 1, own + 1]  # the beginning once, and a probe with each batch
    for again in (second, third):
        np.testing.assert_allclose(again, first, atol=1e-5)


@pytest.mark.parametrize(("dtype", "change"), [(torch.float32, 0.03), (torch.bfloat16, 0.4)])
def test_values_that_have_changed_are_noticed_though_the_probe_attends_to_old_ones(tokenizer, dtype, change):
    """As an adapter of the values' projection changes them, which read-outs of a probe hardly show."""
    torch.manual_seed(0)
    model = tiny(num_hidden_layers=6).to(dtype)
    embedder = Embedder(model, tokenizer, EmbedConfig(document=EXAMPLES, query=EXAMPLES, pooling="last"))
    embedder.encode([*NOTICES, *NOTICES])
    kept = embedder._reader.prefixes._kept
    before = [*kept.values()]
    embedder.encode(NOTICES[:5])
    embedder.encode([" ".join(NOTICES[:4]), *NOTICES])
    assert all(map(operator.is_, kept.values(), before))  # another batch is no change
    with torch.no_grad():
        for layer in model.model.layers[:2]:
            weight = layer.self_attn.v_proj.weight
            weight += change * torch.randn_like(weight) * weight.std()
    found = embedder.encode(NOTICES)
    assert not any(map(operator.is_, kept.values(), before))
    fresh = Embedder(model, tokenizer, embedder.config).encode(NOTICES)
    assert (found * fresh).sum(1).min() > (1 - 1e-6 if dtype == torch.float32 else 0.99)


@pytest.mark.parametrize("layer", [0, 1])
def test_a_beginning_is_computed_again_when_the_model_has_changed(tokenizer, layer):
    """By any hand: a merged adapter writes weights where nothing counts it, a hook changes no weight at all."""
    model = tiny()
    embedder = Embedder(model, tokenizer, EmbedConfig(document=EXAMPLES, query=EXAMPLES, pooling="last"))
    for change in ("weights", "hook"):
        before = embedder.encode(NOTICES)
        mlp = model.model.layers[layer].mlp
        if change == "weights":
            mlp.down_proj.weight.data += 0.05 * torch.randn_like(mlp.down_proj.weight)
        else:
            mlp.register_forward_hook(lambda module, args, output: output * 1.1)
        after = embedder.encode(NOTICES)
        assert np.abs(after - before).max() > 1e-3
        fresh = Embedder(model, tokenizer, embedder.config).encode(NOTICES)
        np.testing.assert_allclose(after, fresh, atol=1e-5)


def test_a_beginning_is_computed_again_in_another_dtype(tokenizer):
    model = tiny()
    embedder = Embedder(model, tokenizer, EmbedConfig(document=EXAMPLES, query=EXAMPLES, pooling="last"))
    before = embedder.encode(NOTICES)
    model.to(torch.float64)
    assert np.abs(embedder.encode(NOTICES) - before).max() < 1e-5
    model.to(torch.float32)
    np.testing.assert_allclose(embedder.encode(NOTICES), before, atol=1e-5)


def test_a_changed_embedding_of_the_beginning_is_noticed(tokenizer):
    model = tiny()
    embedder = Embedder(model, tokenizer, EmbedConfig(document=EXAMPLES, query=EXAMPLES, pooling="last"))
    before = embedder.encode(NOTICES[:8])
    token = embedder.prompts(NOTICES[:1])[0][0].ids[3]  # the probe is another
    with torch.no_grad():
        model.model.embed_tokens.weight[token].mul_(-1)
    fresh = Embedder(model, tokenizer, embedder.config).encode(NOTICES[:8])
    np.testing.assert_allclose(embedder.encode(NOTICES[:8]), fresh, atol=1e-5)
    assert np.abs(fresh - before).max() > 0.1


def test_few_beginnings_are_kept(llama, tokenizer):
    backbone = Backbone(llama)
    computed = []
    beginnings = PrefixCache(lambda ids: computed.append(ids) or backbone.prefix(ids), backbone.embedded)
    prompts = Prompter(tokenizer)(NOTICES[:2], EXAMPLES, 512)

    def forward(some, prefix):
        assert len(some) == len(prompts) + 1
        return torch.ones(len(some), 1, 4)

    every = [(number, *range(20)) for number in range(20)]
    for ids in [*every, *every[-5:], *every[:2]]:
        assert beginnings.run(ids, WHERE, prompts, forward).shape == (2, 1, 4)
    assert computed == [*every, *every[:2]]


@pytest.mark.parametrize(
    "changes",
    [
        {"pooling": "mean"},
        {"pooling": "hybrid"},
        {"pooling": "weighted-mean", "mean_tokens": "content"},  # weights go by the place in the whole prompt
        {"layers": (1,)},
        {"transform": "whiten", "more_readouts": [Readout(pooling="mean")]},
    ],
)
def test_not_where_the_beginning_is_read_or_changed(changes):
    config = EmbedConfig(document=EXAMPLES, query=EXAMPLES, pooling="last")
    assert can_share_prefix(EXAMPLES, config)
    assert not can_share_prefix(EXAMPLES, config.replace(**changes))


@given(
    kinds=st.lists(
        st.tuples(st.sampled_from([0, 3, 16, 40]), st.integers(0, 2), st.integers(0, 4), st.integers(1, 20)), max_size=8
    ),
)
def test_every_prompt_is_in_one_group(kinds):
    """Beginnings by length and by which of three they are; texts of some tokens, or of none; so many of each."""
    prompts = []
    for length, which, own, times in kinds:
        ids = (*(which + 10 * place for place in range(length)), *[7] * own, 5)
        prompts += [Prompt("", ids, ((0, 0),) * len(ids), (length, length + own), prefix_tokens=length)] * times
    found = grouped(prompts)
    assert sorted(index for _, some in found for index in some) == list(range(len(prompts)))
    for ids, some in found[1:]:
        assert len(ids) >= 16
        assert len(some) > 1
        for index in some:
            rest = without(prompts[index], len(ids))
            assert ids + rest.ids == prompts[index].ids
            assert rest.content_ids == prompts[index].content_ids
