"""A saved folder inside sentence-transformers gives the embedder's own vectors."""

from __future__ import annotations

import copy
import json
import logging
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import MANY, NOTICES, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from sentence_transformers.util.quantization import quantize_embeddings

from kvembed import Embedder, InputError
from kvembed.mteb_encoder import MtebEncoder
from kvembed.saved import PROMPTS
from kvembed.sentence_transformer import EmbedderModule

TEXTS = [*NOTICES, "", "a", "hello <|im_end|> there", "two\nlines\tand \u00e9 \U0001f600 \x00", "word " * 90]


def same(found, wanted):
    np.testing.assert_allclose(np.asarray(found), wanted, atol=1e-5, rtol=0)


def opened(folder, **options):
    return SentenceTransformer(str(folder), trust_remote_code=True, device="cpu", **options)


@pytest.fixture(scope="module")
def embedder(llama, tokenizer):
    """Of a model with a chat template, which sentence-transformers would put around every text."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{% for m in messages %}<|im_end|>system: {{ m['content'] }}{% endfor %}"
    return Embedder.from_model(llama, tokenizer, method="kv", layers=[1, 2])


@pytest.fixture(scope="module")
def model(folder):
    return opened(folder)


@pytest.fixture(scope="module")
def documents(embedder):
    return embedder.encode(TEXTS)


@pytest.fixture(scope="module")
def queries(embedder):
    return embedder.encode_query(TEXTS)


def test_documents_and_queries(model, embedder, documents, queries):
    for found in (model.encode(TEXTS), model.encode_document(TEXTS), model.encode(TEXTS, prompt_name="document")):
        assert found.dtype == np.float32
        same(found, documents)
    for found in (
        model.encode_query(TEXTS),
        model.encode(TEXTS, prompt_name="query"),
        model.encode(TEXTS, prompt="query"),
    ):
        same(found, queries)
    assert np.abs(documents - queries).max() > 0.01
    same(model.similarity(documents, queries), embedder.similarity(documents, queries))
    same(model.similarity_pairwise(documents, documents), np.ones(len(TEXTS)))


@pytest.mark.parametrize("method", ["auto", "last", "echo", "token-prepending", "bidirectional"])
def test_other_methods(method, llama, tokenizer, tmp_path):
    options = {"prepend_layers": [1, 2]} if method == "token-prepending" else {}
    embedder = Embedder.from_model(llama, tokenizer, method=method, texts=MANY, **options)
    embedder.save_pretrained(tmp_path / "saved")
    model = opened(tmp_path / "saved")
    texts = TEXTS[40:]
    same(model.encode(texts), embedder.encode(texts))
    same(model.encode_query(texts), embedder.encode_query(texts))
    if method == "auto":  # its dimensions are ordered, so cutting them and making them unit again is what `dim` does
        same(model.encode(texts, truncate_dim=9, normalize_embeddings=True), embedder.replace(dim=9).encode(texts))
        assert opened(tmp_path / "saved", model_kwargs={"dim": 9}).get_embedding_dimension() == 9


@settings(max_examples=6)
@given(order=st.permutations(range(len(TEXTS))), batch_size=st.integers(1, 60))
def test_neither_order_nor_batches_matter(model, documents, order, batch_size):
    same(model.encode([TEXTS[i] for i in order], batch_size=batch_size), documents[order])


def test_forms_of_input_and_output(model, documents):
    assert model.encode(TEXTS[0]).shape == (48,)
    same(model.encode(TEXTS[0]), documents[0])
    same(model.encode(np.array(TEXTS[:3])), documents[:3])
    same(model.encode(""), documents[TEXTS.index("")])
    assert len(model.encode([])) == 0
    tensor = model.encode(TEXTS, convert_to_tensor=True)
    assert isinstance(tensor, torch.Tensor)
    same(tensor, documents)
    same(torch.stack(model.encode(TEXTS, convert_to_numpy=False)), documents)
    same(model.encode(TEXTS, normalize_embeddings=True), documents)
    same(model.encode(TEXTS, truncate_dim=10), documents[:, :10])
    for precision in ("binary", "ubinary"):
        codes = model.encode(TEXTS, precision=precision)
        assert (codes != quantize_embeddings(documents, precision)).mean() < 0.01  # a bit may sit on the border


def test_what_it_says_of_itself(model, embedder):
    assert model.get_embedding_dimension() == embedder.dim == 48
    with pytest.warns(FutureWarning, match="renamed"):
        assert model.get_sentence_embedding_dimension() == 48
    assert model.similarity_fn_name == "cosine"
    assert model.prompts == PROMPTS
    assert model.default_prompt_name is None
    assert model.max_seq_length == embedder.max_tokens == 1024
    assert model.tokenizer("abc")["input_ids"] == embedder.tokenizer("abc")["input_ids"]
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert "'method': 'kv'" in repr(model)
    with pytest.raises(AttributeError):
        model.tokenizer = None


def test_cut_texts_are_counted(folder, embedder, caplog):
    model = opened(folder)
    model.max_seq_length = 40
    assert model.max_seq_length == 40
    with caplog.at_level(logging.WARNING, "kvembed"):
        found = model.encode(["word " * 100, "short"])
    assert [record.getMessage() for record in caplog.records] == ["1 of 2 texts were cut to 40 tokens"]
    short = embedder.replace(max_tokens=40)
    logging.getLogger("kvembed").setLevel(logging.ERROR)
    same(found, short.encode(["word " * 100, "short"]))
    cut = model.encode(["word " * 100, "short"], output_value=None)
    logging.getLogger("kvembed").setLevel(logging.NOTSET)
    assert cut[0]["tokens_cut"] > 0
    assert cut[1]["tokens_cut"] == 0
    assert cut[0]["token_counts"] <= 40
    with pytest.raises(InputError, match="takes at most 1024"):
        model.max_seq_length = 1025
    model.max_seq_length = None
    assert model.max_seq_length == 1024


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        (["a"], {"prompt": "Represent: "}, "prompt is 'Represent: ', .* 'query' or 'document'"),
        (["a"], {"prompt": ""}, "prompt is ''"),
        ([("a", "b")], {}, "a tuple, not a string"),
        ([["a", "b"]], {}, "a list, not a string"),
        ([3], {}, "an int?, not a string|a int, not a string"),
        (["long " * 9, "\ud800"], {}, "longest texts first: text 1 holds a lone surrogate"),
        (["a"], {"processing_kwargs": {"text": {"max_length": 3}}}, "no processing_kwargs"),
    ],
)
def test_what_is_refused(model, inputs, options, message):
    with pytest.raises(InputError, match=message):
        model.encode(inputs, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "onnx"}, "only torch"),
        ({"processor_kwargs": {"padding_side": "left"}}, "processor_kwargs"),
        ({"model_kwargs": {"attn_implementation": "eager"}}, "unknown option 'attn_implementation'"),
        ({"model_kwargs": {"dtype": "float8"}}, "unknown dtype 'float8'"),
    ],
)
def test_what_can_not_be_opened(folder, options, message):
    with pytest.raises(InputError, match=message):
        opened(folder, **options)


def test_blanked_prompts_need_a_task(folder, documents, queries):
    """Some frameworks blank the saved prompts; a query must then not be taken for a document."""
    model = opened(folder, prompts={"query": "", "document": ""})
    same(model.encode_query(TEXTS), queries)
    same(model.encode_document(TEXTS), documents)
    with pytest.raises(InputError, match="prompt is ''"):
        model.encode(TEXTS, prompt_name="query")


def test_the_flag_and_the_way_without(folder, embedder, tmp_path, documents, queries):
    """sentence-transformers 6 asks for the flag wherever a class is not its own."""
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        SentenceTransformer(str(folder))
    model = SentenceTransformer(modules=[EmbedderModule(embedder)], prompts=PROMPTS, device="cpu")
    same(model.encode(TEXTS), documents)
    model.save_pretrained(str(tmp_path / "saved"))
    same(opened(tmp_path / "saved").encode(TEXTS, prompt_name="query"), queries)


def test_saved_by_sentence_transformers(folder, tmp_path, documents, queries):
    model = opened(folder, truncate_dim=20)
    with pytest.raises(InputError, match="safetensors"):
        model.save_pretrained(str(tmp_path / "saved"), safe_serialization=False)
    model.save_pretrained(str(tmp_path / "saved"))
    again = opened(tmp_path / "saved")
    assert again.truncate_dim == 20
    same(again.encode_query(TEXTS), queries[:, :20])
    same(Embedder.from_pretrained(tmp_path / "saved", dtype="float32").encode(TEXTS), documents)
    for name in ("modules.json", "kvembed.json"):
        assert json.loads((tmp_path / "saved" / name).read_text()) == json.loads((folder / name).read_text())


def test_dtypes(folder, embedder, tokenizer, tmp_path, documents):
    """The saved one, unless said otherwise, also where kvembed itself would choose another."""
    assert opened(folder).dtype == torch.float32
    half = Embedder.from_model(tiny().to(torch.bfloat16), tokenizer, layers=[1, 2])
    half.save_pretrained(tmp_path / "half")
    assert opened(tmp_path / "half").dtype == torch.bfloat16
    for dtype in ("float32", torch.float32):
        assert opened(tmp_path / "half", model_kwargs={"dtype": dtype}).dtype == torch.float32
    assert opened(tmp_path / "half", model_kwargs={"torch_dtype": "float32"}).dtype == torch.float32
    model = opened(folder)
    for cast in (model.to(torch.bfloat16), model.half()):
        found = cast.encode(TEXTS)
        assert found.dtype == np.float32
        assert (found * documents).sum(1).min() > 0.95
    same(opened(folder).to("cpu").encode(TEXTS), documents)


def test_special_strings_are_text_in_a_copy_too(model, documents):
    """Worker processes get the model by pickle, which does not keep all of a tokenizer's rules."""
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        same(other.encode(TEXTS), documents)


