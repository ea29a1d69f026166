"""The public class: shapes, invariances, reports, explanations, saving, bad input."""

from __future__ import annotations

import copy
import json
import logging
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import MANY, NOTICES, tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from kvembed import EmbedConfig, Embedder, InputError, KvembedError, UnsupportedModel
from kvembed.files import default_file_mode
from kvembed.longrope import alone
from kvembed.quantize import unit
from kvembed.self_written import write_texts


@pytest.fixture(scope="module")
def embedder(llama, tokenizer):
    return Embedder.from_model(llama, tokenizer, method="kv", layers=[1, 2], max_tokens=400)


def test_shapes_and_types(embedder):
    vectors = embedder.encode(NOTICES[:5])
    assert (vectors.shape, vectors.dtype) == ((5, embedder.dim), np.float32)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(embedder.encode(NOTICES[1]), vectors[1], atol=1e-6)
    assert embedder.encode([]).shape == (0, embedder.dim)
    assert embedder.encode(text for text in NOTICES[:2]).shape == (2, embedder.dim)


def test_roles_use_their_templates(embedder):
    texts = NOTICES[:3]
    assert np.array_equal(embedder.encode_query(texts), embedder.encode(texts, role="query"))
    assert np.array_equal(embedder.encode_document(texts), embedder.encode(texts))
    assert not np.allclose(embedder.encode_query(texts), embedder.encode_document(texts), atol=1e-3)
    with pytest.raises(InputError, match="role must be document or query"):
        embedder.encode(texts, role="passage")


@settings(max_examples=25)
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=60), min_size=1, max_size=8),
    budget=st.integers(1, 400),
    order=st.randoms(use_true_random=False),
    method=st.sampled_from(["kv", "prompt-eol", "weighted-mean", "mean", "last"]),
)
def test_a_vector_depends_on_its_text_alone(llama, tokenizer, texts, budget, order, method):
    """Batch mates, batch size and order do not matter, for any text at all."""
    layers = {"layers": [1, 3]} if method == "kv" else {}
    one_by_one = Embedder.from_model(llama, tokenizer, method=method, batch_tokens=1, **layers)
    together = Embedder.from_model(llama, tokenizer, method=method, batch_tokens=budget, **layers)
    shuffled = list(range(len(texts)))
    order.shuffle(shuffled)
    expected = one_by_one.encode(texts)
    got = together.encode([texts[i] for i in shuffled])
    np.testing.assert_allclose(got, expected[shuffled], atol=1e-5)
    assert np.isfinite(got).all()


def test_a_long_batch_mate_and_the_tokenizers_padding_side_do_not_matter(llama, tokenizer):
    embedder = Embedder.from_model(llama, tokenizer, layers=[1, 2], batch_tokens=100_000)
    texts = ["a", NOTICES[0], " ".join(NOTICES)[:900]]
    together = embedder.encode(texts)
    for side in ("left", "right"):
        tokenizer.padding_side = side
        np.testing.assert_allclose(embedder.encode(texts), together, atol=1e-6)
    np.testing.assert_allclose(np.stack([embedder.encode(text) for text in texts]), together, atol=1e-5)


def test_bad_texts(embedder):
    with pytest.raises(InputError, match="text 1 is a NoneType, not a string"):
        embedder.encode(["a", None])
    for function in (embedder.encode_with_report, embedder.encode_views, embedder.prompts):
        with pytest.raises(InputError, match="not one str"):
            function("ab")
    with pytest.raises(InputError, match="not one str"):
        next(embedder.encode_stream("ab"))
    with pytest.raises(InputError, match="text 0 is a bytes"):
        embedder.encode([b"a"])
    table = types.SimpleNamespace(columns=["text"], __iter__=None)
    for what, name in [
        (None, "NoneType"),
        (5, "int"),
        (np.array("hi"), "ndarray"),
        ({"a": 1}, "dict"),
        (table, "Simple"),
    ]:
        for function in (
            embedder.encode,
            embedder.encode_views,
            embedder.prompts,
            lambda x: next(embedder.encode_stream(x)),
        ):
            with pytest.raises(InputError, match=f"must be strings in a list, not a {name}"):
                function(what)
    with pytest.raises(InputError, match="lone surrogate"):
        embedder.encode("\udc00")


@pytest.mark.parametrize(
    "text", ["", "\0", "🙂", "a\0b", "\u202e", "x" * 30_000, "\n" * 50, "<|im_end|></s><s>", "\ufeff"]
)
@pytest.mark.parametrize("method", ["kv", "last", "mean", "weighted-mean", "prompt-eol"])
def test_odd_texts_give_a_vector(llama, tokenizer, bare_tokenizer, text, method):
    layers = {"layers": [2]} if method == "kv" else {}
    for each in (tokenizer, bare_tokenizer):
        vector = Embedder.from_model(llama, each, method=method, **layers).encode(text)
        assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)


