"""Transforms: the formulas written out once more, bad data, files; and tuning, which finds, fits and keeps them."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil

import numpy as np
import pytest
import torch
from conftest import MANY, NOTICES, tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from kvembed import EmbedConfig, Embedder, InputError, Readout
from kvembed.self_written import write_texts
from kvembed.transform import FORMULA, LEAST_TEXTS, Transform, fit
from kvembed.tuning import choose_transform

TEXTS = [f"{one} {number}" for number in range(9) for one in NOTICES][:130]
INSIDE = (False, True)


def views(seed=0, texts=300, dim=8, shared=3):
    """Two views of texts that have `shared` directions in common, with an offset and very unequal coordinates."""
    draw = np.random.default_rng(seed)
    common = draw.normal(size=(texts, shared))
    both = [common @ draw.normal(size=(shared, dim)) + 0.5 * draw.normal(size=(texts, dim)) for _ in INSIDE]
    return (np.stack(both, 1) * np.logspace(0, 2, dim) + 20).astype(np.float32)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_the_formulas():
    read = views()
    moved = read + np.float32([40, -40] * 4)
    transform = fit({"document": read, "query": moved}, INSIDE, {})
    x = unit(read.astype(np.float64))
    whitened = []
    for v, inside in enumerate(INSIDE):
        covariance = np.cov((x[:, v] - x[:, v].mean(0)).T)
        target = np.diag(np.diag(covariance)) if inside else np.eye(8) * np.trace(covariance) / 8
        shrunk = 0.85 * covariance + 0.15 * target if inside else 0.5 * covariance + 0.5 * target
        inverse = np.linalg.inv(np.linalg.cholesky(shrunk))  # any square root: rotations of a view cancel out
        whitened.append(unit((x[:, v] - x[:, v].mean(0)) @ inverse.T))
    side = np.hstack(whitened)
    covariance = np.cov(side.T)
    shrunk = 0.4 * covariance + 0.6 * np.eye(16) * np.trace(covariance) / 16
    values, vectors = np.linalg.eigh(shrunk)
    order = np.argsort(-values)[:8]
    expected = (side @ vectors[:, order] * values[order] ** 0.5).astype(np.float32)
    got = transform(read, "document")
    np.testing.assert_allclose(got @ got.T, expected @ expected.T, atol=1e-4)
    np.testing.assert_allclose(np.abs(got), np.abs(expected), atol=1e-3)
    assert np.abs(transform(moved, "query").mean(0)).max() < np.abs(transform(moved, "document").mean(0)).max() / 3


def test_what_the_views_share_comes_first():
    """Two directions that both views have carry more than chance into the first two dimensions."""
    draw = np.random.default_rng(1)
    common = draw.normal(size=(2000, 2))
    read = draw.normal(size=(2000, 2, 8))
    read[:, 0, :2] += 2 * common
    read[:, 1, 4:6] += 2 * common
    got = fit({"document": read + 9, "query": read + 9}, INSIDE, {})((read + 9).astype(np.float32), "document")
    fitted = np.linalg.lstsq(got[:, :2], common, rcond=None)[0]
    assert np.corrcoef((got[:, :2] @ fitted).ravel(), common.ravel())[0, 1] > 0.9


def test_fewer_dimensions_are_the_first_ones():
    read = views()
    transform = fit({"document": read, "query": read}, INSIDE, {})
    np.testing.assert_allclose(transform(read, "query", 3), transform(read, "query")[:, :3], atol=1e-6)
    assert transform(read[:0], "query").shape == (0, transform.dim)


@settings(max_examples=30)
@given(
    texts=st.integers(LEAST_TEXTS, 140),
    dim=st.integers(2, 200),
    scale=st.sampled_from([1e-12, 1.0, 1e12]),
    dead=st.booleans(),
    seed=st.integers(0, 99),
)
def test_never_a_nan(texts, dim, scale, dead, seed):
    """Fewer texts than dimensions, tiny and huge states, a coordinate that never moves."""
    read = np.random.default_rng(seed).normal(size=(texts, 2, dim)).astype(np.float32) * np.float32(scale)
    if dead:
        read[..., 0] = scale
    got = fit({"document": read, "query": read}, INSIDE, {})(read, "document")
    assert np.isfinite(got).all()
    assert (np.linalg.norm(got, axis=1) > 1e-4).all()


def test_texts_that_say_nothing():
    read = views(texts=LEAST_TEXTS - 1)
    with pytest.raises(InputError, match="on 100 different texts or more, not 99; give more, or none"):
        fit({"document": read, "query": read}, INSIDE, {})
    same = np.repeat(read[:1], 500, 0)
    with pytest.raises(InputError, match="not 1;"):
        fit({"document": same, "query": same}, INSIDE, {})
    half = views()
    half[:, 1] = half[0, 1]
    with pytest.raises(InputError, match="the same for all calibration texts"):
        fit({"document": half, "query": half}, INSIDE, {})


def test_files(tmp_path):
    read = views()
    transform = fit({"document": read, "query": read + 1}, INSIDE, {"texts": "given"})
    transform.save(tmp_path / "new" / "t.safetensors")
    again = Transform.load(tmp_path / "new" / "t.safetensors")
    assert np.array_equal(again(read, "query"), transform(read, "query"))
    assert (again.info, again.digest()) == ({"texts": "given", "count": 300}, transform.digest())
    assert again.digest() != fit({"document": read, "query": read}, INSIDE, {}).digest()
    whole = (tmp_path / "new" / "t.safetensors").read_bytes()
    renamed = [whole.replace(b"rotate", b"rotten"), whole.replace(b"mean.query", b"mean.quest")]
    broken = bytearray(whole)
    broken[-8:] = b"\xff" * 8  # two numbers that are none
    dataclasses.replace(transform, info=["a list"]).save(tmp_path / "listed")
    for content in (b"", b"{}", whole[:-9], *renamed, bytes(broken), (tmp_path / "listed").read_bytes()):
        (tmp_path / "bad").write_bytes(content)
        with pytest.raises(InputError, match="bad is not a transform of kvembed"):
            Transform.load(tmp_path / "bad")
    with pytest.raises(InputError, match=r"is a folder; a transform is a \.safetensors file"):
        Transform.load(tmp_path)


TWO_VIEWS = EmbedConfig(more_readouts=[Readout(output_layer=0)], transform="whiten", query="Q {text}")


def tuned(read, tmp_path, config=TWO_VIEWS, **options):
    return choose_transform("x", config, read, lambda count: TEXTS, **options)


def test_tuning_keeps_what_it_fitted_and_what_it_read(tmp_path):
    asked = []

    def read(texts, role, templates):
        asked.append((role, len(texts)))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return views(len(texts[0]), texts=len(texts))

    with pytest.raises(KeyboardInterrupt):
        tuned(read, tmp_path)
    assert asked == [("document", 100), ("document", 30), ("query", 100)]
    told = []
    first = tuned(read, tmp_path, report=lambda done, total: told.append((done, total)))
    assert asked[3:] == [("query", 100), ("query", 30)]  # the documents were kept
    assert told == [(100, 260), (130, 260), (230, 260), (260, 260)]
    assert first.info["texts"] == "self-written"
    assert tuned(lambda *_: pytest.fail("it was stored"), tmp_path).digest() == first.digest()
    (stored,) = (tmp_path / "cache" / "transforms").glob("*.safetensors")
    stored.write_bytes(b"damaged")
    assert tuned(lambda *_: pytest.fail("it was kept"), tmp_path).digest() == first.digest()


def test_some_of_the_texts_are_read_as_queries_too(tmp_path, monkeypatch, tokenizer):
    """Of queries only the mean is wanted, and those are the model's own texts where there are any."""
    monkeypatch.setattr("kvembed.tuning.QUERY_TEXTS", 60)
    asked, told = [], []

    def read(texts, role, templates):
        asked.append((role, texts[0], len(texts)))
        return views(len(texts[0]), texts=len(texts)) + (role == "query")

    given = [f"text {number}" for number in range(110)]
    transform = tuned(read, tmp_path, texts=given, report=lambda done, total: told.append((done, total)))
    assert [one for one in asked if one[0] == "query"] == [("query", TEXTS[0], 60)]
    assert told[-1] == (110 + len(TEXTS) + 60,) * 2
    means = read(TEXTS[:60], "query", [0])
    means = means / np.linalg.norm(means, axis=-1, keepdims=True)
    np.testing.assert_allclose(transform.means["query"], means.mean(0), atol=1e-6)

    cant = tiny().model  # write
    asked.clear()
    choose_transform("x", TWO_VIEWS, read, lambda _: write_texts(cant, tokenizer), texts=given[1:])
    assert [one for one in asked if one[0] == "query"] == [("query", given[1], 60)]