@pytest.mark.slow
def test_worker_pools(model, documents, queries):
    same(model.encode_query(TEXTS, device=["cpu", "cpu"], chunk_size=5), queries)
    pool = model.start_multi_process_pool(["cpu"])
    try:
        same(model.encode(TEXTS, pool=pool, batch_size=4), documents)
        with pytest.raises(InputError, match="lone surrogate"):
            model.encode(["a\ud800"], pool=pool)
    finally:
        model.stop_multi_process_pool(pool)


def test_a_layer_on_top_can_be_trained(folder):
    """The vectors are constants, so a head over them trains as over any frozen model."""
    from sentence_transformers.sentence_transformer.modules import Dense

    module = opened(folder)[0]
    model = SentenceTransformer(modules=[module, Dense(48, 8)], device="cpu")
    features = model(model.preprocess(TEXTS[:4]))
    features["sentence_embedding"].square().sum().backward()
    assert model[1].linear.weight.grad.abs().sum() > 0


@pytest.mark.filterwarnings("ignore")
def test_a_layer_on_top_is_trained_by_the_librarys_trainer(folder, tmp_path):
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.losses import MultipleNegativesRankingLoss
    from sentence_transformers.sentence_transformer.modules import Dense

    model = SentenceTransformer(modules=[opened(folder)[0], Dense(48, 8)], device="cpu")
    before = model[1].linear.weight.detach().clone()
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, report_to="none", use_cpu=True
    )
    pairs = Dataset.from_dict({"anchor": TEXTS[:8], "positive": [text.upper() for text in TEXTS[:8]]})
    SentenceTransformerTrainer(
        model=model, args=arguments, train_dataset=pairs, loss=MultipleNegativesRankingLoss(model)
    ).train()
    assert (model[1].linear.weight - before).abs().max() > 0
    assert not model[0].model.training