def test_cut_texts_are_counted_and_said(embedder, caplog):
    long = " ".join(NOTICES)
    with caplog.at_level(logging.WARNING, "kvembed"):
        encoded = embedder.encode_with_report(["short", long, long[:2000]])
    assert encoded.token_counts[0] < 400
    assert encoded.token_counts.max() == 400
    assert encoded.tokens_cut[0] == 0
    assert encoded.tokens_cut[1] > encoded.tokens_cut[2] > 0
    assert encoded.truncated == 2
    assert caplog.messages == ["2 of 3 texts were cut to 400 tokens"]
    assert encoded.token_counts[0] == len(embedder.explain("short").tokens)


def test_the_models_own_limit_is_the_default(llama, tokenizer):
    embedder = Embedder.from_model(llama, tokenizer, method="mean")
    assert embedder.max_tokens == 1024
    assert embedder.encode_with_report(["word " * 2000]).token_counts.tolist() == [1024]
    with pytest.raises(InputError, match="max_tokens is 1025, but the model takes at most 1024"):
        Embedder.from_model(llama, tokenizer, method="mean", max_tokens=1025)


@pytest.mark.parametrize(
    "template", ["{text}", "Context: {text}\nIn one word:", "A much longer template. " * 4 + "{text}:"]
)
def test_a_long_text_is_the_mean_of_its_chunks(llama, tokenizer, template):
    config = EmbedConfig(document=template, pooling="last", chunk_tokens=30)
    embedder = Embedder(llama, tokenizer, config)
    whole = Embedder(llama, tokenizer, config.replace(chunk_tokens=None))
    long = " ".join(NOTICES[:4])
    (prompt,) = embedder.prompts([long])[0]
    start, end = template.split("{text}")
    parts = [chunk.text[len(start) : len(chunk.text) - len(end)] for chunk in prompt.chunks]
    assert len(parts) > 2
    assert " ".join(parts) == long
    read = embedder.encode_views([NOTICES[0][:20], long, NOTICES[1][:20]])
    expected = whole.encode_views([NOTICES[0][:20], *parts, NOTICES[1][:20]]).vectors
    np.testing.assert_allclose(read.vectors[1], expected[1:-1].mean(0), atol=1e-5)
    np.testing.assert_allclose(read.vectors[::2], expected[[0, -1]], atol=1e-5)
    assert (
        read.token_counts.tolist()
        == whole.encode_with_report([NOTICES[0][:20], long, NOTICES[1][:20]]).token_counts.tolist()
    )
    assert embedder.explain(long).chunks == len(parts)
    assert embedder.explain("short").chunks == 1


def test_static_vectors_are_of_the_whole_text(llama, tokenizer):
    config = EmbedConfig(pooling="last", more_readouts=[{"pooling": "static"}], transform="whiten", chunk_tokens=20)
    texts = [" ".join(NOTICES[:3]), "short", NOTICES[1]]
    views = Embedder(llama, tokenizer, config, texts=MANY).encode_views(texts).vectors
    static = Embedder(llama, tokenizer, EmbedConfig(pooling="static")).encode_views(texts).vectors
    np.testing.assert_allclose(views[:, 1], static[:, 0], atol=1e-4)
    last = Embedder(llama, tokenizer, EmbedConfig(pooling="last", chunk_tokens=20)).encode_views(texts).vectors
    np.testing.assert_allclose(views[:, 0], last[:, 0], atol=1e-5)


def test_read_outs_at_the_top_and_below_it_in_any_order(llama, tokenizer):
    inside, top = {"pooling": "mean", "output_layer": 0}, {"pooling": "last"}
    first = EmbedConfig(**inside, more_readouts=[top], transform="whiten")
    last = EmbedConfig(**top, more_readouts=[inside], transform="whiten")
    views = [Embedder(llama, tokenizer, one, texts=MANY).encode_views(NOTICES).vectors for one in (first, last)]
    np.testing.assert_allclose(views[0], views[1][:, ::-1], atol=1e-6)