def test_a_fit_depends_on_whether_the_model_can_write_and_not_on_what_the_cache_has(tokenizer, monkeypatch):
    """A model without its head has the weights, and so the name, of the whole one."""
    whole, texts = tiny(), [f"{one} {n}" for n in range(3) for one in NOTICES]

    def fits(models):
        embedders = [Embedder.from_model(model, tokenizer, method="static", texts=texts) for model in models]
        return [(one.transform.info["self_written"], one.transform.digest()) for one in embedders]

    both = fits([whole, whole.model])
    assert both[0][0] > 0 == both[1][0]
    monkeypatch.setenv("KVEMBED_CACHE", f"{os.environ['KVEMBED_CACHE']}-other")
    assert fits([whole.model, whole]) == both[::-1]


def test_what_was_read_for_another_formula_is_read_again(tmp_path, monkeypatch):
    read = []

    def count(texts, role, templates):
        read.append(len(texts))
        return views(len(texts[0]), texts=len(texts))

    tuned(count, tmp_path)
    tuned(count, tmp_path)
    assert sum(read) == 260
    monkeypatch.setattr("kvembed.tuning.FORMULA", FORMULA + 1)
    tuned(count, tmp_path)
    assert sum(read) == 520


def test_texts_cut_otherwise_have_another_transform(tmp_path):
    """Lines are not the same corpus as paragraphs of two of them."""
    seen = []

    def read(texts, role, templates):
        seen.extend(texts)
        return views(len(seen), texts=len(texts))

    lines = [f"line {number}" for number in range(400)]
    pairs = [f"{one}\n{two}" for one, two in zip(lines[::2], lines[1::2], strict=True)]
    first = tuned(read, tmp_path, texts=lines)
    assert not {*pairs} & {*seen}
    assert tuned(read, tmp_path, texts=pairs).digest() != first.digest()
    assert {*pairs} & {*seen}


