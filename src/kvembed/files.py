"""Files: where they are kept, written whole or not at all, checked before the work, and what went wrong with them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from filelock import FileLock, Timeout
from platformdirs import user_cache_path

from .errors import InputError, KvembedError

__all__ = [
    "atomic_write",
    "cache_folder",
    "check_folder",
    "check_writable",
    "default_file_mode",
    "exclusive_writer",
    "json_hash",
    "naming",
    "raise_named",
    "sha256_of",
    "store",
    "user_path",
    "why",
    "write_json",
]

logger = logging.getLogger(__name__)

_UMASK = threading.Lock()  # the process has one for all threads
_LOCK = "_lock"  # readers of folders of Parquet pass over names that begin with "_" or "."


def user_path(path: str | os.PathLike[str]) -> Path:
    """A path as a user gives it: `~` is their home."""
    return Path(os.path.expanduser(path))  # pathlib's raises for ~nobody


def cache_folder() -> Path:
    """Where all that was made once is kept (converted models, profiles, fits): `$KVEMBED_CACHE`, or the user's."""
    return Path(os.environ.get("KVEMBED_CACHE") or user_cache_path("kvembed"))


@contextlib.contextmanager
def naming(place: object) -> Iterator[None]:
    """Turns an `OSError` that is raised inside into an `InputError` that names `place`."""
    try:
        yield
    except (KvembedError, BrokenPipeError):  # a model that is not found is an OSError too, and has its own words
        raise
    except OSError as error:
        raise InputError(f"{place}: {why(error)}") from None


def check_writable(path: Path) -> None:
    """Raises `InputError` for a folder, pipe or device, or a file in a folder that isn't there or can't be written."""
    if os.path.isdir(path):  # Path's own raises for a name that is too long
        raise InputError(f"{path}: is a folder")
    if os.path.exists(path) and not os.path.isfile(path):  # a file would take its place
        raise InputError(f"{path}: is a pipe or a device, not a file")
    if not os.path.isdir(path.parent):
        raise InputError(f"{path}: the folder {path.parent} does not exist")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"{path}: the folder {path.parent} can't be written to")


def raise_named(error: OSError) -> NoReturn:
    """For `os.walk`, which would pass over what it can't read. Raises `InputError` that names it."""
    raise InputError(f"{error.filename}: {why(error)}") from None


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes its name only when the block ends well: whole or not at all.

    A file that is there before hands its permissions on; of a link, it is what it leads to.
    """
    path = Path(os.path.realpath(path))
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:50]}.")  # with a long name: too long
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # or a power cut could leave the name without the content
        os.chmod(name, path.stat().st_mode & 0o777 if path.exists() else default_file_mode())  # mkstemp's are private
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def default_file_mode() -> int:
    """The permissions of a new file, as the user's umask has them."""
    with _UMASK:
        umask = os.umask(0o077)  # to set it is how to read it; what others make now is private, not open
        os.umask(umask)
    return 0o666 & ~umask


def write_json(path: Path, content: Any) -> None:
    """Write JSON that people can read, whole or not at all."""
    with atomic_write(path) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())


def check_folder(folder: Path, what: str, marker: str, ours: tuple[str, ...]) -> None:
    """Fail before the work. Raises `InputError` if a folder can't become ours.

    Args:
        folder: may be new, or hold `what`.
        what: for people.
        marker: the file that says that the folder is ours.
        ours: how the names of our other files begin, which a stopped run may have left without the marker.
    """
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise InputError(f"{folder} is a file, not a folder")
    if os.path.isdir(folder) and not os.path.exists(folder / marker):
        ours = (_LOCK, f".{marker}", *ours)
        if others := sorted(path.name for path in folder.iterdir() if not path.name.startswith(ours)):
            raise InputError(f"{folder} holds no {what} but other files ({others[0]}); give a new or empty folder")


@contextlib.contextmanager
def exclusive_writer(folder: Path) -> Iterator[None]:
    """A folder, made if need be, held by a file in it. Raises `InputError` if another process holds it."""
    with naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
        held = FileLock(folder / _LOCK)
        try:
            held.acquire(timeout=0)
        except Timeout:
            raise InputError(f"{folder}: another process is writing to it") from None
    try:
        yield
    finally:
        held.release()


def store(path: Path, text: str, what: str) -> bool:
    """Put `text` into a cache, folders and all; a cache that can't be written is a warning, not an error.

    Returns whether it could.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(text.encode())
    except OSError as error:
        logger.warning("%s could not be stored in %s: %s", what, path.parent, error)
        return False
    return True


def json_hash(value: Any) -> str:
    """16 hex digits of anything in plain JSON types."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def why(error: OSError) -> str:
    """What went wrong, without errno and path: `no such file or directory`."""
    return (error.strerror or str(error)).lower()