def test_static_vectors_follow_the_model(tokenizer):
    """As when an adapter is merged into its embeddings."""
    model = tiny()
    embedder = Embedder(model, tokenizer, EmbedConfig(pooling="static"))
    before = embedder.encode(NOTICES)
    kept = embedder.backbone.static
    assert embedder.backbone.static is kept
    model.get_input_embeddings().weight.data += 0.1 * torch.randn_like(model.get_input_embeddings().weight)
    after = embedder.encode(NOTICES)
    assert np.abs(after - before).max() > 1e-3
    np.testing.assert_allclose(after, Embedder(model, tokenizer, embedder.config).encode(NOTICES), atol=1e-6)
    other = copy.deepcopy(model.get_input_embeddings())  # another table, the same in all that is looked at of it
    looked_at = slice(None, None, other.weight.numel() // 64 | 1)
    kept = other.weight.data.flatten()[looked_at].clone()
    other.weight.data[100:200] = 0.5
    other.weight.data.view(-1)[looked_at] = kept
    model.set_input_embeddings(other)
    fresh = Embedder(model, tokenizer, embedder.config).encode(NOTICES)
    assert np.abs(fresh - after).max() > 1e-3
    np.testing.assert_allclose(embedder.encode(NOTICES), fresh, atol=1e-6)


def test_where_no_layer_is_run_the_models_limit_is_none(tokenizer):
    model = tiny(max_position_embeddings=64)
    text = " ".join(NOTICES)
    read = Embedder(model, tokenizer, EmbedConfig(pooling="static")).encode_with_report([text])
    assert read.tokens_cut[0] == 0
    assert read.token_counts[0] > 1000
    assert Embedder(model, tokenizer, EmbedConfig(pooling="static", max_tokens=500)).max_tokens == 500


def test_with_chunks_a_text_may_be_longer_than_the_model_takes(tokenizer):
    model = tiny(max_position_embeddings=64)
    config = EmbedConfig(document="In one word: {text}", chunk_tokens=40)
    text = " ".join(NOTICES[:6])
    read = Embedder(model, tokenizer, config.replace(max_tokens=5000)).encode_with_report([text])
    whole = Embedder(model, tokenizer, config).encode_with_report([text])
    assert (read.tokens_cut[0], int(whole.tokens_cut[0] > 0)) == (0, 1)
    assert read.token_counts[0] > whole.token_counts[0] == 64  # the model's own limit is still the default
    assert read.vectors[0] @ whole.vectors[0] < 0.999
    longer = config.replace(max_tokens=5000, chunk_tokens=1000)  # more than the model takes at once
    (prompt,) = Embedder(model, tokenizer, longer).prompts([text])[0]
    assert 40 < max(len(chunk.ids) for chunk in prompt.chunks) <= 64


def test_chunks_of_several_templates_and_read_outs_find_their_text(llama, tokenizer):
    """Texts are cut into different numbers of chunks under each template of a batch, and come out in order."""
    config = EmbedConfig(document=("{text}", "{text} and again {text}"), chunk_tokens=25, pooling="mean")
    texts = [" ".join(NOTICES[:count]) for count in (3, 0, 1, 4, 2)]
    together = Embedder(llama, tokenizer, config)
    apart = Embedder(llama, tokenizer, config, batch_tokens=1)
    np.testing.assert_allclose(
        together.encode(texts), np.concatenate([apart.encode([text]) for text in texts]), atol=1e-5
    )


def test_explain(embedder):
    text = "Bees swarm <|im_end|> in May"
    explanation = embedder.explain(text)
    assert explanation.prompt == f"Context: {text}\nCompress the Context in one word:"
    first, end = explanation.span
    assert "".join(explanation.tokens[first:end]).strip() == text
    assert explanation.tokens[0] == "<s>"
    assert "".join(explanation.tokens[1:]) == explanation.prompt
    assert list(explanation.beta) == [1, 2]
    assert all(len(values) == len(explanation.tokens) for values in explanation.beta.values())
    assert all(0 < value < 1 for values in explanation.beta.values() for value in values)
    assert json.loads(json.dumps(explanation.to_dict()))["config"] == embedder.config.to_dict()


def test_a_character_of_several_tokens_is_shown_once(embedder):
    explanation = embedder.explain("漢字 über 🙂b")
    assert "".join(explanation.tokens[1:]) == explanation.prompt
    assert "" in explanation.tokens


def test_a_dtype_may_be_torchs(folder):
    assert Embedder.from_pretrained(folder, dtype=torch.bfloat16).dtype == "bfloat16"
    with pytest.raises(InputError, match="unknown dtype 'int8'"):
        Embedder.from_pretrained(folder, dtype=torch.int8)


def test_repr_says_what_it_is(embedder):
    assert repr(embedder) == f"Embedder(llama, method='kv', config={embedder.config.hash()}, dim=48, dtype=float32)"


def test_texts_are_reported_as_they_are_done(embedder):
    done = []
    embedder.replace(max_tokens=60).encode_prompts(embedder.prompts(NOTICES), report=done.append)
    assert sum(done) == len(NOTICES)
    few = Embedder.from_model(embedder.model, embedder.tokenizer, method="meta-eol", layers=(), batch_tokens=200)
    done.clear()
    few.encode_prompts(few.prompts(NOTICES[:3]), report=done.append)
    assert len(done) > 1
    assert sum(done) == 3


def test_save_then_load_gives_the_same_vectors(embedder, tmp_path):
    folder = tmp_path / "a" / "saved"
    embedder.save_pretrained(folder)
    again = Embedder.from_pretrained(folder, dtype="float32")
    assert again.config == embedder.config
    assert np.array_equal(again.encode(NOTICES[:9]), embedder.encode(NOTICES[:9]))
    assert np.array_equal(again.encode_query(NOTICES[:9]), embedder.encode_query(NOTICES[:9]))
    assert Embedder.from_pretrained(folder, bias=2.0).config == embedder.config.replace(bias=2.0)
    assert Embedder.from_pretrained(folder, method="mean").config.method == "mean"
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {default_file_mode()}
    embedder.save_pretrained(folder)  # over itself
    assert not [path for path in folder.parent.iterdir() if path != folder]
    (folder / "kvembed.json").write_text('{"bias": "high"}')
    with pytest.raises(InputError, match="bias must be a finite number"):
        Embedder.from_pretrained(folder)
    with pytest.raises(InputError, match="is a file"):
        embedder.save_pretrained(folder / "config.json")
    with pytest.raises(InputError, match="name is empty"):
        embedder.save_pretrained("")


def test_what_another_model_left_in_the_folder_is_not_opened_with_it(embedder, tmp_path):
    """An adapter would be put on top of the weights, and another tokenizer's tokens into this one."""
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "target_modules": ["v_proj"], "r": 2}')
    (tmp_path / "adapter_model.safetensors").write_bytes(b"of another")
    (tmp_path / "added_tokens.json").write_text('{"the": 401, " ferry": 402}')
    (tmp_path / "README.md").write_text("kept")
    embedder.save_pretrained(tmp_path)
    assert not [*tmp_path.glob("ada*"), *tmp_path.glob("added*")]
    assert (tmp_path / "README.md").read_text() == "kept"
    again = Embedder.from_pretrained(tmp_path, dtype="float32")
    assert np.array_equal(again.encode(NOTICES[:9]), embedder.encode(NOTICES[:9]))