def test_an_empty_file_of_what_was_read_is_read_again(tmp_path):
    first = tuned(lambda texts, *_: views(3, texts=len(texts)), tmp_path)
    (stored,) = (tmp_path / "cache" / "transforms").glob("*.safetensors")
    stored.unlink()
    for piece in stored.parent.glob("*.npy"):
        piece.write_bytes(b"")
    assert tuned(lambda texts, *_: views(3, texts=len(texts)), tmp_path).digest() == first.digest()


def test_given_texts_have_a_transform_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr("kvembed.tuning._GIVEN_TEXTS", 500)
    seen = []

    def read(texts, role, templates):
        seen.extend(texts)
        return views(len(seen), texts=len(texts))

    given_texts = [f"text {number}" for number in range(1500)]
    transform = tuned(read, tmp_path, TWO_VIEWS.replace(query="{text}"), texts=[*given_texts, *given_texts])
    assert seen[500:] == TEXTS
    info = transform.info
    assert (info["texts"], info["count"], info["self_written"]) == ("given", 500 + len(TEXTS), len(TEXTS))
    assert len({*seen[:500]}) == 500
    assert max(given_texts.index(text) for text in seen[:500]) > 1000  # drawn from all
    with pytest.raises(InputError, match="not 2; give more"):
        tuned(read, tmp_path, texts=["one", "two"])


