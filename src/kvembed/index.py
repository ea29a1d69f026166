"""An index to search: documents with their vectors and words in a LanceDB table, and the model that made them.

    DIR/kvembed-index.json            which model and config made it; every other name follows from that
    DIR/documents-HASH.lance          the table
    DIR/transform-HASH.safetensors    what the config's transform was fitted to, if it has one
    DIR/_lock                         held by the process that writes

HASH is of all that decides the vectors, so a table never holds vectors of two kinds.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from .config import EmbedConfig
from .documents import INDEX_FILE
from .errors import InputError, ModelNotFound
from .extras import import_extra
from .files import check_folder, exclusive_writer, json_hash, naming, user_path, why, write_json
from .hits import Hit, Mode, find, lancedb_reason
from .identity import first_difference, identity
from .indexing import Indexed, update
from .texts import composed

if TYPE_CHECKING:
    from lancedb.table import Table

    from .documents import Corpus
    from .embedder import Embedder

__all__ = ["Index"]


class Index:
    """A folder with an index. Make one with `create`, or `open` one.

    Any number of processes may search while one writes; each search sees what was there when it began.

    Attributes:
        folder: where it is.
        model: name or path of the model.
        made_with: everything that decides the vectors, see `identity`.
    """

    def __init__(self, folder: Path, model: str, made_with: dict[str, Any], *, batch_tokens: int | None = None) -> None:
        """Prefer `create` or `open`."""
        self.folder, self.model, self.made_with, self._batch_tokens = folder, model, made_with, batch_tokens
        self._replaces = ""  # name of the index that this one is made to take the place of

    @staticmethod
    def exists(folder: str | os.PathLike[str]) -> bool:
        """Whether a folder holds an index."""
        return (user_path(folder) / INDEX_FILE).is_file()

    @classmethod
    def is_filled(cls, folder: str | os.PathLike[str]) -> bool:
        """Whether a folder holds an index into which something has been written; one without may be replaced."""
        return cls.exists(folder) and cls.open(folder).has_table

    @classmethod
    def open(
        cls, folder: str | os.PathLike[str], *, model: str | None = None, batch_tokens: int | None = None
    ) -> Index:
        """Open an index; its model is loaded when the first text is embedded.

        Args:
            folder: that `create` made.
            model: where the model is now, if no longer where it was.
            batch_tokens: as in `Embedder.from_pretrained`.

        Raises:
            InputError: no index there, or a damaged one.
        """
        import_extra("lancedb", "search")
        path = user_path(folder)
        try:
            stored = json.loads((path / INDEX_FILE).read_text())
            made_with, name = stored["made_with"], stored["model"]
            if not isinstance(name, str) or not isinstance(made_with, dict):
                raise TypeError("its parts are of other types")
            EmbedConfig.from_dict(made_with["config"])
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(f"{path}: no index here; `kvembed index PATH --db {path}` makes one") from None
        except OSError as error:
            raise InputError(f"{path}: {why(error)}") from None
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path / INDEX_FILE} is not of an index of kvembed: {error}") from None
        return cls(path, model or name, made_with, batch_tokens=batch_tokens)

    @classmethod
    def create(
        cls, folder: str | os.PathLike[str], embedder: Embedder, *, model: str = "smollm2", refit: bool = False
    ) -> Index:
        """Make an index, or open the one that is there.

        Args:
            folder: new, empty, or with an index.
            embedder: makes the vectors. If its config has a transform, fit it on the documents' texts
                (`Embedder.from_pretrained(..., texts=corpus.calibration())`): it is kept with the index.
            model: the name that the embedder's model was loaded by, to load it again.
            refit: let the index become that of this embedder, whatever it was before: the next `update` embeds all
                documents anew, and what is there can be searched until that is done.

        Raises:
            InputError: the folder holds something else, or an index with another model or config; another process is
                writing to it.
        """
        from .models import local_path

        cls.check_folder(folder)
        path = user_path(folder)
        local = local_path(model)
        name = model if local is None else os.path.abspath(local)
        index = cls(path, name, identity(embedder))
        index.__dict__["embedder"] = embedder
        if not refit and cls.is_filled(path):
            if apart := first_difference(cls.open(path).made_with, index.made_with):
                raise InputError(f"{path} was made with {apart}; --refit embeds everything anew")
            return index
        with exclusive_writer(path), naming(path):
            if embedder.transform is not None:
                embedder.transform.save(index.transform_file)
            if cls.is_filled(path):
                index._replaces = index.current().name
            else:
                index.take_over()
        return index

    @property
    def config(self) -> EmbedConfig:
        """What was done to a text to make its vector."""
        return EmbedConfig.from_dict(self.made_with["config"])

    @property
    def name(self) -> str:
        """The table's name."""
        return f"documents-{self._hash}"

    @property
    def transform_file(self) -> Path:
        """Where the transform is kept, if there is one."""
        return self.folder / f"transform-{self._hash}.safetensors"

    @functools.cached_property
    def _hash(self) -> str:
        return json_hash(self.made_with)

    def check_options(self, *, dtype: str | None = None, fitted: Path | None = None, **fields: Any) -> None:
        """Whether the index was made as one with these options would be.

        Args:
            dtype, fitted: as in `Embedder.from_pretrained`; None: not looked at.
            fields: of `EmbedConfig`, those that are to be looked at.

        Raises:
            InputError: it was not.
        """
        from .transform import Transform

        config = self.config.replace(**fields)
        if config.layers is None or config.layers == "all":  # by the model
            plain = self.embedder.replace(layers=config.layers, transform="none", dim=None, more_readouts=())
            config = config.replace(layers=plain.config.layers)
        wanted = {"dtype": dtype or self.made_with["dtype"], "config": config.to_dict()}
        if fitted is not None:
            wanted["transform"] = Transform.load(fitted).digest()
        if apart := first_difference(self.made_with, wanted):
            raise InputError(f"{self.folder} was made with {apart}; --refit embeds everything anew")

    @staticmethod
    def check_folder(folder: str | os.PathLike[str]) -> None:
        """Fail before a model is loaded. Raises `InputError` for a folder that can't become an index."""
        import_extra("lancedb", "search")
        check_folder(user_path(folder), "index", INDEX_FILE, ("documents-", "transform-", ".transform-"))

    def check_covered(self, corpus: Corpus) -> None:
        """What is embedded anew is read anew. Raises `InputError` if a document is from none of the corpus's paths."""
        if not self.has_table:
            return
        for batch in self.table.search().select(["file"]).to_batches():
            for file in set(batch["file"].to_pylist()):
                if not corpus.holds(file):
                    raise InputError(f"{self.folder} also has documents from {file}; to embed all anew, name all paths")

    def current(self) -> Index:
        """What the folder's index is: this one, or the one that it will replace."""
        return Index.open(self.folder)

    def check_current(self) -> None:
        """Raises `InputError` if another index has taken this one's place since it was opened or made."""
        if self.current().name not in (self.name, self._replaces):
            raise InputError(f"{self.folder}: --refit has replaced this index; open it again")

    def take_over(self) -> None:
        """Make this the folder's index, if it is not."""
        from . import __version__

        # It is gone if the index that this one replaces was updated in the meantime.
        lost = self.made_with["transform"] is not None and not self.transform_file.exists()
        if lost and (transform := self.embedder.transform) is not None:
            transform.save(self.transform_file)

        if self.exists(self.folder) and self.current().name == self.name:
            return
        content = {"kvembed": __version__, "model": self.model, "made_with": self.made_with}
        write_json(self.folder / INDEX_FILE, content)

    def drop_others(self) -> None:
        """Remove tables and transforms that are neither this index's nor the folder's present one's."""
        kept = {one.name: one.transform_file for one in (self, self.current())}
        for path in self.folder.glob("documents-*.lance"):
            if path.stem not in kept:
                self.connection.drop_table(path.stem)
        for path in self.folder.glob("transform-*.safetensors"):
            if path not in kept.values():
                path.unlink()

    def check_model(self) -> None:
        """Load the model, if it isn't. Raises as `embedder`."""
        _ = self.embedder

    @functools.cached_property
    def embedder(self) -> Embedder:
        """The model and config that made the index, loaded when first needed.

        Raises:
            InputError: the model or its tokenizer is another, or the transform, than what the index was made with.
            ModelNotFound: the model is not where it was.
        """
        from . import models
        from .embedder import Embedder
        from .transform import Transform

        stored = self.made_with
        try:
            model, tokenizer = models.load(self.model, dtype=stored["dtype"])
        except ModelNotFound as error:
            raise ModelNotFound(f"{error} (--model says where the index's model is now)") from None
        transform = None
        if stored["transform"] is not None:
            if not self.transform_file.exists():
                self.check_current()
            transform = Transform.load(self.transform_file)
        another = (
            f"{self.folder} was made with other weights, or another tokenizer, than those of {self.model}: name the "
            "model that made it, or embed everything anew with this one (kvembed index --refit)"
        )
        try:
            embedder = Embedder(model, tokenizer, self.config, batch_tokens=self._batch_tokens, transform=transform)
        except InputError as error:  # what was right for the model that made the index
            raise InputError(another) from error
        if embedder.fingerprint() != stored.get("fingerprint"):  # indexes of earlier versions have none
            raise InputError(another)
        if apart := first_difference(stored, identity(embedder, anew=False)):
            raise InputError(f"{self.folder} was made with {apart}")
        return embedder

    @functools.cached_property
    def connection(self) -> Any:
        """LanceDB's."""
        return import_extra("lancedb", "search").connect(self.folder)

    @property
    def table(self) -> Table:
        """LanceDB's table as it is now, whatever is written to it later.

        Raises:
            InputError: nothing has been written yet, or it is damaged.
        """
        if not self.has_table:
            self.check_current()
            raise InputError(f"{self.folder}: nothing has been indexed yet")
        try:
            table: Table = self.connection.open_table(self.name)
        except (ValueError, RuntimeError, OSError) as error:
            raise InputError(
                f"{self.folder}: the index is damaged ({lancedb_reason(error)}); make it anew with `kvembed index` in "
                "another folder"
            ) from None
        return table

    @property
    def has_table(self) -> bool:
        """Whether anything has been written."""
        table = self.folder / f"{self.name}.lance"  # a run that was stopped may leave a folder with neither
        return any(table.glob("_versions/*.manifest")) or any(table.glob("data/*"))

    def __len__(self) -> int:
        """Number of documents."""
        return int(self.table.count_rows())

    def update(self, corpus: Corpus, *, language: str | None = None, progress: bool = False) -> Indexed:
        """Bring the documents of the corpus's paths up to date; those of other paths stay.

        What has changed is embedded, what is gone is removed, and a document whose text is known keeps its vector. A
        stopped update, made again, goes on where it was.

        Args:
            corpus: what is in the paths now.
            language: whose stems full-text search knows (LanceDB's names), or `"none"`. Default: as it
                was, English at first.
            progress: show a bar on a terminal.

        Raises:
            InputError: nothing to index, another process is writing, a full disk. What is done is kept.
        """
        with exclusive_writer(self.folder):
            return update(self, corpus, language=language, progress=progress)

    def search(self, query: str, *, top: int = 10, mode: Mode = "hybrid", where: str | None = None) -> list[Hit]:
        """The documents nearest to a query, best first. Arguments and errors as in `search_many`."""
        return self.search_many([query], top=top, mode=mode, where=where)[0]

    def search_many(
        self, queries: Sequence[str], *, top: int = 10, mode: Mode = "hybrid", where: str | None = None
    ) -> list[list[Hit]]:
        """The documents nearest to each query, best first.

        Args:
            queries: at least a letter each.
            top: how many documents.
            mode: `"vector"`: by the cosine of all vectors, not of a choice; `"text"`: by words (BM25), which needs no
                model; `"hybrid"`: both rankings, put together by reciprocal rank fusion.
            where: a condition that documents must fulfil, in SQL over their fields: `"lang = 'de' AND year > 2020"`.

        Raises:
            InputError: an empty query, no such mode, or a condition that is not one.
        """
        if mode not in get_args(Mode):
            raise InputError(f"mode must be one of {', '.join(get_args(Mode))}, not {mode!r}")
        for number, query in enumerate(queries, 1):
            if not isinstance(query, str):
                raise InputError(f"query {number} is a {type(query).__name__}, not a string")
            if not query.strip():
                raise InputError(f"query {number} is empty" if len(queries) > 1 else "the query is empty")
        if top < 1:
            raise InputError(f"top must be a whole number from 1, not {top!r}")
        queries = [*map(composed, queries)]  # as texts are
        vectors: Any = [None] * len(queries) if mode == "text" else self.embedder.encode_query(queries)
        table = self.table  # one version for both searches of a hybrid one, or a document could be in it twice
        top = min(top, table.count_rows() + 1)  # LanceDB counts in 32 bits
        return [find(table, *one, top, mode, where) for one in zip(queries, vectors, strict=True)]