def test_what_transformers_would_not_open_as_it_is_is_not_saved(tokenizer, tmp_path):
    """And what was saved there before stays."""
    Embedder.from_model(tiny(), tokenizer, method="mean").save_pretrained(tmp_path)
    kept = {path: path.read_bytes() for path in tmp_path.iterdir()}
    odd = tiny("qwen2")  # transformers gives this family a tokenizer of its own, whatever the folder says
    with pytest.raises(InputError, match="opens the tokenizer of a qwen2 as Qwen2Tokenizer, which makes other tokens"):
        Embedder.from_model(odd, tokenizer, method="mean").save_pretrained(tmp_path)
    adapted = tiny()
    adapted._hf_peft_config_loaded = True  # as its add_adapter() leaves it
    with pytest.raises(InputError, match="saves an attached adapter alone"):
        Embedder.from_model(adapted, tokenizer, method="mean").save_pretrained(tmp_path)
    injected = tiny()
    injected.model.layers[1].disable_adapters = False  # as a layer of peft's has it
    with pytest.raises(InputError, match="has an adapter in it"):
        Embedder.from_model(injected, tokenizer, method="mean").save_pretrained(tmp_path)
    compiled = tiny()
    compiled.model.layers[1] = torch.compile(compiled.model.layers[1], backend="eager")
    with pytest.raises(InputError, match="layers of the model are compiled"):
        Embedder.from_model(compiled, tokenizer, method="mean").save_pretrained(tmp_path)
    unknown = tiny()
    unknown.config = type("OtherConfig", (type(unknown.config),), {})(**unknown.config.to_dict())
    with pytest.raises(InputError, match="opens no LlamaForCausalLM as a language model by name"):
        Embedder.from_model(unknown, tokenizer, method="mean").save_pretrained(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == kept


def test_a_model_in_training_mode_is_refused(tokenizer):
    model = tiny()
    model.train()
    with pytest.raises(InputError, match=r"call model\.eval"):
        Embedder.from_model(model, tokenizer, layers=[1])
    embedder = Embedder.from_model(model.eval(), tokenizer, layers=[1])
    model.train()
    for call in (embedder.encode, embedder.explain):
        with pytest.raises(InputError, match=r"call model\.eval"):
            call("a")


def test_attentions_own_dropout_counts_too(tokenizer):
    model = tiny(attention_dropout=0.1)
    embedder = Embedder.from_model(model, tokenizer, method="mean")
    model.model.layers[2].self_attn.train()
    with pytest.raises(InputError, match="training mode"):
        embedder.encode(NOTICES[:4])


def test_threads_on_one_longrope_model(tokenizer):
    """It writes the angles of the batch that comes last into itself."""
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 6, "long_factor": [4.0] * 6, "rope_theta": 1e4}
    rope["original_max_position_embeddings"] = 40
    model = tiny("phi3", rope_parameters=rope, sliding_window=None, original_max_position_embeddings=40)
    embedders = [Embedder.from_model(model, tokenizer, method="mean") for _ in range(2)]
    texts = [["a short notice"], ["word " * 40]]
    expected = [one.encode(text) for one, text in zip(embedders, texts, strict=True)]
    switching = sys.getswitchinterval()

    def work(index):
        found = [embedders[index].encode(texts[index]) for _ in range(200)]
        return max(float(np.abs(one - expected[index]).max()) for one in found)

    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(2) as pool:
            assert max(pool.map(work, range(2))) < 1e-5
    finally:
        sys.setswitchinterval(switching)


