"""mteb's own conformance test, and which role its prompts get."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from kvembed import Embedder, InputError
from kvembed.mteb_encoder import MtebEncoder, run_mteb

pytestmark = pytest.mark.filterwarnings("ignore")  # mteb's and its mock tasks' own


@pytest.fixture
def encoder(llama, tokenizer):
    return MtebEncoder(Embedder.from_model(llama, tokenizer, method="kv", layers=(1, 2), max_tokens=64), "a/tiny")


def test_mtebs_mock_run_passes(encoder):
    from mteb.mocks.mock_run import mock_run
    from mteb.models.models_protocols import EncoderProtocol

    assert isinstance(encoder, EncoderProtocol)
    results = mock_run(encoder).task_results
    kinds = [type(result).__name__ for result in results.values()]
    assert kinds.count("TaskResult") >= 25
    assert "TaskError" not in kinds


def test_roles(encoder):
    from mteb.types import PromptType

    batches = [{"text": ["one", "two"]}, {"text": ["three"]}]
    texts = ["one", "two", "three"]
    for prompt_type, role in ((PromptType.query, "query"), (PromptType.document, "document"), (None, "document")):
        vectors = encoder.encode(batches, task_metadata=None, hf_split="", hf_subset="", prompt_type=prompt_type)
        assert np.array_equal(vectors, encoder.embedder.encode(texts, role=role))
    cosine = encoder.similarity(vectors, vectors).numpy()
    np.testing.assert_allclose(cosine, encoder.embedder.similarity(vectors, vectors), atol=1e-6)
    np.testing.assert_allclose(encoder.similarity_pairwise(vectors, vectors).numpy(), 1, atol=1e-6)


def test_results_of_two_configs_do_not_collide(encoder, llama, tokenizer):
    other = MtebEncoder(Embedder.from_model(llama, tokenizer, method="mean"), "a/tiny")
    assert encoder.mteb_model_meta.name == other.mteb_model_meta.name == "kvembed/a--tiny"
    assert encoder.mteb_model_meta.experiment_kwargs != other.mteb_model_meta.experiment_kwargs


def test_results_of_two_fits_or_dtypes_do_not_collide(llama, tokenizer):
    texts = [f"text {number}" for number in range(150)]
    fits = [Embedder.from_model(llama, tokenizer, method="static", texts=texts[:count]) for count in (100, 150)]
    rounded = Embedder.from_model(copy.deepcopy(llama).bfloat16(), tokenizer, method="mean")
    exact = Embedder.from_model(llama, tokenizer, method="mean")
    for one, other in (fits, (exact, rounded)):
        assert one.config == other.config
        told = [MtebEncoder(each).mteb_model_meta.experiment_kwargs for each in (one, other)]
        assert told[0] != told[1]


def test_no_such_task(encoder):
    with pytest.raises(InputError, match=r"MTEB knows no such task: .*NoSuchTask.*; mteb.get_tasks"):
        run_mteb(encoder.embedder, "x", ["NoSuchTask"])
