"""Writing an index: what has changed is embedded and committed every few seconds, so that a stop loses seconds."""

from __future__ import annotations

import dataclasses
import datetime
import logging
import os
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from .bars import Bar
from .documents import Corpus, Document, Kind, Place, check_same, converted, joint_kind
from .errors import InputError, KvembedError
from .extras import import_extra
from .files import naming
from .hits import lancedb_reason
from .self_written import SELF_WRITTEN
from .transform import LEAST_TEXTS

if TYPE_CHECKING:
    import pyarrow as pa
    from lancedb.table import Table

    from .index import Index

__all__ = ["Indexed", "check_language", "update"]

logger = logging.getLogger(__name__)

_COMMIT_SECONDS = 20.0
_BLOCK_CHARACTERS, _BLOCK_DOCUMENTS = 100_000, 1000  # embedded, at most, between two looks at the clock
_FIRST_CHARACTERS = 4_000  # embedded before the pace is known
_COMMIT_DOCUMENTS = 10_000
_KEEP = datetime.timedelta(hours=1)  # old versions, for whoever is reading one


@dataclasses.dataclass(frozen=True)
class Indexed:
    """What `Index.update` did.

    Attributes:
        documents: in the index now.
        embedded: texts that were embedded.
        changed: documents whose text was known: at another place, or with other fields, or another's copy.
        unchanged: documents that were left as they were.
        removed: documents that are gone.
        cut: of those embedded, how many were cut to `max_tokens`.
        duplicates: left out, being there once already.
        empty: left out, without text.
        files: that were read.
        passed_over: ending or reason -> how many files were not read for it.
        dim: length of a vector.
        max_tokens: the embedder's.
    """

    documents: int
    embedded: int
    changed: int
    unchanged: int
    removed: int
    cut: int
    duplicates: int
    empty: int
    files: int
    passed_over: dict[str, int]
    dim: int
    max_tokens: int


def update(index: Index, corpus: Corpus, *, language: str | None, progress: bool) -> Indexed:
    """See `Index.update`; the caller holds the lock."""
    check_language(language)
    with naming(index.folder):
        try:
            return _Writer(index, corpus).run(language, progress)
        except RuntimeError as error:  # LanceDB's, for what goes wrong below it
            raise InputError(f"{index.folder}: {lancedb_reason(error)}") from None


