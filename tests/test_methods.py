"""Every preset against its definition, written out once more with transformers' own forward of one text."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import NOTICES, tiny

from kvembed import METHODS, Embedder

TEXTS = [*NOTICES[:3], "Ferry", "a b", ""]


def definition(model, tokenizer, template, text, *, placeholder_layers=(), output_layer=None, bidirectional=False):
    """(states (n, D), ids) of one text in one template, with nothing of kvembed's."""
    before, placeholder, after = template.partition("{pst}")
    parts = [part.replace("{text}", text) for part in (before, after)]
    ids = tokenizer(parts[0])["input_ids"]
    place = len(ids)
    if placeholder:
        ids = [*ids, 0, *tokenizer(parts[1], add_special_tokens=False)["input_ids"]]
    decoder = model.model
    hidden = decoder.embed_tokens(torch.tensor([ids]))
    rotation = decoder.rotary_emb(hidden, torch.arange(len(ids))[None])
    blocked = torch.zeros(len(ids), len(ids)) if bidirectional else torch.full((len(ids), len(ids)), -1e9).triu(1)
    for index, layer in enumerate(decoder.layers):
        if placeholder and index == 0:
            hidden[0, place] = torch.randn(hidden.shape[-1], generator=torch.Generator().manual_seed(0))
        if index in placeholder_layers:
            hidden[0, place] = hidden[0, -1]
        hidden = layer(hidden, attention_mask=blocked[None, None], position_embeddings=rotation)
        if index == output_layer:
            return hidden[0], ids
    return decoder.norm(hidden)[0], ids


def unit(vector):
    return (vector / vector.norm()).numpy()


@pytest.fixture
def plain(llama):
    llama.set_attn_implementation("eager")  # takes our additive masks
    yield llama
    llama.set_attn_implementation("sdpa")


def expected(method, model, tokenizer, text):
    config = METHODS[method]
    if method in ("last", "mean", "weighted-mean", "bidirectional"):
        states, _ = definition(model, tokenizer, "{text}", text, bidirectional=method == "bidirectional")
        weights = {"last": torch.eye(len(states))[-1], "weighted-mean": torch.arange(len(states)) + 1.0}
        return unit((weights.get(method, torch.ones(len(states)))[:, None] * states).sum(0))
    if method == "echo":
        states, _ = definition(model, tokenizer, config.document, text)
        rendered = config.document.replace("{text}", text)
        offsets = tokenizer(rendered, return_offsets_mapping=True)["offset_mapping"]
        own = [end > len(rendered) - len(text) for _, end in offsets]  # tokens of the second copy
        return unit(states[own if text else [True] * len(own)].mean(0))
    if method == "token-prepending":
        # Read below the top; the tiny model has 5 layers, so the preset's layers are cut to those it has.
        states, _ = definition(model, tokenizer, config.document, text, placeholder_layers=(1, 2), output_layer=3)
        return unit(states[-1])
    templates = config.templates("document")
    below = {"output_layer": 3} if method in ("pretended-cot", "knowledge") else {}  # of 5, the last but one
    return unit(torch.stack([definition(model, tokenizer, t, text, **below)[0][-1] for t in templates]).mean(0))


# kv: tests/test_embedder.py; auto: tests/test_transform.py; static: tests/test_static.py
@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("kv", "auto", "static")])
@torch.no_grad()
def test_the_definition(plain, tokenizer, method):
    options = {"prepend_layers": (1, 2)} if method == "token-prepending" else {}
    got = Embedder.from_model(plain, tokenizer, method=method, **options).encode(TEXTS)
    for text, vector in zip(TEXTS, got, strict=True):
        np.testing.assert_allclose(vector, expected(method, plain, tokenizer, text), atol=2e-5, err_msg=repr(text))


@pytest.mark.parametrize("method", METHODS)
def test_batch_mates_do_not_matter(llama, tokenizer, method):
    options = {"layers": (1, 2)} if method == "kv" else {}
    options |= {"prepend_layers": (1, 2)} if method == "token-prepending" else {}
    embedder = Embedder.from_model(llama, tokenizer, method=method, **options)
    together = embedder.encode([*TEXTS, "long " * 90])
    for text, vector in zip(TEXTS, together, strict=False):
        np.testing.assert_allclose(embedder.encode(text), vector, atol=1e-5)


@pytest.mark.parametrize("model_type", ["gemma3_text", "gemma2", "qwen3", "gpt_oss", "mistral"])
def test_bidirectional_lets_every_token_see_the_last_one(tokenizer, model_type):
    options = {"num_local_experts": 2, "num_experts_per_tok": 1} if model_type == "gpt_oss" else {}
    model = tiny(model_type, sliding_window=4, **options)
    embedder = Embedder.from_model(model, tokenizer, method="bidirectional", output_layer=0)
    assert embedder.config.layers == (0, 1, 2, 3, 4)
    config = embedder.config.replace(pooling="mean", mean_tokens="all")
    ids = torch.arange(5, 15)[None]
    changed = ids.clone()
    changed[0, -1] = 99
    states, others = (embedder.backbone.states(x, torch.tensor([10]), config) for x in (ids, changed))
    assert (states - others)[0, :-1].abs().amax(1).min() > 1e-6  # a causal one: 0; also across a window of 4
    padded = embedder.backbone.states(torch.nn.functional.pad(ids, (0, 6)), torch.tensor([10]), config)
    torch.testing.assert_close(padded[:, :10], states, atol=1e-5, rtol=1e-5)


def test_costs():
    costs = {name: config.forward_passes for name, config in METHODS.items()}
    assert costs.pop("meta-eol") == 8
    assert costs.pop("static") == 0
    assert set(costs.values()) == {1}


def test_token_counts_are_those_of_all_passes(llama, tokenizer):
    embedder = Embedder.from_model(llama, tokenizer, method="meta-eol")
    report = embedder.encode_with_report(TEXTS)
    for text, count in zip(TEXTS, report.token_counts, strict=True):
        templates = METHODS["meta-eol"].templates("document")
        whole = [tokenizer(template.replace("{text}", text))["input_ids"] for template in templates]
        shared = [tokenizer(template.partition("{text}")[0])["input_ids"] for template in templates]
        assert count == sum(map(len, whole)) - sum(map(len, shared))


def test_prompt_eol_composes_with_rerouting(llama, tokenizer):
    plain = Embedder.from_model(llama, tokenizer, method="prompt-eol").encode(TEXTS)
    routed = Embedder.from_model(llama, tokenizer, method="prompt-eol", layers=(1, 2)).encode(TEXTS)
    off = Embedder.from_model(llama, tokenizer, method="prompt-eol", layers=(1, 2), bias=-1e9).encode(TEXTS)
    assert np.abs(plain - routed).max() > 1e-2
    np.testing.assert_allclose(plain, off, atol=1e-5)
