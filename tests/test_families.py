"""Which model families work, and which are refused: a few here at once, all 189 of transformers in the slow test."""

from __future__ import annotations

import collections
import importlib.util
import pathlib

import pytest
import torch
import transformers
from families import build, verify

from kvembed.errors import UnsupportedModel
from kvembed.reroute import Reroute

TOOL = pathlib.Path(__file__).parent.parent / "tools" / "families.py"


@pytest.fixture(autouse=True)
def quiet():
    threads, verbosity = torch.get_num_threads(), transformers.logging.get_verbosity()
    torch.set_num_threads(1)  # the tensors are tiny
    transformers.logging.set_verbosity_error()  # shrunk configurations have special tokens outside the vocabulary
    yield
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity(verbosity)


@pytest.mark.parametrize(
    "family",
    [
        "llama",
        "mistral",  # sliding window everywhere
        "qwen2",
        "qwen3",
        "gemma2",  # soft cap
        "gemma3_text",  # sliding window in some layers
        "phi3",  # queries, keys and values in one matrix
        "gpt2",  # learned positions
        "gpt_neox",
        "olmo2",
        "deepseek_v3",  # latent attention: Dk is not Dv
        "gpt_oss",  # sinks
        "inkling_text",  # position bias
        "doge",  # an additive mask per head
        "qwen3_next",  # attention in some layers only
        "jamba",
        "zamba",  # one attention, shared by layers
        "longcat_flash",  # two attentions in a layer
        "afmoe",  # hands its mask over by name
    ],
)
def test_works(family):
    verify(build(family))


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        *[(family, "attention interface") for family in ("bloom", "falcon", "gptj", "mpt")],
        *[(family, "no attention") for family in ("mamba", "rwkv")],
        *[(family, "takes indices") for family in ("glm_moe_dsa", "deepseek_v32")],
        ("deepseek_v4", "keys for 16 tokens"),
        ("bert", "not causal"),
    ],
)
def test_refused(family, reason):
    model = build(family)
    with pytest.raises(UnsupportedModel, match=rf"^{family} .*{reason}"):
        verify(model)


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])  # the closed form; the model's own eager function
def test_a_wrong_slot_is_noticed(family, monkeypatch):
    slot = Reroute.slot
    monkeypatch.setattr(Reroute, "slot", lambda *args: slot(*args[:-1], (args[-1] - 1).clamp(min=0)))
    with pytest.raises(AssertionError, match="not as defined"):
        verify(build(family))


@pytest.mark.slow
def test_every_family():
    spec = importlib.util.spec_from_file_location("families_tool", TOOL)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    rows = tool.census()
    assert [row for row in rows if row.result == "wrong"] == []
    count = collections.Counter(row.result for row in rows if row.family not in tool.ENCODERS)
    assert count["works"] >= 113
    assert tool.TABLE.read_text(encoding="utf-8") == tool.render(rows), "run `python tools/families.py`"