def test_no_forward_of_a_longrope_model_overlaps_another(tokenizer, monkeypatch):
    """What probes, tries or samples writes its angles, too."""
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 6, "long_factor": [4.0] * 6, "rope_theta": 1e4}
    rope["original_max_position_embeddings"] = 40
    model = tiny("phi3", rope_parameters=rope, sliding_window=None, original_max_position_embeddings=40)
    held = []

    def note(*_):
        lock = alone(model.model)
        held.append(isinstance(lock, type(threading.Lock())) and lock.locked())

    model.model.register_forward_pre_hook(note)
    embedder = Embedder.from_model(model, tokenizer, method="kv", layers=[1], slot_position="first")
    embedder.encode(["a"])
    write_texts(model, tokenizer, count=5, batch=10)
    assert len(held) > 8
    assert all(held)
    assert not alone(model.model).locked()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"layers": [3, 4], "output_layer": 2},
            "layers 3, 4 would change nothing: only the states of layer 2 are read",
        ),
        ({"layers": [4], "output_layer": -2, "attention": "bidirectional"}, "layers 4 would change nothing"),
        (
            {"method": "token-prepending", "output_layer": 0, "prepend_layers": [1, 2]},
            "prepend_layers 1, 2 would change",
        ),
    ],
)
def test_changes_above_what_is_read_are_refused(llama, tokenizer, options, message):
    with pytest.raises(InputError, match=message):
        Embedder.from_model(llama, tokenizer, **options)


def test_what_is_explained_ends_with_what_is_read(llama, tokenizer):
    embedder = Embedder.from_model(llama, tokenizer, layers="all", output_layer=2)
    assert [*embedder.explain("a").beta] == [0, 1, 2]


def test_a_slot_that_can_not_be_turned_is_refused_at_once(tokenizer, monkeypatch):
    monkeypatch.setattr("kvembed.embedder.choose_transform", None)
    with pytest.raises(UnsupportedModel, match="not plainly rotated; slot_position=first needs that"):
        Embedder.from_model(tiny("gpt2"), tokenizer, method="auto", layers=[1], slot_position="first")


def test_dropout_that_joined_later_counts_as_training(tokenizer):
    """An adapter's, added after `eval`; other parts that came then do no harm."""
    model = tiny()
    layer = model.model.layers[1].mlp
    layer.up_proj = torch.nn.Sequential(layer.up_proj, torch.nn.Dropout(0.0))
    embedder = Embedder.from_model(model, tokenizer, method="mean")
    layer.up_proj.append(torch.nn.Dropout(0.5))
    with pytest.raises(InputError, match=r"call model\.eval"):
        embedder.encode("a")
    model.eval()
    assert np.array_equal(embedder.encode("a"), embedder.encode("a"))


def test_saving_over_another_model_leaves_none_of_its_weights(tokenizer, tmp_path, monkeypatch):
    first, second = (Embedder.from_model(tiny(seed=seed), tokenizer, method="mean") for seed in (1, 2))
    first.save_pretrained(tmp_path / "saved")
    save = second.model.save_pretrained
    monkeypatch.setattr(second.model, "save_pretrained", lambda folder: save(folder, max_shard_size="50KB"))
    second.save_pretrained(tmp_path / "saved")
    assert len([*(tmp_path / "saved").glob("model-*.safetensors")]) > 1
    opened = Embedder.from_pretrained(tmp_path / "saved", dtype="float32")
    assert np.array_equal(opened.encode(NOTICES[:3]), second.encode(NOTICES[:3]))
    monkeypatch.setattr("kvembed.saved.os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        first.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "kvembed.json").exists()  # half of it is not opened as if it were whole


def test_offloaded_weights_are_brought_where_they_are_needed(tokenizer):
    accelerate = pytest.importorskip("accelerate")
    model = tiny()
    expected = Embedder.from_model(model, tokenizer, method="mean").encode(NOTICES[:3])
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert next(model.parameters()).is_meta
    embedder = Embedder.from_model(model, tokenizer, method="mean")
    assert np.array_equal(embedder.encode(NOTICES[:3]), expected)
    with pytest.raises(InputError, match="offloaded"):
        embedder.fingerprint()


def test_what_is_no_model_and_no_tokenizer_is_said(llama, tokenizer):
    for model, other in [("smollm2", tokenizer), (tokenizer, llama), (llama, None), (llama, "smollm2")]:
        with pytest.raises(InputError, match="not one of transformers"):
            Embedder.from_model(model, other)
    for name in (None, llama):
        with pytest.raises(InputError, match="a model's name or path is needed"):
            Embedder.from_pretrained(name)
    for budget in ("12", 1.5, True, 0):
        with pytest.raises(InputError, match="batch_tokens must be a whole number from 1"):
            Embedder.from_model(llama, tokenizer, layers=[1], batch_tokens=budget)


def test_texts_of_a_fit_may_be_anything_that_gives_texts(llama, tokenizer):
    fits = [
        Embedder.from_model(llama, tokenizer, method="static", texts=texts).transform.digest()
        for texts in (MANY, (text for text in MANY), np.array(MANY), dict.fromkeys(MANY).keys())
    ]
    assert len({*fits}) == 1
    with pytest.raises(InputError, match="100 different texts or more, not 3"):
        Embedder.from_model(llama, tokenizer, method="static", texts=(text for text in MANY[:3]))


def test_its_config_is_changed_by_replace_alone(embedder):
    with pytest.raises(AttributeError):
        embedder.config = embedder.config.replace(bias=2.0)


def test_similarity_of_unlike_vectors(embedder):
    vectors = embedder.encode(NOTICES[:2])
    with pytest.raises(InputError, match="vectors of 48 and of 5 dimensions can't be compared"):
        embedder.similarity(vectors, vectors[:, :5])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("a text", "are compared, as `encode` gives them"),
        ([["a"]], "are compared"),
        ([[1.0], [1.0, 2.0]], "are compared, as"),
        (np.zeros((2, 3, 48)), r"not an array of shape \(2, 3, 48\)"),
        (np.zeros((2, 48), np.uint8), "Hamming distance"),
        (torch.zeros(2, 48, requires_grad=True), "are compared, as"),
    ],
)
def test_what_is_no_vectors_is_not_compared(embedder, given, message):
    with pytest.raises(InputError, match=message):
        embedder.similarity(given, embedder.encode(NOTICES[:2]))