class _Writer:
    def __init__(self, index: Index, corpus: Corpus) -> None:
        self._index, self._corpus = index, corpus
        self._arrow = import_extra("pyarrow", "search")
        self._stale: dict[str, list[str]] = defaultdict(list)  # file -> content of documents that are gone
        self._texts: set[str] = set()  # hashes of texts whose vectors the table has
        self._left: Counter[str] = Counter()  # file -> documents that are not written yet
        self._waiting: list[tuple[Document, Any, int]] = []  # document, vector, tokens cut
        self._committed = time.monotonic()
        self._embedded = self._cut = 0
        self._pace: float = _FIRST_CHARACTERS  # characters that take about half the time between two commits

    def run(self, language: str | None, progress: bool) -> Indexed:
        corpus, index = self._corpus, self._index
        index.check_current()
        before = index.current()
        if before.name != index.name:
            before.check_covered(corpus)
        if not index.has_table:
            corpus.check_not_empty()
        index.drop_others()
        self._table, self._kinds = self._opened(language, before)
        there = self._there()
        files = {x.file for x in there.values()} if corpus.gone else set()
        for root in corpus.gone:
            if root not in files and not any(file.startswith(root + os.sep) for file in files):
                raise InputError(f"{root}: no such file or folder, and {index.folder} has nothing from it")
        todo = {key: place for key, place in corpus.documents.items() if self._is_new(key, place, there.get(key))}
        gone = {
            key: x
            for key, x in there.items()
            if key not in corpus.documents and corpus.holds(x.file) and x.file not in corpus.unread
        }
        for place in gone.values():
            self._stale[place.file].append(place.content)
        self._left = Counter(place.file for place in todo.values())
        with Bar(total=len(todo), desc="indexing", unit="document", progress=progress) as bar:
            written = 0
            for block in self._blocks(corpus.read(todo)):
                self._add(block)
                written += len(block)
                bar.update(len(block))
        self._commit()
        self._remove([content for contents in self._stale.values() for content in contents])
        if todo or gone or any(part.num_unindexed_rows for part in self._table.list_indices()):
            self._table.optimize(cleanup_older_than=_KEEP)
        if written < len(todo):
            raise InputError(
                f"{len(todo) - written} documents changed while they were read; run the same command again"
            )
        index.take_over()
        index.drop_others()
        if 0 < len(there) < LEAST_TEXTS <= len(index):
            transform = index.embedder.transform
            if transform is not None and transform.info.get("texts") == SELF_WRITTEN:
                logger.info(
                    "%d documents: enough to fit the transform on them too; --refit does, and embeds all anew",
                    len(index),
                )
        return Indexed(
            documents=len(index),
            embedded=self._embedded,
            changed=len(todo) - self._embedded,
            unchanged=len(corpus.documents) - len(todo),
            removed=len(gone),
            cut=self._cut,
            duplicates=corpus.duplicates,
            empty=corpus.empty,
            files=corpus.files,
            passed_over=dict(corpus.passed_over),
            dim=index.made_with["dim"],
            max_tokens=index.made_with["max_tokens"],
        )

    def _is_new(self, key: str, place: Place, known: Place | None) -> bool:
        """Whether a document is to be written. Raises `InputError` if the index has its id from a path not given."""
        if known is None or self._corpus.holds(known.file) or not os.path.lexists(known.file):
            return known != place
        check_same(key, place, known._replace(content=known.content.rstrip(_OUTDATED)))
        return False  # it stays with the path that it first came from

    def _opened(self, language: str | None, known: Index) -> tuple[Table, dict[str, Kind]]:
        """The table, with columns for all fields of the corpus, and a full-text index; and the columns' types.

        The index's language, where none is named, is that of the folder's `known` index.
        """
        index, arrow, wanted = self._index, self._arrow, self._corpus.kinds
        kinds = dict(wanted)
        before = _language_of(known.table) if known.has_table else None
        if not index.has_table:
            half_made = index.folder / f"{index.name}.lance"  # by a run that was stopped
            shutil.rmtree(half_made, ignore_errors=True)
            table = index.connection.create_table(index.name, schema=self._schema(kinds))
        else:
            table = index.table
            own = self._schema({}).names
            had: dict[str, Kind] = {x.name: _KINDS[str(x.type)] for x in table.schema if x.name not in own}
            kinds = had | {name: joint_kind(had.get(name, kind), kind) for name, kind in wanted.items()}
            if any(kinds[name] != kind for name, kind in had.items()):
                table = self._rewritten(table, kinds, before)
            elif new := self._schema({name: kind for name, kind in kinds.items() if name not in had}).names[len(own) :]:
                table.add_columns(arrow.schema([self._schema(kinds).field(name) for name in new]))
        language = (language or before or "English").title()
        words = _words_of(table)
        # LanceDB's own limit leaves out words of 40 bytes, some 20 letters of Cyrillic; older indexes have it.
        if words is None or _language_in(words) != language or words.get("max_token_length") is not None:
            _index_words(table, language)
        return table, kinds

    def _schema(self, kinds: dict[str, Kind]) -> pa.Schema:
        arrow = self._arrow
        own = {
            "id": arrow.string(),
            "file": arrow.string(),
            "line": arrow.int64(),
            "text": arrow.string(),
            "vector": arrow.list_(arrow.float32(), self._index.made_with["dim"]),
            "_text": arrow.string(),
            "_content": arrow.string(),
            "_tokens_cut": arrow.int64(),
        }
        return arrow.schema(own | {name: _arrow_type(arrow, kind) for name, kind in kinds.items()})

    def _rewritten(self, table: Table, kinds: dict[str, Kind], language: str | None) -> Table:
        """The same table, in one commit, with the columns that hold other types of values now turned to the wider.

        It has no full-text index yet: should that never be made, the next run knows its language all the same.
        """
        schema = self._schema(kinds).with_metadata({_LANGUAGE: language or ""})
        before = {x.name: x.type for x in table.schema}
        strings = [x.name for x in schema if x.type == "string" and before.get(x.name, x.type) != "string"]

        def column(batch: pa.RecordBatch, field: pa.Field) -> pa.Array:
            if field.name not in batch.schema.names:
                return self._arrow.nulls(len(batch), field.type)
            if field.name == "_content" and strings:  # 1.10 was a number: to be written again, as its file has it
                told = zip(*(batch[name].is_valid().to_pylist() for name in strings), strict=True)
                marked = [
                    x + _OUTDATED if any(some) else x
                    for x, some in zip(batch["_content"].to_pylist(), told, strict=True)
                ]
                return self._arrow.array(marked, field.type)
            if batch[field.name].type == field.type:
                return batch[field.name]
            values = batch[field.name].to_pylist()
            return self._arrow.array([converted(value, kinds[field.name]) for value in values], field.type)

        def batches() -> Iterator[pa.RecordBatch]:
            for batch in table.search().to_batches():
                yield self._arrow.RecordBatch.from_arrays([column(batch, field) for field in schema], schema=schema)

        reader = self._arrow.RecordBatchReader.from_batches(schema, batches())
        made: Table = self._index.connection.create_table(self._index.name, reader, schema=schema, mode="overwrite")
        return made

    def _there(self) -> dict[str, Place]:
        """What the table has: id -> place."""
        there: dict[str, Place] = {}
        files: dict[str, str] = {}  # one string a file, not one a row
        for batch in self._table.search().select(["id", "file", "line", "_content", "_text"]).to_batches():
            keys, names, lines, contents, texts = (batch[name].to_pylist() for name in batch.schema.names[:5])
            for key, name, line, content in zip(keys, names, lines, contents, strict=True):
                there[key] = Place(files.setdefault(name, name), line, content)
            self._texts.update(texts)
        return there

    def _blocks(self, documents: Iterable[Document]) -> Iterator[list[Document]]:
        """Lists that a model embeds in less time than is between two commits, however slow it is."""
        block: list[Document] = []
        size = 0
        for document in documents:
            block.append(document)
            size += len(document.text)
            if size >= min(self._pace, _BLOCK_CHARACTERS) or len(block) >= _BLOCK_DOCUMENTS:
                yield block
                block, size = [], 0
        if block:
            yield block

    def _add(self, block: list[Document]) -> None:
        """Vectors for documents, those of the table for texts that it has; committed if it is time."""
        vectors = self._stored({x.text_hash for x in block} & self._texts)
        if fresh := {x.text_hash: x for x in block if x.text_hash not in vectors}:
            embedder, texts = self._index.embedder, [x.text for x in fresh.values()]
            began = time.monotonic()
            try:
                encoded = embedder.encode_prompts(embedder.prompts(texts))
            except InputError as error:
                raise InputError(f"in the {len(block)} documents from {block[0].place} on: {error}") from None
            except RuntimeError as error:  # or it would be taken for LanceDB's
                raise KvembedError(f"the model fails in the documents from {block[0].place} on: {error}") from error
            spent = max(time.monotonic() - began, 1e-3)
            self._pace = sum(map(len, texts)) * _COMMIT_SECONDS / 2 / spent
            cut = encoded.tokens_cut.tolist()
            vectors |= dict(zip(fresh, zip(encoded.vectors, cut, strict=True), strict=True))
            self._embedded += len(fresh)
            self._cut += encoded.truncated
        else:
            self._pace *= 2  # each look at the table costs the same
        self._waiting += [(x, *vectors[x.text_hash]) for x in block]
        due = time.monotonic() - self._committed >= _COMMIT_SECONDS
        if due or len(self._waiting) >= _COMMIT_DOCUMENTS:
            self._commit()

    def _stored(self, hashes: set[str]) -> dict[str, tuple[Any, int]]:
        """Text hash -> vector and tokens cut, of those that the table still has."""
        if not hashes:
            return {}
        rows = self._table.search().where(f"_text IN ({_quoted(hashes)})").select(["_text", "vector", "_tokens_cut"])
        found = {}
        for batch in rows.to_batches():
            vectors = batch["vector"].flatten().to_numpy(zero_copy_only=False).reshape(len(batch), -1)
            for text, vector, cut in zip(
                batch["_text"].to_pylist(), vectors, batch["_tokens_cut"].to_pylist(), strict=True
            ):
                found[text] = (vector, cut)
        return found

    def _commit(self) -> None:
        """Write what waits, and with a file's last documents, in the same commit, take away what is gone from it.

        Not before: a search would miss what is still to be written, and its vectors could not be used again.
        """
        rows, self._waiting, self._committed = self._waiting, [], time.monotonic()
        if not rows:
            return
        arrow = self._arrow
        documents = [row[0] for row in rows]
        columns = {
            "id": [x.id for x in documents],
            "file": [x.file for x in documents],
            "line": [x.line for x in documents],
            "text": [x.text for x in documents],
            "vector": arrow.FixedSizeListArray.from_arrays(
                arrow.array(np.concatenate([row[1] for row in rows])), self._index.made_with["dim"]
            ),
            "_text": [x.text_hash for x in documents],
            "_content": [x.place.content for x in documents],
            "_tokens_cut": [row[2] for row in rows],
        } | {name: [converted(x.fields.get(name), kind) for x in documents] for name, kind in self._kinds.items()}
        self._left.subtract(x.file for x in documents)
        done = [file for file in {x.file for x in documents} if not self._left[file]]
        replaced = [content for file in done for content in self._stale.pop(file, ())]
        merge = self._table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all()
        if replaced:
            some = replaced[:_COMMIT_DOCUMENTS]  # a longer condition takes memory; the rest goes at the end
            merge = merge.when_not_matched_by_source_delete(f"_content IN ({_quoted(some)})")
            self._stale[""] += replaced[_COMMIT_DOCUMENTS:]
        merge.execute(arrow.table(columns, schema=self._schema(self._kinds)))
        self._texts.update(columns["_text"])

    def _remove(self, contents: list[str]) -> None:
        for start in range(0, len(contents), _COMMIT_DOCUMENTS):
            self._table.delete(f"_content IN ({_quoted(contents[start : start + _COMMIT_DOCUMENTS])})")


