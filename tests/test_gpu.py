"""On a real NVIDIA GPU: what it gives is what a CPU gives in float32. Run by `make test-gpu`; elsewhere nothing is."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from conftest import MANY, NOTICES
from families import build
from test_flash import CONFIGS

from kvembed import METHODS, EmbedConfig, Embedder, flash
from kvembed.backbone import Backbone
from kvembed.workers import Recipe, encode_on

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]

GPU = torch.device("cuda")
# The least mean cosine of tokens' states; of tiny random models, some of which choose experts by a hair.
NEAR = {torch.bfloat16: 0.997, torch.float16: 0.9997, torch.float32: 0.99999}
HALVES = [torch.bfloat16, torch.float16]
LENGTHS = (3, 21, 1, 9, 21, 2, 64)


@pytest.fixture(scope="module")
def embedder(llama, tokenizer):
    return Embedder.from_model(llama, tokenizer, layers=[1, 2])


def cosine(found, expected):
    """The mean over all tokens of (B,n,D), padding left out."""
    pairs = [(a[:n].float().cpu(), b[:n].float().cpu()) for a, b, n in zip(found, expected, LENGTHS, strict=True)]
    return torch.cat([torch.nn.functional.cosine_similarity(a, b, dim=-1) for a, b in pairs]).mean()


def both(family, dtype):
    """A tiny model whose weights `dtype` can hold, on the CPU in float32 and on the GPU."""
    reference = build(family).to(dtype).float()
    return Backbone(reference), Backbone(copy.deepcopy(reference).to(GPU, dtype))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_kernel_is_used_here(dtype):
    assert flash.serves(GPU, dtype) == (torch.cuda.get_device_capability() >= (8, 0))
    assert not flash.serves(GPU, torch.float32)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "gpt2", "olmoe", "gpt_oss"])
def test_states_are_those_of_a_cpu(family, config, dtype):
    if family in ("gpt2", "gpt_oss") and config.slot_position == "first":
        pytest.skip("it rotates no keys, or not plainly")
    ours, its = both(family, dtype)
    torch.manual_seed(1)
    texts = [torch.randint(3, 99, (n,)).tolist() for n in LENGTHS]
    expected, found = (one.states(*one.pad(texts), config) for one in (ours, its))
    assert cosine(found, expected) >= NEAR[dtype]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_after_a_common_beginning_too(family, dtype):
    ours, its = both(family, dtype)
    torch.manual_seed(1)
    beginning = torch.randint(3, 99, (20,)).tolist()
    texts = [torch.randint(3, 99, (n,)).tolist() for n in LENGTHS]
    expected, found = (one.states(*one.pad(texts), EmbedConfig(), prefix=one.prefix(beginning)) for one in (ours, its))
    assert cosine(found, expected) >= NEAR[dtype]


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_padded_texts_and_packed_ones_come_out_alike(family):
    backbone = both(family, torch.float16)[1]
    config = EmbedConfig(layers=(1, 3))
    ids, lengths = backbone.pad([torch.randint(3, 99, (n,)).tolist() for n in LENGTHS])
    packed = backbone.states(ids, lengths, config)
    vars(backbone)["can_pack"] = False
    assert cosine(backbone.states(ids, lengths, config), packed) >= NEAR[torch.float16]


@pytest.mark.parametrize("method", METHODS)
def test_every_method(method, llama, tokenizer):
    options = {"prepend_layers": (1,)} if method == "token-prepending" else {}
    there = copy.deepcopy(llama).to(GPU)
    ours, its = (Embedder.from_model(m, tokenizer, method=method, texts=MANY, **options) for m in (llama, there))
    assert (ours.encode(NOTICES) * its.encode(NOTICES)).sum(1).min() >= 0.999


def test_in_half_precision_compiled_too(llama, tokenizer):
    there = copy.deepcopy(llama).to(GPU, torch.float16)
    ours, its = (Embedder.from_model(m, tokenizer, layers=[1, 2]) for m in (llama, there))
    expected = ours.encode(NOTICES)
    assert (expected * its.encode(NOTICES)).sum(1).min() >= 0.999
    its.backbone.compile()
    assert (expected * its.encode(NOTICES)).sum(1).min() >= 0.999


def test_memory_that_runs_out_is_met_with_smaller_batches(llama, tokenizer, caplog):
    there = copy.deepcopy(llama).to(GPU, torch.bfloat16)
    embedder = Embedder.from_model(there, tokenizer, layers=[1, 2], batch_tokens=1 << 22)
    texts = [" ".join(NOTICES)] * 400
    expected = embedder.encode(texts[:2])
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (64 << 20)) / total)
    try:
        found = embedder.encode(texts)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "out of memory" in caplog.text
    assert (found * expected[0]).sum(1).min() >= 0.999


def test_a_process_on_each_device(folder):
    recipe = Recipe.of(Embedder.from_pretrained(folder, dtype="float32", device="cuda"), str(folder))
    expected = Embedder.from_pretrained(folder, dtype="float32", device="cpu").encode(NOTICES)
    pieces = list(encode_on([f"cuda:{number}" for number in range(torch.cuda.device_count())], recipe, NOTICES))
    np.testing.assert_allclose(np.concatenate([piece.vectors for piece in pieces]), expected, atol=1e-4)


@pytest.mark.real
@pytest.mark.parametrize("method", ["kv", "auto"])
def test_smollm2(method):
    here = Embedder.from_pretrained("smollm2", method=method, dtype="float32", device="cpu")
    there = Embedder.from_pretrained("smollm2", method=method)
    assert there.dtype == "bfloat16"
    assert (here.encode(NOTICES) * there.encode(NOTICES)).sum(1).min() >= 0.999
