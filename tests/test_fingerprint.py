"""Whatever changes a model's vectors or a text's ids changes the fingerprint; dtypes and long texts don't."""

from __future__ import annotations

import copy
import types
from typing import ClassVar

import pytest
import torch
from conftest import tiny
from tokenizers import normalizers

from kvembed import Embedder, InputError
from kvembed.backbone import Backbone
from kvembed.fingerprint import fingerprint, staying_packed
from kvembed.prompts import Prompter


@pytest.fixture
def told(tokenizer):
    return lambda model, tokenizer=tokenizer: fingerprint(Backbone(model), Prompter(tokenizer))


def test_it_knows_weights_and_not_dtypes(llama, told):
    assert told(llama) == told(copy.deepcopy(llama).to(torch.bfloat16))
    assert told(llama) != told(copy.deepcopy(llama).to(torch.float16))
    assert told(llama) != told(tiny(seed=1))


@pytest.mark.parametrize("place", [(0, 0), (17, 3), (-1, -1)])
@pytest.mark.parametrize(
    "name", ["embed_tokens.weight", "layers.3.mlp.up_proj.weight", "layers.4.self_attn.q_proj.weight"]
)
def test_it_knows_every_value(llama, told, name, place):
    other = copy.deepcopy(llama)
    with torch.no_grad():
        other.model.get_parameter(name)[place] += 0.1
    assert told(other) != told(llama)


def test_it_knows_a_vectors_values_and_the_order_of_rows(llama, told):
    other, turned = copy.deepcopy(llama), copy.deepcopy(llama)
    with torch.no_grad():
        other.model.norm.weight[5] += 0.1
        turned.model.embed_tokens.weight.copy_(turned.model.embed_tokens.weight.flip(0))
    assert len({told(llama), told(other), told(turned)}) == 3


def test_it_knows_how_positions_rotate_but_not_that_a_long_text_came(tokenizer, llama, told):
    assert told(tiny(rope_parameters={"rope_type": "default", "rope_theta": 5000.0})) != told(llama)
    dynamic = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}
    model = tiny(rope_parameters=dynamic, max_position_embeddings=16)
    before = told(model)
    frequencies = model.model.rotary_emb.inv_freq.clone()
    with torch.inference_mode():
        model(torch.arange(60)[None])
    assert not torch.equal(model.model.rotary_emb.inv_freq, frequencies)
    assert told(model) == before


def test_it_knows_all_that_a_checkpoint_holds(llama, told):
    """Also what is no parameter: saved buffers, and the integers of a quantised model."""
    plain, other = (copy.deepcopy(llama) for _ in range(2))
    for number, model in enumerate((plain, other)):
        model.model.layers[1].mlp.register_buffer("correction", torch.full((4,), float(number)))
    assert len({told(llama), told(plain), told(other)}) == 3
    ways = []
    for number in range(2):
        model = copy.deepcopy(llama)
        model.model.layers[2].self_attn.o_proj = Packed(torch.full((48, 48), number, dtype=torch.int8))
        ways.append(told(model))
    assert len({*ways, told(llama)}) == 3


class Packed(torch.nn.Module):
    """As torch's quantised layers are: weights are in no parameter and no buffer, and saved as a tuple."""

    def __init__(self, integers):
        super().__init__()
        self.packed = (integers, None)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[prefix + "packed"] = self.packed
        destination[prefix + "dtype"] = torch.qint8

    def forward(self, states):
        return states @ self.packed[0].T.to(states)


class Adapted(torch.nn.Module):
    """As peft's layers are."""

    disable_adapters = False
    scaling: ClassVar = {"a": 1.0, "b": 1.0}

    def __init__(self, base):
        super().__init__()
        self.base_layer, self.active_adapters = base, ["a"]

    def forward(self, states):
        return self.base_layer(states)


def test_it_knows_which_adapter_is_used_and_how_much(llama, told):
    model = copy.deepcopy(llama)
    layer = model.model.layers[1].mlp
    layer.up_proj = adapted = Adapted(layer.up_proj)
    seen = [told(llama), told(model)]
    adapted.active_adapters = ["b"]
    seen.append(told(model))
    adapted.scaling = {"b": 0.5}
    seen.append(told(model))
    adapted.disable_adapters = True
    seen.append(told(model))
    assert len({*seen}) == len(seen)


def test_an_attentions_own_scaling_is_no_adapters(llama, told):
    model = copy.deepcopy(llama)
    adapted = Adapted(model.model.layers[1].mlp.up_proj)
    adapted.scaling = 0.25  # of the module in it, which peft's wrapper hands on
    model.model.layers[1].mlp.up_proj = adapted
    told(model)


def test_names_that_compiling_changes_do_not_matter(llama, told):
    model = copy.deepcopy(llama)
    model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")
    assert told(model) == told(llama)


class Packed4Bit(torch.nn.Linear):
    """As bitsandbytes on a CPU: packed at the first forward, and unpacked, where it is, by `state_dict`."""

    def pack(self):
        self.weight.quant_state = types.SimpleNamespace(packing_format_for_cpu=True)
        self.weight.data = self.weight.data + 1

    def state_dict(self, *args, **kwargs):
        if self.weight.quant_state.packing_format_for_cpu:
            self.weight.quant_state.packing_format_for_cpu = False
            self.weight.data = self.weight.data - 1
        return super().state_dict(*args, **kwargs)


def test_what_is_packed_stays_so():
    model = torch.nn.Sequential(Packed4Bit(3, 2))
    plain = model[0].weight.data.clone()
    model[0].pack()
    with staying_packed(model):
        assert torch.allclose(model.state_dict()["0.weight"], plain, atol=1e-6)
    assert torch.allclose(model[0].weight.data, plain + 1)
    assert model[0].weight.quant_state.packing_format_for_cpu


def test_it_knows_the_tokenizer(tokenizer, llama, told):
    lower, more, ended, padded = (copy.deepcopy(tokenizer) for _ in range(4))
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    more.add_tokens(["<extra>"])
    ended.eos_token = "<|im_end|>"
    padded.pad_token = "</s>"
    padded(["a", "b c d"], padding=True, truncation=True, max_length=2)
    assert len({told(llama, one) for one in (tokenizer, lower, more, ended)}) == 4
    assert told(llama, padded) == told(llama)


def test_weights_that_are_not_there_are_refused(tokenizer):
    backbone = Backbone(tiny())
    backbone.layers[3].mlp.to("meta")
    with pytest.raises(InputError, match="weights are offloaded"):
        fingerprint(backbone, Prompter(tokenizer))


def test_an_embedder_knows_itself_as_it_was(tokenizer):
    model = tiny()
    embedder = Embedder.from_model(model, tokenizer, layers=[1, 2])
    before = embedder.fingerprint()
    with torch.no_grad():
        model.model.embed_tokens.weight[9, 9] += 1
    assert embedder.fingerprint() == before != embedder.replace(bias=2.0).fingerprint()