def test_what_a_config_says_is_changed_by_replace_alone(embedder):
    for name in ("dim", "max_tokens", "config"):
        with pytest.raises(AttributeError):
            setattr(embedder, name, 3)


def test_a_column_of_arrow(embedder):
    pyarrow = pytest.importorskip("pyarrow")
    column = pyarrow.chunked_array([NOTICES[:2], NOTICES[2:3]])
    np.testing.assert_array_equal(embedder.encode(column), embedder.encode(NOTICES[:3]))
    np.testing.assert_array_equal(next(embedder.encode_stream(column)).vectors, embedder.encode(NOTICES[:3]))
    with pytest.raises(InputError, match="text 1 is a NoneType"):
        embedder.encode(pyarrow.array(["a", None]))


def test_a_home_is_a_home(embedder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    embedder.save_pretrained("~/saved")
    assert (tmp_path / "saved" / "kvembed.json").is_file()
    assert not (tmp_path / "~").exists()
    assert Embedder.from_pretrained("~/saved", dtype="float32").config == embedder.config


def test_states_that_are_not_finite_are_an_error_not_a_vector(tokenizer):
    model = tiny()
    with torch.no_grad():
        model.model.norm.weight[0] = float("inf")
    with pytest.raises(KvembedError, match="not finite in float32; its weights may be damaged"):
        Embedder.from_model(model, tokenizer, layers=[1]).encode("a")
    with pytest.raises(KvembedError, match="not finite in float16; try dtype=bfloat16 or float32"):
        Embedder.from_model(model.half(), tokenizer, layers=[1]).encode("a")


@pytest.mark.parametrize("method", ["mean", "static"])
def test_a_token_that_the_model_does_not_embed_is_told(llama, tokenizer, method):
    larger = copy.deepcopy(tokenizer)
    larger.add_tokens(["ferryboat"])
    embedder = Embedder.from_model(llama, larger, method=method, texts=MANY)
    assert embedder.encode("a ferry").shape == (48,)
    for call in (embedder.encode, embedder.explain):
        with pytest.raises(InputError, match="the tokenizer gives token 400, but the model embeds only 400"):
            call("a ferryboat")


def test_where_there_is_no_slot_it_has_no_position(tokenizer):
    model = tiny("gpt2", n_embd=48, n_layer=5, n_head=4)
    options = {"method": "bidirectional", "slot_position": "first"}
    vectors = Embedder.from_model(model, tokenizer, **options).encode(NOTICES[:3])
    assert np.array_equal(vectors, Embedder.from_model(model, tokenizer, method="bidirectional").encode(NOTICES[:3]))


def test_the_model_is_given_back_as_it_was(tokenizer):
    model = tiny()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = model.config.to_dict()
    ids = torch.arange(2, 30)[None]
    logits = model(ids).logits
    Embedder.from_model(model, tokenizer, layers=[0, 4]).encode(NOTICES)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.config.to_dict() == config
    assert torch.equal(model(ids).logits, logits)
    assert model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=1).shape[1] > ids.shape[1]