def test_few_given_texts_are_joined_by_self_written_ones(tmp_path, caplog, tokenizer, monkeypatch):
    monkeypatch.setattr("kvembed.tuning._GIVEN_TEXTS", 500)
    seen = []

    def read(texts, role, templates):
        seen.extend(texts)
        return views(len(seen), texts=len(texts))

    config = TWO_VIEWS.replace(query="{text}")
    few = [*TEXTS[:30], *(f"text {number}" for number in range(100))]  # 30 that the model wrote too: read once
    transform = tuned(read, tmp_path, config, texts=few)
    assert seen == [*few, *TEXTS[30:]]
    assert (transform.info["count"], transform.info["self_written"]) == (230, 100)
    seen.clear()
    tuned(read, tmp_path, config, texts=few[:-1])
    assert seen == few[:-1]  # what was read of the self-written ones is kept, and nothing else
    assert len(list((tmp_path / "cache" / "transforms").glob("*.npy"))) == 1
    seen.clear()
    alone = choose_transform(
        "x", config, read, lambda count: write_texts(tiny().model, tokenizer, count=count), texts=few[1:]
    )
    assert (seen, alone.info["self_written"]) == (few[1:], 0)
    assert "on 129 given texts alone, which is not as good: LlamaModel can't write" in caplog.text