def test_saving_does_not_need_sentence_transformers(folder, tmp_path):
    code = f"""
import sys
sys.modules["sentence_transformers"] = None
from kvembed import Embedder, InputError
Embedder.from_pretrained({str(folder)!r}, dtype="float32").save_pretrained({str(tmp_path / "saved")!r})
try:
    import kvembed.sentence_transformer
except InputError as error:
    sys.exit(0 if "kvembed[st]" in str(error) else str(error))
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert {path.name for path in folder.iterdir()} == {path.name for path in (tmp_path / "saved").iterdir()}
    for name in ("modules.json", "config_sentence_transformers.json", "kvembed.json", "model.safetensors"):
        assert (tmp_path / "saved" / name).read_bytes() == (folder / name).read_bytes(), name


@pytest.mark.filterwarnings("ignore")  # mteb's and its mock tasks' own
def test_mteb_gives_the_scores_of_our_own_encoder(folder, model, embedder):
    import mteb
    from mteb.mocks.mock_tasks.retrieval import MockRetrievalTask
    from mteb.mocks.mock_tasks.sts import MockSTSTask
    from mteb.models import SentenceTransformerEncoderWrapper

    wrapper = SentenceTransformerEncoderWrapper(str(folder), trust_remote_code=True, device="cpu")
    scores = []
    for encoder in (MtebEncoder(embedder), model, wrapper):
        found = mteb.evaluate(encoder, [MockSTSTask(), MockRetrievalTask()], cache=None, co2_tracker=False)
        scores.append([result.get_score() for result in found.task_results])
    np.testing.assert_allclose(scores, [scores[0]] * 3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # likewise
def test_mtebs_mock_run_passes(folder):
    from mteb.mocks.mock_run import mock_run
    from mteb.models import SentenceTransformerEncoderWrapper

    encoder = SentenceTransformerEncoderWrapper(str(folder), trust_remote_code=True, device="cpu")
    kinds = [type(result).__name__ for result in mock_run(encoder).task_results.values()]
    assert kinds.count("TaskResult") >= 25
    assert "TaskError" not in kinds


@pytest.mark.real
def test_the_default_model(smollm2, tmp_path):
    embedder = Embedder.from_model(*smollm2, method="prompt-eol", layers=[6, 7, 8, 9])
    embedder.save_pretrained(tmp_path / "saved")
    model = opened(tmp_path / "saved")
    texts = [*NOTICES[:8], "", "<|im_start|>user\nhi<|im_end|>"]
    same(model.encode(texts), embedder.encode(texts))
    same(model.encode_query(texts), embedder.encode_query(texts))
