"""Text that a model writes itself: calibration data for any model, with nothing else at hand."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import logging
import os
import threading
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from .bars import Bar
from .errors import InputError, not_finite
from .files import cache_folder, store
from .longrope import alone
from .probe import decoder_of

__all__ = ["SEED", "SELF_WRITTEN", "can_write", "generated_texts", "texts_digest", "write_texts"]

logger = logging.getLogger(__name__)

SELF_WRITTEN = "self-written"  # where texts came from, in profiles and transforms; the other is "given"
SEED = 0
_TOKENS = 32  # the longest text
_one_at_a_time = threading.Lock()  # all draw from torch's one generator; who waits finds the texts in the cache


def generated_texts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, fingerprint: str, count: int, *, progress: bool = False
) -> list[str]:
    """Short texts that the model wrote itself: from the cache, or written now and kept there.

    The default model's come with the package.

    Args:
        model, tokenizer, count, progress: as in `write_texts`.
        fingerprint: of the model.

    Raises:
        InputError: as in `write_texts`.
    """
    name = f"{fingerprint}-{SEED}.json"
    if (shipped := files("kvembed") / "calibration" / name).is_file():
        return list(json.loads(shipped.read_text(encoding="utf-8")))[:count]
    keep = cache_folder() / "texts" / name
    with _one_at_a_time:
        return write_texts(model, tokenizer, count=count, seed=SEED, cache=keep, progress=progress)


def texts_digest(texts: Sequence[str]) -> str:
    """SHA-256 of the texts, joined by newlines, in hex."""
    return hashlib.sha256("\n".join(texts).encode("utf-8", "surrogatepass")).hexdigest()


def can_write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the model can write: it has a head, which was not drawn at random, and a token to begin with."""
    has_head = model.get_output_embeddings() is not None and not getattr(model, "kvembed_head_is_random", False)
    return has_head and _start(tokenizer) is not None


def _start(tokenizer: PreTrainedTokenizerBase) -> int | None:
    token: int | None = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return token


def write_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    count: int = 1000,
    seed: int = 0,
    batch: int = 100,
    cache: Path | None = None,
    progress: bool = False,
) -> list[str]:
    """Let the model write short texts from its BOS token alone, by plain sampling (temperature 1, nothing cut off).

    Args:
        model: with a language-modelling head.
        tokenizer: has a BOS (or else EOS) token.
        count: how many texts; distinct, each of more than one word or of more than 12 characters. More begin with
            the same ones as fewer.
        seed: the same seed on the same machine and dtype gives the same texts; torch's own generator is left as it was.
        batch: texts sampled at once.
        cache: file to keep them in, and to read them from if it is there. Beside it, on a CPU, how far the writing has
            come: a run that is stopped goes on from there, and so does one that wants more, as if all were written now.
        progress: show a bar on a terminal.

    Returns:
        `count` texts; an end-of-text token ends a text.

    Raises:
        InputError: the model has no head, or writes too few distinct texts.
        KvembedError: its states are not finite.
    """
    start = _start(tokenizer)
    if start is None or not can_write(model, tokenizer):  # whatever another with the same layers wrote
        raise InputError(
            f"{type(model).__name__} can't write calibration texts itself (no language-modelling head or no BOS "
            "token): give calibration texts, or layers=... and no method with a transform"
        )
    if cache is not None and os.path.isfile(cache):  # Path.is_file raises for a folder that can't be entered
        try:
            if len(kept := list(json.loads(cache.read_text(encoding="utf-8")))) >= count:
                return kept[:count]
        except (OSError, ValueError) as error:
            logger.warning("ignoring the texts in %s, which can't be read: %s", cache, error)
    # Where no bar is shown, minutes without a word would be a riddle.
    level = logging.INFO if progress else logging.WARNING
    logger.log(level, "%s writes %s short texts, once; on a CPU that takes minutes", type(model).__name__, f"{count:,}")
    ends = [token for token in {tokenizer.eos_token_id, tokenizer.pad_token_id, start} if token is not None]
    sampling = GenerationConfig(
        do_sample=True,
        top_k=0,
        top_p=1.0,
        temperature=1.0,
        max_new_tokens=_TOKENS,
        eos_token_id=ends,
        pad_token_id=ends[0],
    )
    # A copy that shares all layers, without the model's own settings, which would fill in whatever ours leave open.
    # Below peft's wrapper, which hands its settings on to the model in it for good.
    writer = copy.copy(getattr(model, "get_base_model", lambda: model)())
    writer.generation_config = GenerationConfig()
    decoder = decoder_of(model)
    texts: dict[str, None] = {}
    device = model.device
    prompt = torch.full((batch, 1), start, device=device)
    gpus = 0 if device.type == "cpu" else torch.get_device_module(device).device_count()
    devices = [torch.device(device.type, index) for index in range(gpus)]
    with (
        torch.random.fork_rng(devices, device_type=device.type),
        torch.autocast(device.type, enabled=False),  # a caller's
        Bar(total=count, desc="writing texts", unit="text", progress=progress) as bar,
    ):
        # On a CPU torch.manual_seed would begin anew on all GPUs too, which are not kept then.
        (torch.default_generator.manual_seed if device.type == "cpu" else torch.manual_seed)(seed)
        part = cache.with_suffix(".part") if cache is not None and device.type == "cpu" else None
        asked = f"{_TOKENS} {seed} {batch}"
        turn = _resume(part, asked, texts) if part else 0
        bar.update(min(len(texts), count))
        while len(texts) < count and turn < 3 * count // batch + 3:
            try:
                with alone(decoder):
                    rows = writer.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=sampling)
            except RuntimeError as error:
                if "probability tensor" not in str(error):
                    raise
                raise not_finite(str(model.dtype).removeprefix("torch.")) from None
            for text in tokenizer.batch_decode(rows[:, 1:], skip_special_tokens=True):
                text = text.strip().rstrip("\ufffd")  # half a character, cut off by the length limit
                if len(text.split()) > 1 or len(text) > 12:  # some languages use no spaces
                    texts[text] = None
            bar.update(min(len(texts), count) - bar.n)
            turn += 1
            if part:
                state = base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode()
                left = json.dumps({"asked": asked, "turn": turn, "rng": state, "texts": [*texts]})
                if not store(part, left, "the texts"):
                    cache = part = None  # told once
    if len(texts) < count:
        raise InputError(
            f"{type(model).__name__} wrote only {len(texts)} distinct texts: give calibration texts, or layers=... "
            "and no method with a transform"
        )
    written = list(texts)[:count]
    if cache is not None:
        store(cache, json.dumps(written, indent=0, ensure_ascii=False), "the texts")
    return written


def _resume(part: Path, asked: str, texts: dict[str, None]) -> int:
    """Take over what an earlier run left: its texts and torch's generator. Returns how many batches it wrote."""
    try:
        left = json.loads(part.read_text(encoding="utf-8"))
        if left["asked"] != asked:
            return 0
        torch.set_rng_state(torch.frombuffer(bytearray(base64.b64decode(left["rng"])), dtype=torch.uint8))
        texts |= dict.fromkeys(left["texts"])
        return int(left["turn"])
    except (FileNotFoundError, NotADirectoryError):
        return 0
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        logger.warning("ignoring the texts in %s, which can't be read: %s", part, error)
        return 0