def test_embedders_on_one_model_in_many_threads(llama, tokenizer):
    options = [{"layers": [1]}, {"layers": [3, 4], "bias": 4.0}, {"method": "mean"}, {"method": "prompt-eol"}]
    embedders = [Embedder.from_model(llama, tokenizer, **each) for each in options]
    expected = [each.encode(NOTICES[:12]) for each in embedders]
    wrong = []

    def work(index):
        for _ in range(5):
            if not np.allclose(embedders[index].encode(NOTICES[:12]), expected[index], atol=1e-6):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(i % 4,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_similarity_is_the_cosine(embedder):
    a, b = np.random.default_rng(0).standard_normal((2, 3, 8)).astype(np.float32)
    expected = [[x @ y / np.linalg.norm(x) / np.linalg.norm(y) for y in b] for x in a]
    np.testing.assert_allclose(embedder.similarity(a, b), expected, atol=1e-6)
    assert embedder.similarity(a[0], b).shape == (1, 3)
    assert embedder.similarity(np.zeros((1, 8), np.float32), b).tolist() == [[0, 0, 0]]


def test_a_layer_to_read_that_is_not_there(llama, tokenizer):
    with pytest.raises(InputError, match="output_layer"):
        Embedder.from_model(llama, tokenizer, layers=[1], output_layer=5)


@pytest.mark.parametrize("options", [{"layers": [1, 3]}, {"method": "mean"}, {"method": "static"}])
def test_autocast_and_tuple_outputs_change_nothing(tokenizer, options):
    model = tiny()
    expected = Embedder.from_model(model, tokenizer, **options).encode(NOTICES[:4])
    model.config.return_dict = False
    embedder = Embedder.from_model(model, tokenizer, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert np.array_equal(embedder.encode(NOTICES[:4]), expected)
    assert np.array_equal(embedder.encode(NOTICES[:4]), expected)


@pytest.mark.parametrize("bias", [1e39, -1e39, 1e300])
def test_any_finite_bias_works_in_either_form(tokenizer, bias):
    model = tiny("mistral", sliding_window=8)
    vectors = Embedder.from_model(model, tokenizer, layers=[1], bias=bias).encode(["a", NOTICES[0]])
    assert np.isfinite(vectors).all()


def test_what_cannot_be_saved_or_embedded_is_refused(tokenizer, llama, tmp_path):
    class Wrapped:
        """Like a model with an adapter: not a transformers model, but it forwards to one."""

        training = False

        def __init__(self, **attributes):
            vars(self).update(attributes)

        def __getattr__(self, name):
            return getattr(llama, name)

    with pytest.raises(InputError, match="merge_and_unload"):
        Embedder.from_model(Wrapped(), tokenizer, layers=[1]).save_pretrained(tmp_path / "saved")
    prompt_tuning = type("Config", (), {"is_prompt_learning": True})
    with pytest.raises(UnsupportedModel, match="virtual tokens would be lost"):
        Embedder.from_model(Wrapped(active_peft_config=prompt_tuning), tokenizer, layers=[1])
    activated = type("Config", (), {"alora_invocation_tokens": [7]})
    with pytest.raises(UnsupportedModel, match="an activated LoRA, which acts in peft's own forward alone"):
        Embedder.from_model(Wrapped(active_peft_config=activated), tokenizer, layers=[1])


def test_the_two_halves_of_encode(embedder, tokenizer):
    for role in ("document", "query"):
        prompts = embedder.prompts(NOTICES[:5], role=role)
        halves, whole = embedder.encode_prompts(prompts, role=role), embedder.encode_with_report(NOTICES[:5], role=role)
        np.testing.assert_array_equal(halves.vectors, whole.vectors)
        assert halves.token_counts.tolist() == whole.token_counts.tolist()
    ids = [tokenizer(text)["input_ids"] for text in NOTICES[:5]]
    assert embedder.prompts(ids) == embedder.prompts(NOTICES[:5])
    for one in (embedder, embedder.replace(document=("{text}", "A {text}"), query=("{text}", "B {text}"))):
        assert one.encode_prompts([]).vectors.shape == (0, embedder.dim)
    views = embedder.encode_views(NOTICES[:5]).vectors
    np.testing.assert_array_equal(embedder.join(views.tolist()), embedder.encode(NOTICES[:5]))
    for odd in (views[0], views[:, :, :-1], views[:, None]):
        with pytest.raises(InputError, match="views are of shape"):
            embedder.join(odd)
    long = " ".join(NOTICES)
    assert embedder.prompts([long])[0][0].tokens_cut > 0
    with pytest.raises(InputError, match=r"text 1 takes [\d,]+ tokens with its template; the limit is 400"):
        embedder.prompts(["a", long], truncate=False)


def test_a_stream_is_read_a_little_ahead_and_is_the_same(embedder, monkeypatch, caplog):
    monkeypatch.setattr("kvembed.batching._BLOCK_ITEMS", 4)
    read = []

    def texts():
        for text in [*NOTICES[:14], "word " * 2000]:
            read.append(text)
            yield text

    stream = embedder.encode_stream(texts())
    first = next(stream)
    assert len(first.vectors) == 4
    assert len(read) <= 9  # one piece embedded, one tokenised, one text of the next
    with caplog.at_level("WARNING"):
        rest = list(stream)
    assert [len(piece.vectors) for piece in rest] == [4, 4, 3]
    assert caplog.messages == ["1 of 15 texts were cut to 400 tokens"]
    whole = embedder.encode_with_report(read)
    for name in ("vectors", "token_counts", "tokens_cut"):
        together = np.concatenate([getattr(piece, name) for piece in (first, *rest)])
        np.testing.assert_allclose(together, getattr(whole, name), atol=1e-5)


def test_a_bad_text_far_down_a_stream_is_named_by_its_place_in_it(embedder, monkeypatch):
    monkeypatch.setattr("kvembed.batching._BLOCK_ITEMS", 2)
    for bad, message in ((7, "text 5 is a int, not a string"), ("\ud800", "text 5 holds a lone surrogate")):
        stream = embedder.encode_stream(["a", "b", "c", "d", "e", bad])
        next(stream)
        next(stream)
        with pytest.raises(InputError, match=message):
            next(stream)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_does_not_matter(llama, tokenizer, dtype):
    texts = [f"{text} {i}" for i, text in enumerate(MANY[:120])]

    def vectors():
        static = Embedder.from_model(llama, tokenizer, method="static", texts=MANY)
        others = [
            Embedder.from_model(llama, tokenizer, **one)
            for one in (
                {"method": "weighted-mean"},
                {"layers": [1, 3]},
                {"method": "token-prepending", "prepend_layers": [1, 2], "output_layer": -2},
            )
        ]
        return np.concatenate([static.encode_views(texts).vectors[:, 0], *(one.encode(texts) for one in others)], 1)

    expected = vectors()
    torch.set_default_dtype(dtype)
    try:
        found = vectors()
    finally:
        torch.set_default_dtype(torch.float32)
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


def test_roles_of_unlike_numbers_of_templates(llama, tokenizer):
    embedder = Embedder.from_model(llama, tokenizer, method="mean", query=("a {text}", "b {text}"))
    alone = [Embedder.from_model(llama, tokenizer, method="mean", query=one) for one in embedder.config.query]
    views = np.stack([embedder.encode_views(NOTICES, role="query").vectors[:, place] for place in (0, 1)])
    for one, read in zip(alone, views, strict=True):
        np.testing.assert_allclose(one.encode_views(NOTICES, role="query").vectors[:, 0], read, atol=1e-4)
    np.testing.assert_allclose(embedder.encode_query(NOTICES), unit(views.mean(0)), atol=1e-6)
    assert embedder.encode_document(NOTICES).shape == (len(NOTICES), 48)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "kv", "output_layer": 99}, "output_layer is 99"),
        ({"method": "kv", "max_tokens": 3}, "max_tokens is 3, but the template alone takes"),
        ({"method": "kv", "max_tokens": 5000}, "the model takes at most 1024"),
        ({"method": "token-prepending", "layers": None, "prepend_layers": [9]}, "prepend_layers go up to 9"),
        ({"method": "static", "dim": 49}, "dim is 49, but the transform gives 48 at most"),
        ({"method": "auto", "layers": None, "dim": 4000}, "dim is 4000, but the transform gives 48 at most"),
    ],
)
def test_a_bad_option_is_told_before_minutes_of_work(llama, tokenizer, monkeypatch, options, message):
    monkeypatch.setattr("kvembed.self_written.write_texts", lambda *_, **__: pytest.fail("it writes texts"))
    with pytest.raises(InputError, match=message):
        Embedder.from_model(llama, tokenizer, **options)


