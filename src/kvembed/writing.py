"""Text that a model writes itself: calibration data for any model, with nothing else at hand."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from .errors import InputError
from .files import store

__all__ = ["write_texts"]

logger = logging.getLogger(__name__)


def write_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    count: int = 1000,
    tokens: int = 32,
    seed: int = 0,
    batch: int = 100,
    cache: Path | None = None,
    progress: bool = False,
) -> list[str]:
    """Let the model write short texts from its BOS token alone, by plain sampling (temperature 1, nothing cut off).

    Args:
        model: with a language-modelling head.
        tokenizer: has a BOS (or else EOS) token.
        count: how many texts; distinct, each of more than one word.
        tokens: the longest text, in tokens.
        seed: the same seed on the same machine and dtype gives the same texts; torch's own generator is left as it was.
        batch: texts sampled at once.
        cache: file to keep them in, and to read them from if it is there.
        progress: show a bar on a terminal.

    Returns:
        `count` texts; an end-of-text token ends a text.

    Raises:
        InputError: the model has no head, or writes too few distinct texts.
    """
    if cache is not None and cache.is_file():
        try:
            return list(json.loads(cache.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            logger.warning("ignoring the damaged texts in %s: %s", cache, error)
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if model.get_output_embeddings() is None or start is None:
        raise InputError(
            f"{type(model).__name__} can't write calibration texts itself (no language-modelling head or no BOS "
            "token); give layers=..., or calibration texts"
        )
    ends = [token for token in {tokenizer.eos_token_id, tokenizer.pad_token_id, start} if token is not None]
    sampling = GenerationConfig(
        do_sample=True,
        top_k=0,
        top_p=1.0,
        temperature=1.0,
        max_new_tokens=tokens,
        eos_token_id=ends,
        pad_token_id=ends[0],
    )
    texts: dict[str, None] = {}
    prompt = torch.full((batch, 1), start, device=model.device)
    with (
        torch.random.fork_rng(devices=[] if model.device.type == "cpu" else [model.device]),
        tqdm(total=count, desc="writing texts", unit="text", disable=None if progress else True) as bar,
        _own_sampling(model),
    ):
        torch.manual_seed(seed)
        for _ in range(3 * count // batch + 3):
            rows = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=sampling)
            for text in tokenizer.batch_decode(rows[:, 1:], skip_special_tokens=True):
                text = text.strip().rstrip("\ufffd")  # half a character, cut off by the length limit
                if len(text.split()) > 1 or len(text) > 12:  # some languages use no spaces
                    texts[text] = None
            bar.update(min(len(texts), count) - bar.n)
            if len(texts) >= count:
                written = list(texts)[:count]
                if cache is not None:
                    store(cache, json.dumps(written, indent=0, ensure_ascii=False), "the texts")
                return written
    raise InputError(
        f"{type(model).__name__} wrote only {len(texts)} distinct texts; give layers=..., or calibration texts"
    )


@contextlib.contextmanager
def _own_sampling(model: PreTrainedModel) -> Iterator[None]:
    """Without the model's own generation settings, which would fill in whatever ours leave open."""
    theirs = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = theirs
