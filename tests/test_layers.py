"""TwoNN against its reference implementation, the paper's rule, the streamed curve, and profiles."""

from __future__ import annotations

import copy
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import skdim
import torch
from conftest import MANY, NOTICES, tiny
from tokenizers import normalizers

from kvembed import Embedder, InputError, KvembedError
from kvembed.backbone import Backbone
from kvembed.files import cache_folder
from kvembed.fingerprint import fingerprint
from kvembed.layers import Profile, choose_layers, id_curve, twonn, window
from kvembed.prompts import Prompter
from kvembed.self_written import generated_texts, write_texts


def chosen(backbone, tokenizer, template, **options):
    prompter = Prompter(tokenizer)
    told = fingerprint(backbone, prompter)
    return choose_layers(
        told,
        backbone,
        prompter,
        template,
        lambda count: generated_texts(backbone.model, tokenizer, told, count),
        **options,
    )


def cloud(dimension, ambient, count=400, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((count, dimension)) @ rng.standard_normal((dimension, ambient))


def test_a_model_whose_states_are_not_finite_says_so_while_it_writes(tokenizer):
    model = tiny().to(torch.bfloat16)
    model.model.layers[0].mlp.down_proj.weight.data.fill_(float("nan"))
    with pytest.raises(KvembedError, match="the model's states are not finite in bfloat16; its weights may be damaged"):
        write_texts(model, tokenizer, count=5, batch=4)


def test_threads_that_need_the_same_texts_get_the_same(tokenizer):
    """Both would draw from torch's one generator."""
    model = tiny()
    with ThreadPoolExecutor(2) as pool:
        one, two = pool.map(lambda _: generated_texts(model, tokenizer, "threads", 30), range(2))
    assert one == two == write_texts(model, tokenizer, count=30)


def test_texts_of_the_same_tokens_count_once(tokenizer):
    lower = copy.deepcopy(tokenizer)
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    backbone, prompter = Backbone(tiny()), Prompter(lower)
    once = id_curve(backbone, prompter, MANY[:60], "{text}")
    twice = id_curve(backbone, prompter, [*MANY[:60], *(text.upper() for text in MANY[:60])], "{text}")
    np.testing.assert_allclose(twice, once, rtol=0.01)


def test_points_on_a_grid_have_no_dimension():
    with pytest.raises(InputError, match="equally far"):
        twonn(np.stack(np.meshgrid(np.arange(6.0), np.arange(6.0)), -1).reshape(-1, 2))


def test_a_callers_autocast_is_not_for_what_a_model_writes(tokenizer):
    model = tiny()
    expected = write_texts(model, tokenizer, count=30, batch=10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert write_texts(model, tokenizer, count=30, batch=10) == expected


@pytest.mark.parametrize(("dimension", "ambient"), [(1, 5), (3, 30), (8, 64), (20, 20)])
def test_twonn_agrees_with_scikit_dimension(dimension, ambient):
    points = cloud(dimension, ambient)
    assert twonn(points) == pytest.approx(skdim.id.TwoNN().fit(points).dimension_, rel=1e-6)


def test_twonn_drops_duplicates_first():
    points = cloud(4, 10)
    assert twonn(np.concatenate([points, points[:100], points[:50]])) == pytest.approx(twonn(points), rel=1e-12)


def test_twonn_on_float32_and_bad_input():
    points = cloud(4, 10).astype(np.float32)
    assert twonn(points) == pytest.approx(skdim.id.TwoNN().fit(points.astype(np.float64)).dimension_, rel=1e-6)
    with pytest.raises(InputError, match="at least 20 distinct texts, not 1"):
        twonn(np.ones((50, 3)))
    points[3, 3] = np.nan
    with pytest.raises(InputError, match="not finite"):
        twonn(points)


@pytest.mark.parametrize(
    ("curve", "attention", "expected"),
    [
        ([9, 1, 9, 9, 9, 5, 9, 9, 9, 9], range(10), (5, 6)),  # layers 0 and 1 are left out; floor(0.1 * 10) = 1
        ([9, 9, 3, 9, 9, 9, 9, 9, 9, 9], range(10), (2, 3)),  # layer 2 is the first allowed
        ([9, 9, 9, 9, 9, 9, 9, 9, 9, 1], range(10), (9,)),  # cut at L - 1
        ([9] * 29 + [1], range(30), (29,)),
        ([9] * 20 + [1] + [9] * 9, range(30), (20, 21, 22, 23)),
        ([9, 9, 3, 9], range(4), (2,)),  # floor(0.4) = 0
        ([9, 9, 9, 1, 5, 4, 9, 9, 9, 9], (1, 5, 9), (5,)),  # layer 3 has no attention
        ([1, 2, 3, 4, 5, 6, 7, 8, 9, 9], (0, 1), (0, 1)),  # attention only where the rule would not look
    ],
)
def test_the_papers_rule(curve, attention, expected):
    assert window(curve, tuple(attention)) == expected


def test_the_curve_is_that_of_the_last_tokens_states(llama, tokenizer):
    backbone, prompter = Backbone(llama), Prompter(tokenizer)
    curve = id_curve(backbone, prompter, NOTICES, "Context: {text}!", batch_tokens=128)
    last = []
    for prompt in prompter(NOTICES, "Context: {text}!", 512):
        with torch.inference_mode():
            states = llama.model(torch.tensor([prompt.ids]), output_hidden_states=True).hidden_states
        last.append(torch.stack([state[0, -1] for state in states[1:-1]]))
    expected = [twonn(layer.numpy()) for layer in torch.stack(last, 1)]
    assert curve[:-1] == pytest.approx(expected, rel=1e-3)
    assert len(curve) == 5


def test_a_batch_that_does_not_fit_is_halved(llama, tokenizer, monkeypatch, caplog):
    backbone, prompter = Backbone(llama), Prompter(tokenizer)
    whole = id_curve(backbone, prompter, NOTICES, "{text}")
    states, sizes = backbone.states, []

    def small(ids, lengths, *args, **options):
        sizes.append(int(lengths.sum()))
        if sizes[-1] > 400:
            raise torch.OutOfMemoryError
        return states(ids, lengths, *args, **options)

    monkeypatch.setattr(backbone, "states", small)
    np.testing.assert_allclose(id_curve(backbone, prompter, NOTICES, "{text}"), whole, rtol=1e-3)
    assert "out of memory: batches cut" in caplog.text
    sizes.clear()
    Embedder.from_model(llama, tokenizer, texts=NOTICES, batch_tokens=300)
    assert max(sizes, default=0) <= 300


def test_a_profile_is_worked_out_once_from_self_written_text(tokenizer, monkeypatch):
    backbone = Backbone(tiny(seed=5))
    monkeypatch.setattr("kvembed.layers._TEXTS", 40)
    first = chosen(backbone, tokenizer, "In: {text}", model="tiny")
    stored = list((cache_folder() / "profiles").iterdir())
    assert [Profile.from_json(path.read_text()) for path in stored] == [first]
    assert (first.texts, first.count, len(first.curve), first.fingerprint) == (
        "self-written",
        40,
        5,
        fingerprint(backbone, Prompter(tokenizer)),
    )
    assert first.layers == window(first.curve, first.attention_layers)
    (written,) = (cache_folder() / "texts").glob("*.json")
    texts = json.loads(written.read_text())
    assert len(set(texts)) == 40

    monkeypatch.setattr("kvembed.layers.id_curve", lambda *_, **__: pytest.fail("worked out twice"))
    assert chosen(backbone, tokenizer, "In: {text}") == first
    with pytest.raises(pytest.fail.Exception):
        chosen(backbone, tokenizer, "Other: {text}")  # the last token's states depend on the template


def test_given_texts_have_a_profile_of_their_own(tokenizer, llama):
    given = chosen(Backbone(llama), tokenizer, "{text}", texts=NOTICES)
    fewer = chosen(Backbone(llama), tokenizer, "{text}", texts=NOTICES[:30])
    assert (given.texts, given.count, fewer.count) == ("given", len(NOTICES), 30)
    assert given.texts_sha256 != fewer.texts_sha256
    assert chosen(Backbone(llama), tokenizer, "{text}", texts=NOTICES) == given


def test_self_written_text_is_the_same_for_the_same_seed_and_leaves_the_generator_alone(tokenizer, llama):
    from kvembed.self_written import write_texts

    state = torch.get_rng_state()
    one = write_texts(llama, tokenizer, count=12, seed=3, batch=8)
    torch.manual_seed(123)
    two = write_texts(llama, tokenizer, count=12, seed=3, batch=8)
    other = write_texts(llama, tokenizer, count=12, seed=4, batch=8)
    assert one == two != other
    torch.set_rng_state(state)
    write_texts(llama, tokenizer, count=4, batch=4)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_without_a_head_says_what_to_give(tokenizer, llama):
    with pytest.raises(InputError, match=r"LlamaModel can't write .*: give calibration texts, or layers="):
        Embedder.from_model(llama.model, tokenizer)
    assert Embedder.from_model(llama.model, tokenizer, layers=[2]).config.layers == (2,)
    assert Embedder.from_model(llama.model, tokenizer, texts=NOTICES).config.layers


def test_the_choice_never_depends_on_the_texts_embedded(tokenizer, llama):
    embedder = Embedder.from_model(llama, tokenizer, texts=NOTICES)
    config = embedder.config
    alone = embedder.encode("one text")
    embedder.encode(NOTICES * 3)
    assert embedder.config == config
    np.testing.assert_allclose(embedder.encode("one text"), alone, atol=1e-6)


@pytest.mark.parametrize("damage", ['{"model": "half a fi', "{}", "[1]"])
def test_a_damaged_profile_is_made_anew(tokenizer, llama, caplog, damage):
    first = chosen(Backbone(llama), tokenizer, "{text}", texts=NOTICES)
    (path,) = (cache_folder() / "profiles").iterdir()
    path.write_text(damage)
    assert chosen(Backbone(llama), tokenizer, "{text}", texts=NOTICES) == first
    assert "ignoring the profile" in caplog.text
    assert Profile.from_json(path.read_text()) == first


def test_too_few_texts(tokenizer, llama):
    with pytest.raises(InputError, match="at least 20 distinct texts"):
        chosen(Backbone(llama), tokenizer, "{text}", texts=["same"] * 100)


def test_shipped_profiles_are_well_formed():
    from kvembed.layers import shipped_profiles
    from kvembed.methods import METHODS

    profiles = shipped_profiles()
    assert {profile.model for profile in profiles} == {"smollm2", "qwen2.5-coder-0.5b", "gemma3-270m"}
    for profile in profiles:
        assert profile.layers == window(profile.curve, profile.attention_layers)
        assert (profile.template, profile.texts, profile.count) == (METHODS["kv"].document, "self-written", 1000)


def test_repeated_texts_do_not_bend_the_curve(llama, tokenizer):
    """The same text in another batch differs in the last bit: a distance ratio out of nothing."""
    backbone, prompter = Backbone(llama), Prompter(tokenizer)
    once = id_curve(backbone, prompter, NOTICES, "{text}")
    assert id_curve(backbone, prompter, NOTICES * 2, "{text}", batch_tokens=300) == pytest.approx(once, rel=1e-3)


def test_calibration_keeps_to_the_models_length(tokenizer):
    model = tiny("gpt2", n_positions=96, max_position_embeddings=96)
    texts = [f"{notice} " * 9 for notice in NOTICES]
    assert Embedder.from_model(model, tokenizer, texts=texts).config.layers


def test_a_long_template_leaves_room_for_calibration_texts(tokenizer):
    model = tiny(max_position_embeddings=2048)
    template = f"{NOTICES[0]} " * 30 + "{text} in one word:"
    assert len(tokenizer(template)["input_ids"]) > 600
    assert Embedder.from_model(model, tokenizer, texts=NOTICES, document=template, query=template).config.layers


def test_texts_that_cannot_be_stored_or_read_are_no_obstacle(tokenizer, llama, monkeypatch, tmp_path, caplog):
    from kvembed.self_written import write_texts

    (tmp_path / "file").write_text("")
    texts = write_texts(llama, tokenizer, count=5, batch=10, cache=tmp_path / "file" / "texts.json")
    assert "could not be stored" in caplog.text
    (tmp_path / "texts.json").write_text('["broken')
    assert write_texts(llama, tokenizer, count=5, batch=10, cache=tmp_path / "texts.json") == texts
    assert "ignoring the texts" in caplog.text
    assert json.loads((tmp_path / "texts.json").read_text()) == texts


def test_more_texts_begin_with_the_same_ones(tokenizer, llama, tmp_path, monkeypatch):
    cache = tmp_path / "texts.json"
    turns, generate = [], llama.generate
    monkeypatch.setattr(llama, "generate", lambda *args, **options: turns.append(1) or generate(*args, **options))
    nine = write_texts(llama, tokenizer, count=9, batch=4)
    at_once = len(turns)
    five = write_texts(llama, tokenizer, count=5, batch=4, cache=cache)
    assert nine[:5] == five
    assert write_texts(llama, tokenizer, count=9, batch=4, cache=cache) == nine
    assert len(turns) == 2 * at_once  # it went on after the five
    assert json.loads(cache.read_text()) == nine
    assert write_texts(llama, tokenizer, count=5, batch=4, cache=cache) == five  # from the nine
    cache.unlink()
    assert write_texts(llama, tokenizer, count=5, batch=4, cache=cache) == five  # from what is beside it
    assert len(turns) == 2 * at_once


def test_a_model_that_writes_too_little_is_told(tokenizer, llama, monkeypatch):
    monkeypatch.setattr(llama, "generate", lambda prompt, **_: prompt)  # it ends each text at once
    with pytest.raises(InputError, match="LlamaForCausalLM wrote only 0 distinct texts: give calibration texts, or"):
        write_texts(llama, tokenizer, count=10, batch=4)


def test_the_models_own_generation_settings_do_not_matter(tokenizer):
    from kvembed.self_written import write_texts

    model = tiny()
    plain = write_texts(model, tokenizer, count=5, batch=10)
    settings = model.generation_config
    settings.min_p, settings.repetition_penalty, settings.return_dict_in_generate = 0.9, 50.0, True
    seen = []
    model.model.register_forward_pre_hook(lambda *_: seen.append(model.generation_config))
    assert write_texts(model, tokenizer, count=5, batch=10) == plain
    assert {*map(id, [*seen, model.generation_config])} == {id(settings)}  # nor do others see any but their own


def test_low_layers_that_do_not_tell_texts_apart(tokenizer):
    kinds = ["conv", "conv", "full_attention", "conv", "full_attention", "conv"]
    backbone = Backbone(tiny("lfm2", num_hidden_layers=6, layer_types=kinds))
    texts = [f"{text} {i}" for i, text in enumerate(NOTICES)]
    curve = id_curve(backbone, Prompter(tokenizer), texts, "{text}, in a few words and no more:")
    assert curve[0] == 0
    assert curve[2] > 0
    assert window(curve, backbone.attention_layers)[0] in (2, 4)
