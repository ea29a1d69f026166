"""The folder of a saved embedder: model and tokenizer, what is done to a text, and what sentence-transformers reads."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoTokenizer, PreTrainedModel

from .config import EmbedConfig
from .errors import InputError
from .files import default_file_mode, naming, user_path, write_json
from .fingerprint import COMPILED, staying_packed, tokenizer_told
from .models import BUNDLED, bars_off, hub_file, local_path
from .probe import has_adapter
from .prompts import Prompter
from .transform import Transform

if TYPE_CHECKING:
    from .embedder import Embedder

__all__ = [
    "CONFIG_FILE",
    "PROMPTS",
    "TRANSFORM_FILE",
    "default_method",
    "save_embedder",
    "save_st_files",
    "saved_config",
    "saved_transform",
]

logger = logging.getLogger(__name__)

CONFIG_FILE = "kvembed.json"
TRANSFORM_FILE = "kvembed.safetensors"
_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
# What transformers would read beside what is written now: other weights, an adapter on top, another's tokens.
_OTHERS = (
    *("model.safetensors.index.json", "pytorch_model.bin.index.json", "adapter_config.json", "adapter_model*"),
    *("added_tokens.json", "special_tokens_map.json"),
)

# A sentence-transformers prompt is a prefix; ours only names a role, whose template is in the config.
PROMPTS = {"query": "query", "document": "document"}
_ST_FILES: dict[str, Any] = {
    "config_sentence_transformers.json": {
        "model_type": "SentenceTransformer",
        "prompts": PROMPTS,
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
    },
    "modules.json": [{"idx": 0, "name": "0", "path": "", "type": "kvembed.sentence_transformer.EmbedderModule"}],
}


def saved_config(model: str) -> EmbedConfig | None:
    """The config that was saved with a model; None if none was.

    Args:
        model: as in `models.load`.

    Raises:
        InputError: it is damaged.
        ModelNotFound: no such model.
    """
    path = _beside(model, CONFIG_FILE)
    return None if path is None else EmbedConfig.read(path)


def saved_transform(model: str) -> Transform | None:
    """The transform that was saved with a model; None if none was. Arguments and errors as in `saved_config`."""
    path = _beside(model, TRANSFORM_FILE)
    return None if path is None else Transform.load(path)


def _beside(model: str, file: str) -> Path | None:
    folder = local_path(model)
    if folder is None:
        return None if model in BUNDLED else hub_file(model, file)
    return folder / file if (folder / file).is_file() else None


def default_method(model: str) -> str | None:
    """The method of the command line and the server where none is named: `auto`, or (None) the one saved with it."""
    return "auto" if saved_config(model) is None else None


def save_embedder(folder: str | os.PathLike[str], embedder: Embedder) -> None:
    """Write what `Embedder.from_pretrained` opens. Each file appears whole or not at all, the config last.

    A transform is bound to the model as it is now, so that what is opened gives the same vectors.

    Args:
        folder: made if missing; what else is in it stays, but for another model's parts.
        embedder: its model, tokenizer, config and transform are written.

    Raises:
        InputError: `folder` is a file, or transformers would not open the model or tokenizer as it is now.
    """
    target, model, transform = user_path(folder), embedder.model, embedder.transform
    if not os.fspath(folder):
        raise InputError("the folder's name is empty")
    if not isinstance(model, PreTrainedModel):
        raise InputError(
            f"a {type(model).__name__} can't be saved, only a plain transformers model: unwrap it first (an adapter by "
            "merge_and_unload(), a compiled model is model._orig_mod)"
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise InputError("transformers saves an attached adapter alone: load it with peft and merge_and_unload() first")
    if any(map(has_adapter, model.modules())):
        raise InputError("the model has an adapter in it, which transformers would not open again: merge it first")
    if any(COMPILED in name for name, _ in model.named_parameters()):
        raise InputError(
            "layers of the model are compiled, so transformers would not open it again: save the plain one"
        )
    if type(model.config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise InputError(
            f"transformers opens no {type(model).__name__} as a language model by name, so it can't be saved: keep the "
            "model, and embedder.transform.save() for the fit"
        )
    if target.exists() and not target.is_dir():
        raise InputError(f"{target} is a file, not a folder")
    with naming(target):
        target.mkdir(parents=True, exist_ok=True)
        # Inside, since the parent may be another file system, or not ours to write to.
        with tempfile.TemporaryDirectory(prefix=".tmp", dir=target) as scratch:
            try:
                with bars_off(), staying_packed(model):
                    model.save_pretrained(scratch)
            except (AttributeError, NotImplementedError, RuntimeError, SafetensorError, TypeError, ValueError) as error:
                raise InputError(f"transformers can't save this model: {error}") from error
            embedder.tokenizer.save_pretrained(scratch)
            _check_opens(Path(scratch), embedder)
            # What was saved here before goes first: of two sets of weights the old one might be opened, and a stop on
            # the way must not leave an old config beside new weights.
            for old in (target / CONFIG_FILE, *(x for kind in (*_WEIGHTS, *_OTHERS) for x in target.glob(kind))):
                old.unlink(missing_ok=True)
            for path in Path(scratch).iterdir():
                if path.is_dir():
                    shutil.copytree(path, target / path.name, dirs_exist_ok=True)
                else:
                    path.chmod(default_file_mode())  # the weights' file is private otherwise
                    os.replace(path, target / path.name)
        if transform is None:
            (target / TRANSFORM_FILE).unlink(missing_ok=True)  # another method's, saved here before
        else:
            fingerprint = embedder.fingerprint(anew=True)
            if transform.info.get("fingerprint") != fingerprint:
                logger.warning(
                    "the model is not as it was when its transform was fitted (cast to float16, or trained); both are "
                    "saved as they are"
                )
            transform.bound_to(fingerprint).save(target / TRANSFORM_FILE)
        write_json(target / CONFIG_FILE, embedder.config.to_dict())


def _check_opens(written: Path, embedder: Embedder) -> None:
    """Raises `InputError` for a folder without weights, or with a tokenizer that is opened as another."""
    if not any(path for kind in _WEIGHTS for path in written.glob(kind)):
        raise InputError("transformers writes no weights of this model")
    try:
        tokenizer = AutoTokenizer.from_pretrained(written)
    except (AttributeError, ImportError, KeyError, OSError, TypeError, ValueError) as error:
        raise InputError(f"transformers can't open the tokenizer that it saved: {error}") from error
    if tokenizer_told(Prompter(tokenizer)) != tokenizer_told(Prompter(embedder.tokenizer)):
        raise InputError(
            f"transformers opens the tokenizer of a {embedder.model.config.model_type} as {type(tokenizer).__name__}, "
            "which makes other tokens of a text than yours, so it can't be saved"
        )


def save_st_files(folder: str | os.PathLike[str]) -> None:
    """Write what `SentenceTransformer(folder)` reads first; sentence-transformers itself is not needed for it."""
    with naming(folder):
        for name, content in _ST_FILES.items():
            write_json(user_path(folder) / name, content)