def test_where_no_layer_is_run_none_is_chosen(llama, tokenizer, monkeypatch):
    monkeypatch.setattr("kvembed.embedder.choose_layers", lambda *_, **__: pytest.fail("it chooses layers"))
    assert Embedder.from_model(llama, tokenizer, method="static", layers=None).config.layers == ()


def test_to_explain_without_a_slot_takes_no_forward(tokenizer):
    model = tiny()
    embedder = Embedder.from_model(model, tokenizer, method="mean")
    model.model.register_forward_pre_hook(lambda *_: pytest.fail("it runs"))
    assert embedder.explain("a").beta == {}


@pytest.mark.parametrize("long", ["document", "query"])
def test_a_template_that_leaves_no_room_is_told_before_the_first_text(llama, tokenizer, long):
    templates = {"document": "{text}", "query": "{text}"} | {long: "so many words " * 9 + "{text}"}
    with pytest.raises(InputError, match="max_tokens is 8, but the template alone takes"):
        Embedder.from_model(llama, tokenizer, method="mean", max_tokens=8, **templates)


def test_a_template_that_leaves_no_room_for_chunks(tokenizer):
    model = tiny(max_position_embeddings=64)
    refused = []
    for words in range(10, 70):
        try:
            Embedder.from_model(
                model, tokenizer, method="mean", document="x " * words + "{text}", chunk_tokens=8
            ).encode(["some text of several tokens, a little longer than that"])
        except InputError as error:
            assert "template alone takes" in str(error)  # noqa: PT017
            refused.append(words)
    assert min(refused) > 10
    assert refused == list(range(min(refused), 70))


def test_padding_with_an_ordinary_token_spoils_no_text(llama, tokenizer):
    own = copy.deepcopy(tokenizer)
    expected = Embedder.from_model(llama, own, method="mean").encode(["Stop! now"])
    own.pad_token_id = own("!", add_special_tokens=False)["input_ids"][0]
    np.testing.assert_array_equal(Embedder.from_model(llama, own, method="mean").encode(["Stop! now"]), expected)