_LANGUAGE = b"kvembed.language"
_OUTDATED = "-"  # after a document's content hash: it is to be written again
_KINDS: dict[str, Kind] = {"bool": "bool", "int64": "int64", "double": "float64", "string": "string"}


def _arrow_type(arrow: Any, kind: Kind) -> Any:
    return arrow.bool_() if kind == "bool" else getattr(arrow, kind)()


def _quoted(hashes: Iterable[str]) -> str:
    return ",".join(f"'{digest}'" for digest in hashes)  # hex digits: nothing in them needs care


def _words_of(table: Table) -> dict[str, Any] | None:
    """How a table's full-text index was made; None if there is no such index."""
    return next((part.index_details or {} for part in table.list_indices() if part.index_type == "FTS"), None)


def _language_in(words: dict[str, Any]) -> str:
    """The language that a full-text index was made for."""
    return str(words["language"]) if words.get("stem") else "None"


def _language_of(table: Table) -> str | None:
    """A table's language: its full-text index's, or, where that was never made anew, the one that was noted for it."""
    if words := _words_of(table):
        return _language_in(words)
    return (table.schema.metadata or {}).get(_LANGUAGE, b"").decode() or None


def _index_words(table: Table, language: str) -> None:
    """Full-text search over the texts: words as Unicode knows them in every script, stems of one language."""
    # The stop words behind "icu" are those of many languages at once: "die" is an article, "c" a pronoun.
    options = {"stem": False} if language == "None" else {"language": language}
    words = import_extra("lancedb.index", "search").FTS(
        base_tokenizer="icu/split", remove_stop_words=False, max_token_length=None, **options
    )
    table.create_index("text", config=words, replace=True)


def check_language(language: str | None) -> None:
    """Raises `InputError` for a language whose stems LanceDB does not know."""
    if language is not None:
        known = [*import_extra("lancedb.index", "search").lang_mapping.values(), "None"]
        if language.title() not in known:
            raise InputError(f"text search has no stems for language {language!r}; choose from {', '.join(known)}")