def test_a_cache_that_cannot_be_written_costs_no_fit(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("KVEMBED_CACHE", "/dev/null")
    given_texts = [f"text {number}" for number in range(120)]
    assert tuned(lambda texts, *_: views(len(texts), texts=len(texts)), tmp_path, texts=given_texts).dim
    assert "could not be stored" in caplog.text


def test_a_weight_is_how_often_a_text_counts():
    part = views(texts=300)
    counts = np.random.default_rng(1).integers(1, 4, len(part))
    weighted = fit({"document": part, "query": part}, [False, True], {}, counts / 7)
    repeated = np.repeat(part, counts, 0)
    again = fit({"document": repeated, "query": part}, [False, True], {})
    plain = fit({"document": part, "query": part}, [False, True], {})
    every = [unit(transform(part[:9], "query")) for transform in (weighted, again, plain)]
    cosines = [vectors @ vectors.T for vectors in every]
    np.testing.assert_allclose(cosines[0], cosines[1], atol=1e-5)
    assert np.abs(cosines[0] - cosines[2]).max() > 1e-3


def test_given_texts_weigh_by_what_they_have_in_common(tmp_path):
    def read(texts, role, templates):
        rows = [np.random.default_rng([*text.encode()]).normal(size=(2, 8)) for text in texts]
        shift = np.linspace(-apart, apart, 16).reshape(2, 8)
        return np.stack([row + text.startswith("given") * shift for text, row in zip(texts, rows, strict=True)]).astype(
            np.float32
        )

    config = TWO_VIEWS.replace(query="{text}")
    weights = []
    for apart in (0.0, 1.0, 3.0):
        info = tuned(read, tmp_path, config, texts=[f"given {apart} {number}" for number in range(150)]).info
        weights.append(info["weight_of_given"])
    assert weights[0] < 0.05 < weights[1] < 0.7 < weights[2] < 1


def test_queries_keep_the_mean_of_self_written_texts(tmp_path):
    def read(texts, role, templates):
        rows = [
            np.random.default_rng([*text.encode()]).normal(size=(2, 8)) + text.startswith("given") for text in texts
        ]
        return np.stack(rows).astype(np.float32)

    config = TWO_VIEWS.replace(query="{text}")
    given_texts = [f"given {number}" for number in range(150)]
    alone, both = tuned(read, tmp_path, config), tuned(read, tmp_path, config, texts=given_texts)
    torch.testing.assert_close(both.means["query"], alone.means["query"])
    assert (both.means["document"] - alone.means["document"]).abs().max() > 0.1


def test_a_template_that_both_roles_share_is_read_once(tmp_path, monkeypatch):
    config = TWO_VIEWS.replace(document=("a {text}", "b {text}", "c {text}"), query=("a {text}", "{text}", "c {text}"))
    given_to = {}
    monkeypatch.setattr("kvembed.tuning.fit", lambda views, *_: given_to.update(views) or fit(views, [0] * 6, {}))
    asked = []

    def read(texts, role, templates):
        asked.append((role, list(templates)))
        draw = np.random.default_rng(len(texts) if role == "document" else 7)
        return draw.normal(size=(len(texts), 2 * len(templates), 8)).astype(np.float32)

    tuned(read, tmp_path, config)
    assert asked == [("document", [0, 1, 2])] * 2 + [("query", [1])] * 2
    same = (given_to["document"] == given_to["query"]).all((0, 2))
    assert same.tolist() == [True, True, False, False, True, True]


def test_a_stopped_writer_goes_on_as_if_it_had_not_been(llama, tokenizer, tmp_path, monkeypatch):
    whole = write_texts(llama, tokenizer, count=30, batch=4, cache=tmp_path / "whole.json")
    generate, turns = llama.generate, []

    def stops(*args, **kwargs):
        turns.append(1)
        if len(turns) == 4:
            raise KeyboardInterrupt
        return generate(*args, **kwargs)

    monkeypatch.setattr(llama, "generate", stops)
    with pytest.raises(KeyboardInterrupt):
        write_texts(llama, tokenizer, count=30, batch=4, cache=tmp_path / "half.json")
    state = torch.get_rng_state()
    assert write_texts(llama, tokenizer, count=30, batch=4, cache=tmp_path / "half.json") == whole
    assert torch.equal(state, torch.get_rng_state())
    assert (tmp_path / "half.part").read_text() == (tmp_path / "whole.part").read_text()
    (tmp_path / "other.part").write_text("{}")
    assert write_texts(llama, tokenizer, count=30, batch=4, cache=tmp_path / "other.json") == whole


@pytest.fixture(scope="module")
def auto(llama, tokenizer, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVEMBED_CACHE", str(tmp_path_factory.mktemp("cache")))  # made before a test's own cache is
        patch.setattr("kvembed.tuning.FIT_TEXTS", 200)
        patch.setattr("kvembed.tuning._GIVEN_TEXTS", 120)
        return Embedder.from_model(llama, tokenizer, method="auto", texts=MANY)


def test_auto_is_its_views_transformed(auto, llama, tokenizer):
    """Three read-outs of one forward: the same as from three embedders that read one each."""
    document = auto.config.document
    last = Embedder.from_model(llama, tokenizer, method="last", document=document)
    mean = Embedder.from_model(
        llama, tokenizer, method="mean", mean_tokens="content", output_layer=0, document=document
    )
    static = Embedder.from_model(llama, tokenizer, method="mean", pooling="static", document=document)
    alone = [one.encode_views(NOTICES).vectors for one in (last, mean, static)]
    together = auto.encode_views(NOTICES).vectors
    np.testing.assert_allclose(together, np.concatenate(alone, 1), atol=1e-4)
    np.testing.assert_allclose(auto.encode(NOTICES), unit(auto.transform(together, "document")), atol=1e-5)


def test_fewer_dimensions(auto):
    short = auto.replace(dim=7)
    assert short.transform is auto.transform
    assert (short.dim, auto.dim) == (7, 48)
    np.testing.assert_allclose(short.encode(NOTICES), unit(auto.encode(NOTICES)[:, :7]), atol=1e-5)
    with pytest.raises(InputError, match="dim is 49, but the transform gives 48 at most"):
        auto.replace(dim=49)


def test_another_config_is_fitted_anew(auto):
    other = auto.replace(layers=(1, 2))
    assert other.transform is not auto.transform
    assert other.transform.info["config_hash"] != auto.transform.info["config_hash"]
    assert auto.replace(max_tokens=30).transform is auto.transform
    words, static = auto.config.more_readouts
    from_the_top = dataclasses.replace(words, output_layer=-len(auto.backbone.layers))  # is the same layer
    assert auto.replace(more_readouts=(from_the_top, static)).transform is auto.transform


def test_a_config_of_ones_own_and_a_fitted_file_for_a_model_in_memory(auto, llama, tokenizer, tmp_path):
    auto.transform.save(tmp_path / "fit.safetensors")
    again = Embedder.from_model(llama, tokenizer, method=auto.config, fitted=tmp_path / "fit.safetensors", dim=9)
    assert again.config == auto.config.replace(dim=9)
    np.testing.assert_allclose(again.encode(NOTICES), auto.replace(dim=9).encode(NOTICES), atol=1e-6)


def test_bad_calibration_texts(llama, tokenizer):
    for texts, message in (
        ([], "100 different texts or more, not 0"),
        (["a"] * 200, "100 different texts or more, not 1"),
        ([*MANY, "\ud800"], f"text {len(MANY)} holds a lone surrogate"),
        ([*MANY, 7], f"text {len(MANY)} is a int, not a string"),
    ):
        with pytest.raises(InputError, match=message):
            Embedder.from_model(llama, tokenizer, method="static", texts=texts)


def test_what_is_fitted_does_not_depend_on_max_tokens(llama, tokenizer, tmp_path, monkeypatch):
    """It is kept for embedders with any, so one that cuts texts short must not leave a poor one behind."""
    monkeypatch.setenv("KVEMBED_CACHE", str(tmp_path))
    short = Embedder.from_model(llama, tokenizer, method="static", texts=MANY, max_tokens=4)
    monkeypatch.setenv("KVEMBED_CACHE", str(tmp_path / "other"))
    whole = Embedder.from_model(llama, tokenizer, method="static", texts=MANY)
    assert short.transform.digest() == whole.transform.digest()


def test_any_method_can_be_whitened(llama, tokenizer):
    plain = Embedder.from_model(llama, tokenizer, method="mean", texts=MANY)
    white = plain.replace(transform="whiten")
    close = [embedder.encode(MANY) @ embedder.encode(MANY).T for embedder in (plain, white)]
    assert close[0].mean() > 5 * abs(close[1].mean())  # no direction that all texts share is left


def test_saving_and_fitted_files(auto, tmp_path, llama, tokenizer, monkeypatch):
    auto.save_pretrained(tmp_path / "saved")
    auto.save_pretrained(tmp_path / "other")
    Embedder.from_model(llama, tokenizer, method="mean").save_pretrained(tmp_path / "other")  # the transform goes
    assert Embedder.from_pretrained(tmp_path / "other").transform is None
    auto.transform.save(tmp_path / "t.safetensors")
    monkeypatch.setattr("kvembed.embedder.choose_transform", lambda *_, **__: pytest.fail("it was there"))
    again = Embedder.from_pretrained(tmp_path / "saved", dtype="float32")
    np.testing.assert_allclose(again.encode(NOTICES), auto.encode(NOTICES), atol=1e-6)
    assert Embedder.from_pretrained(tmp_path / "saved", dim=5).dim == 5
    shutil.copytree(tmp_path / "saved", tmp_path / "torn")
    (tmp_path / "torn" / "kvembed.safetensors").unlink()
    with pytest.raises(InputError, match=r"torn: kvembed\.safetensors is missing"):
        Embedder.from_pretrained(tmp_path / "torn")
    assert Embedder.from_pretrained(tmp_path / "torn", fitted=tmp_path / "t.safetensors").transform is not None
    given_file = Embedder.from_pretrained(
        tmp_path / "saved", method="auto", fitted=tmp_path / "t.safetensors", dtype="float32"
    )
    np.testing.assert_allclose(given_file.encode(NOTICES), auto.encode(NOTICES), atol=1e-6)
    for options, message in (
        ({"method": "auto", "texts": ["a"] * 100}, "give one of the two"),
        ({"method": "auto", "pooling": "mean"}, "fitted for another config of auto; fit one for it"),
        ({"method": "kv", "layers": (1,)}, "method kv has no transform"),
        ({"fitted": tmp_path / "no.safetensors"}, "no such file"),
        ({"fitted": tmp_path / "saved" / "kvembed.json"}, "is not a transform"),
    ):
        with pytest.raises(InputError, match=message):
            Embedder.from_pretrained(tmp_path / "saved", **{"fitted": tmp_path / "t.safetensors"} | options)
    with pytest.raises(InputError, match="fitted for another model"):
        Embedder(tiny(seed=3), tokenizer, auto.config, transform=auto.transform)


@pytest.mark.parametrize("back", [False, True])
def test_a_model_that_was_cast_to_float16_can_be_saved(tmp_path, tokenizer, caplog, back):
    """Its weights are rounded, and so are others than those the transform was fitted on."""
    embedder = Embedder.from_model(tiny(), tokenizer, method="auto", texts=MANY)
    embedder.model.half()
    if back:
        embedder.model.float()
    assert embedder.replace(dim=5).transform.digest() == embedder.transform.digest()
    embedder.save_pretrained(tmp_path / "half")
    assert "not as it was when its transform was fitted" in caplog.text
    for dtype in ("float32", "float16"):
        again = Embedder.from_pretrained(tmp_path / "half", dtype=dtype)
        assert (again.encode(NOTICES) * embedder.encode(NOTICES)).sum(1).min() > 0.99
        assert again.replace(dim=5).transform is again.transform


def test_a_saved_fit_serves_in_float16_and_a_file_does_not(auto, tmp_path):
    auto.save_pretrained(tmp_path / "saved")
    half = Embedder.from_pretrained(tmp_path / "saved", dtype="float16")
    assert half.dtype == "float16"
    np.testing.assert_allclose(half.encode(NOTICES), auto.encode(NOTICES), atol=2e-2)
    half.save_pretrained(tmp_path / "again")
    assert Embedder.from_pretrained(tmp_path / "again", dtype="bfloat16").dim == auto.dim
    auto.transform.save(tmp_path / "t.safetensors")
    with pytest.raises(InputError, match=r"or this one not in float16, .* take float32 or bfloat16, or fit anew"):
        Embedder.from_pretrained(tmp_path / "saved", method="auto", fitted=tmp_path / "t.safetensors", dtype="float16")


def test_a_model_without_a_head_wants_texts(tokenizer):
    headless = tiny().model
    with pytest.raises(InputError, match="can't write calibration texts itself"):
        Embedder.from_model(headless, tokenizer, method="auto")
    assert Embedder.from_model(headless, tokenizer, method="auto", texts=MANY).encode("a").shape == (48,)


def test_the_results_of_a_fitted_method_say_what_it_was_fitted_on(auto, llama, tokenizer):
    from kvembed.subjects import embedder_subject

    subject = embedder_subject(auto, "tiny")
    assert subject.config["fitted_on"] == {
        "texts": "given",
        **{name: auto.transform.info[name] for name in ("texts_sha256", "count", "self_written")},
    }
    other = Embedder.from_model(llama, tokenizer, method="auto", texts=[*MANY[1:], "one more"])
    assert embedder_subject(other, "tiny").identity != subject.identity
    json.dumps(subject.config)


def test_a_saved_fit_stays_where_nothing_it_depends_on_is_changed(auto, tmp_path, caplog):
    auto.save_pretrained(tmp_path / "saved")
    for options in ({"bias": 2.0}, {"layers": []}, {"pooling": "last"}, {"method": "auto", "dim": 5}):
        again = Embedder.from_pretrained(tmp_path / "saved", dtype="float32", **options)
        assert again.transform.digest() == auto.transform.digest(), options
    assert again.replace(slot_self=False, max_tokens=90).transform is again.transform
    assert caplog.text == ""


def test_a_fit_that_can_not_be_made_again_is_not_left_in_silence(llama, tokenizer, tmp_path, caplog):
    static, other = Embedder.from_model(llama, tokenizer, method="static", texts=MANY), {"document": "A {text}"}
    static.save_pretrained(tmp_path / "saved")
    again = Embedder.from_pretrained(tmp_path / "saved", dtype="float32")
    assert again.replace(**other).transform.info["texts"] == "self-written"
    assert caplog.text.count("on given texts, which are not at hand") == 1
    Embedder.from_pretrained(tmp_path / "saved", dtype="float32", **other)
    assert caplog.text.count("on given texts, which are not at hand") == 2
    caplog.clear()
    assert static.replace(**other).transform.info["texts"] == "given"
    assert Embedder.from_pretrained(tmp_path / "saved", method="mean").transform is None
    assert again.replace(transform="none").transform is None
    assert "not at hand" not in caplog.text


def test_replace_is_no_other_method(auto):
    with pytest.raises(InputError, match="a method is many"):
        auto.replace(method="kv")
    assert auto.replace(method="auto").config == auto.config
