"""EmbedConfig: validated, JSON in and out, hashed; presets are nothing else."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest

from kvembed import METHODS, EmbedConfig, InputError
from kvembed.methods import preset


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bias": float("nan")}, "bias must be a finite number"),
        ({"bias": float("inf")}, "bias must be a finite number"),
        ({"bias": "1"}, "bias must be a finite number"),
        ({"bias": True}, "bias must be a finite number"),
        ({"layers": (-1,)}, "layers must be a list of whole numbers"),
        ({"layers": "6-9"}, "layers must be a list of whole numbers"),
        ({"layers": (1.5,)}, "layers must be a list of whole numbers"),
        ({"layers": 5}, "layers must be a list of whole numbers"),
        ({"bias": 10**400}, "bias must be a finite number"),
        ({"document": "no slot"}, r"the document template must hold \{text\}, not 'no slot'"),
        ({"query": ()}, r"the query template must hold \{text\}, not \(\)"),
        ({"query": ("{text}", "none")}, r"the query template must hold \{text\}, not"),
        ({"query": 5}, r"the query template must hold \{text\}, not 5"),
        ({"document": "\ud800{text}"}, r"the document template holds a lone surrogate \(U\+D800\) at character 0"),
        ({"document": "{pst} {text}"}, r"the document template must hold \{pst\} once, before \{text\}, if there are"),
        ({"prepend_layers": (1,)}, r"the document template must hold \{pst\} once"),
        ({"prepend_layers": (0,)}, "prepend_layers must be a list of whole numbers from 1"),
        ({"attention": "causal"}, "attention must be one of reroute, bidirectional"),
        (
            {"layers": "some"},
            "layers must be a list of whole numbers from 0, or .all., or None to have",
        ),
        ({"pooling": "max"}, "pooling must be one of last, mean, weighted-mean, hybrid, static"),
        ({"mean_tokens": "some"}, "mean_tokens must be one of all, content"),
        ({"slot_position": "middle"}, "slot_position must be one of last, first"),
        ({"slot_self": 1}, "slot_self must be true or false"),
        ({"output_layer": 1.5}, "output_layer must be a whole number"),
        ({"max_tokens": 0}, "max_tokens must be a whole number from 1"),
        ({"max_tokens": 1.5}, "max_tokens must be a whole number from 1"),
        ({"transform": "whiten", "query": ("{text}", "Q {text}")}, "must have as many templates"),
    ],
)
def test_bad_values(options, message):
    with pytest.raises(InputError, match=message):
        EmbedConfig(**options)


def test_numpys_numbers_are_numbers():
    two = np.int64(2)
    config = EmbedConfig(
        max_tokens=two, chunk_tokens=two, output_layer=two, more_readouts=[{"output_layer": two}], transform="whiten"
    )
    plain = EmbedConfig(max_tokens=2, chunk_tokens=2, output_layer=2, more_readouts=[{"output_layer": 2}],
                        transform="whiten")  # fmt: skip
    assert json.dumps(config.to_dict()) == json.dumps(plain.to_dict())


def test_unknown_names():
    with pytest.raises(
        InputError, match="unknown option 'layer'; known: attention, bias, chunk_tokens, dim, document, layers"
    ):
        preset("kv", layer=3)
    with pytest.raises(InputError, match="unknown option 'x'"):
        EmbedConfig.from_dict({"x": 1})
    with pytest.raises(
        InputError, match="unknown method 'kvv'; choose from kv, last, mean, weighted-mean, bidirectional"
    ):
        preset("kvv")
    with pytest.raises(InputError, match="role must be document or query, not 'user'"):
        EmbedConfig().templates("user")


@pytest.mark.parametrize("config", [*METHODS.values(), EmbedConfig(layers=(5, 3, 3), output_layer=2, max_tokens=9)])
def test_json_round_trip_and_hash(config):
    again = EmbedConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert again.hash() == config.hash()
    assert len(config.hash()) == 16


def test_a_config_from_a_file(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text('{"document": "Notice: {text}", "pooling": "last"}')
    assert preset(str(path), bias=2) == EmbedConfig(method="mine", document="Notice: {text}", pooling="last", bias=2)
    path.write_text(json.dumps(METHODS["auto"].to_dict()))
    assert EmbedConfig.read(path) == METHODS["auto"]


@pytest.mark.parametrize(
    "content", [b"", b"[1]", b"{", b"\xff", b'{"pooling": "max"}', b'{"text": 1}', b'{"layers": 3}']
)
def test_a_file_that_is_no_config(tmp_path, content):
    (tmp_path / "mine.json").write_bytes(content)
    with pytest.raises(InputError, match=r"mine\.json is not a kvembed config: "):
        preset(str(tmp_path / "mine.json"))
    with pytest.raises(InputError, match=r"gone\.json: no such file"):
        preset(str(tmp_path / "gone.json"))


def test_the_hash_is_stable_and_tells_configs_apart():
    # A change of this number makes every stored result and index of the old version a stranger: make it on purpose.
    assert EmbedConfig().hash() == "44136fa355b3678a"
    assert EmbedConfig(bias=2.0).hash() == "25ae1458f5d31ac0"
    configs = [
        *METHODS.values(),
        EmbedConfig(),
        EmbedConfig(bias=2),
        EmbedConfig(layers=(1,)),
        EmbedConfig(layers=None),
    ]
    assert len({config.hash() for config in configs}) == len(configs)
    # The whole of every preset: a change in any of them, templates included, shows here.
    everything = "".join(f"{name} {config.hash()}\n" for name, config in METHODS.items())
    assert hashlib.sha256(everything.encode()).hexdigest()[:16] == "f80cead6560fe0e9"


def test_layers_are_a_sorted_set():
    assert EmbedConfig(layers=(4, 2, 4)).layers == (2, 4)
    assert preset("kv", layers=range(3)).layers == (0, 1, 2)
    assert EmbedConfig(layers=map(int, "31")).layers == (1, 3)  # an iterator can be read only once
    assert EmbedConfig(layers=np.arange(2), bias=np.float32(2)) == EmbedConfig(layers=(0, 1), bias=2.0)


def test_the_kv_preset_is_the_paper_to_the_letter():
    assert METHODS["kv"] == EmbedConfig(
        method="kv",
        document="Context: {text}\nCompress the Context in one word:",
        query="Query: {text}\nCompress the Query in one word:",
        layers=None,
        bias=1.0,
        slot_position="last",
        slot_self=True,
        pooling="hybrid",
        mean_tokens="all",
        output_layer=None,
    )


def test_only_these_presets_change_attention():
    assert {name for name, config in METHODS.items() if config.layers != ()} == {"kv", "bidirectional"}
