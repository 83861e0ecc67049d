"""Raw documents in files of many kinds -> texts, each with the file and row that it comes from.

What cannot be read is named by file and line and counted in rows, or in bytes where nobody can know how many rows it
held; it is never guessed at, and one bad row costs one row.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import PurePath
from typing import Any, Literal

from dsv3_megatron.data.raw.compressed import MisnamedError, Place, TornError, chunks
from dsv3_megatron.data.raw.inputs import InputFile, printable
from dsv3_megatron.data.raw.json_rows import IncompleteError, Unreadable, ValueStream, line_values, value_at
from dsv3_megatron.data.raw.lines import DOCUMENT_BYTES, START, CutError, Lines, LongLine
from dsv3_megatron.data.raw.parquet import ColumnChunk, chunks_of, pages_of
from dsv3_megatron.run.reasons import first_line

_HEAD_BYTES = 1 << 20
_TABLE_ROWS = 1024  # of a table read at a time, at most
_PAGE_TIMES = 4  # a page of a table holds many cells, and may be so many times as large as one may be
_MOST_BRACKETS = 4_000_000  # of a line: a list or an object costs a hundred times the bytes that it is written with

Unit = Literal["line", "value", "row"]


@dataclass(frozen=True, slots=True)
class Document:
    """A text.

    Args:
        raw: the same as UTF-8.
        file: number of its file.
        row: line, or row of a table, from 1; number of the value where a file is no lines; 0 where the file is the
            document.
    """

    text: str
    raw: bytes
    file: int
    row: int


@dataclass(frozen=True, slots=True)
class Lost:
    """What could not be read, and where.

    Args:
        line: from 1; None = the whole file.
        unit: what ``line`` counts.
        rows: how many documents, where that is known.
        size: bytes of those rows.
        disk: bytes on disk that held nobody knows how many rows.
    """

    path: str
    line: int | None
    why: str
    rows: int = 1
    size: int = 0
    disk: int = 0
    unit: Unit = "line"

    def __str__(self) -> str:
        if self.line is None:
            return f"{self.path}: {self.why}"
        where = f":{self.line}" if self.unit == "line" else f", {self.unit} {self.line:,}"
        return f"{self.path}{where}: {self.why}"


@dataclass(frozen=True)
class Span:
    """A part of a file that is read at once.

    Args:
        first, stop: of a file of rows, bytes of its content: the lines that begin there. Of a table, row groups. To
            its end where ``stop`` is None. A text is always read whole, as is a file of rows that is no lines.
        place: from where ``first`` is looked for.
    """

    file: InputFile
    first: int = 0
    stop: int | None = None
    place: Place = START


@dataclass
class SpanReader:
    """Reads the documents of a span; once, in order.

    Args:
        lines: of the reader before this one, which may have unpacked some of the file already.
        most: bytes of a row or a text; a larger one is not read, and counts as one that cannot be.

    ``ended``: nothing of the file follows the span. ``place``: the last from where reading can begin. ``disk``: bytes
    of the file that were read. ``foreign``: the file, by its content, holds no documents.
    """

    span: Span
    text_field: str
    lines: Lines | None = None
    most: int = DOCUMENT_BYTES
    ended: bool = field(default=True, init=False)
    foreign: bool = field(default=False, init=False)
    place: Place = field(default=START, init=False)
    disk: int = field(default=0, init=False)

    def __iter__(self) -> Iterator[Document | Lost]:
        self._path = printable(self.span.file.path)
        yield from {"rows": self._rows, "table": self._table, "text": self._text}[self.span.file.kind]()
        if self.ended:
            self.disk = self.span.file.size

    # -- rows of JSON --------------------------------------------------------------------------------------------------

    def _rows(self) -> Iterator[Document | Lost]:
        file = self.span.file
        try:
            layout = layout_of(file, self.text_field)
        except MisnamedError as error:
            if not self.span.first:
                yield Lost(self._path, None, str(error), rows=0, disk=file.size)
            return
        if layout == "lines":
            yield from self._lines()
        elif self.span.first:
            return  # the span that begins the file reads all of it
        elif layout == "values":
            yield from self._values()
        elif layout == "foreign":
            self.foreign = True
        else:
            yield Lost(self._path, None, f"is {layout}; convert it to UTF-8", rows=0, disk=file.size)

    def _lines(self) -> Iterator[Document | Lost]:
        span = self.span
        if self.lines is None or not self.lines.can_read(span.file, span.first, span.place):
            self.lines = Lines(span.file, span.place, self.most)
        try:
            for number, line in self.lines.read(span.first, span.stop):
                self.disk = self.lines.disk
                if isinstance(line, LongLine):
                    yield Lost(self._path, number, self._too_long(line.size), size=line.size)
                    continue
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                if line.strip(b" \t\r\n\0"):
                    yield from self._line(number, line)
        except CutError as cut:
            yield self._torn(cut.torn, cut.number, cut.line)
        self.disk, self.place, self.ended = self.lines.disk, self.lines.place, self.lines.ended

    def _too_long(self, size: int | None = None) -> str:
        has = "" if size is None else f"{size:,} bytes, "
        return f"has {has}more than document_bytes = {self.most:,}; raise that, or leave it out"

    def _line(self, number: int, line: bytes) -> Iterator[Document | Lost]:
        if len(line) > _MOST_BRACKETS and line.count(b"[") + line.count(b"{") > _MOST_BRACKETS:
            yield Lost(self._path, number, f"has more than {_MOST_BRACKETS:,} lists and objects", size=len(line))
            return
        # bytes that are not UTF-8 cost a row only where they are in its text
        text = line.decode("utf-8", "surrogateescape")
        for value in line_values(text.lstrip("\ufeff\0").rstrip("\0")):
            rows = _rows_of(value)
            for row in rows:
                yield self._row(row, number, len(line) // len(rows))

    def _values(self) -> Iterator[Document | Lost]:
        stream, number = ValueStream(), 0
        decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
        torn = None
        pieces = chunks(self.span.file)
        while True:
            try:
                chunk = next(pieces, None)
            except TornError as error:
                chunk, torn = None, error
            text = decoder.decode(b"" if chunk is None else chunk.data, final=chunk is None)
            for value, size in stream.feed(text, final=chunk is None and torn is None):
                number += 1
                yield self._row(value, number, size, "value")
            if chunk is None:
                break
            self.disk = chunk.disk
            if stream.waiting > self.most:
                torn = TornError(f"a value {self._too_long()}", chunk.disk)
                break
        if torn is not None:
            yield self._torn(torn, number + 1, stream.rest(), "value")

    def _row(self, row: object, number: int, size: int, unit: Unit = "line") -> Document | Lost:
        try:
            text = text_of(row, self.text_field)
            return Document(text, text.encode(), self.span.file.number, number)
        except UnicodeEncodeError as error:
            lone = ord(error.object[error.start])
            why = "holds bytes that are not UTF-8" if 0xDC80 <= lone <= 0xDCFF else "holds half a surrogate pair"
            return Lost(self._path, number, why, size=size, unit=unit)
        except ValueError as error:
            size = row.size if isinstance(row, Unreadable) else size
            return Lost(self._path, number, str(error), size=size, unit=unit)

    def _torn(self, torn: TornError, number: int, rest: bytes, unit: Unit = "line") -> Lost:
        if (disk := self.span.file.size - torn.disk) > 0:
            why = f"{torn}; {disk:,} bytes on disk from here on"
            return Lost(self._path, number, why, rows=0, disk=disk, unit=unit)
        return Lost(self._path, number, str(torn), size=len(rest), unit=unit)

    # -- tables --------------------------------------------------------------------------------------------------------

    def _table(self) -> Iterator[Document | Lost]:
        import pyarrow.parquet  # for Parquet input alone

        file, name = self.span.file, self.text_field
        limit = _PAGE_TIMES * self.most
        try:
            table = pyarrow.parquet.ParquetFile(file.path)
            metadata = table.metadata
            stop = metadata.num_row_groups if self.span.stop is None else self.span.stop
            groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
            names = table.schema_arrow.names
        except Exception as error:  # pyarrow has kinds of its own for each way of being damaged
            yield Lost(self._path, None, first_line(error), rows=0, disk=file.size)
            return
        self.ended = stop >= len(groups)
        if name not in names:
            mine = groups[self.span.first : stop]
            rows, size = sum(g.num_rows for g in mine), sum(g.total_byte_size for g in mine)
            if rows:
                have = ", ".join(map(repr, names[:6]))
                yield Lost(self._path, None, f"has no column {name!r}; it has {have}", rows=rows, size=size)
            return
        kind = table.schema_arrow.field(name).type
        starts = list(accumulate((group.num_rows for group in groups), initial=0))
        chunks: list[ColumnChunk] = []
        for number in range(self.span.first, stop):
            before, done = starts[number], 0
            try:
                chunks = chunks or _column(file.path, name, kind)
                rows = _rows_at_once(file.path, chunks[number], limit)
                for batch in table.iter_batches(rows, row_groups=[number], columns=[name], use_threads=False):
                    for value in _bytes_or_values(batch.column(0)):
                        done += 1
                        yield self._cell(value, before + done)
            except Exception as error:
                group = groups[number]
                rows = group.num_rows - done
                size = group.total_byte_size * rows // max(1, group.num_rows)
                why = f"row group {number}: {first_line(error)}"
                yield Lost(self._path, before + done + 1, why, rows=rows, size=size, unit="row")
            self.disk = file.size * (number + 1) // len(groups)

    def _cell(self, value: object, number: int) -> Document | Lost:
        if isinstance(value, bytes) and len(value) > self.most:
            return Lost(self._path, number, self._too_long(len(value)), size=len(value), unit="row")
        if not isinstance(value, bytes):
            return self._row({self.text_field: value}, number, 0, "row")
        try:
            return Document(value.decode(), value, self.span.file.number, number)
        except UnicodeDecodeError as error:
            why = f"field {self.text_field!r}: byte {error.start} is not UTF-8"
            return Lost(self._path, number, why, size=len(value), unit="row")

    # -- whole files ---------------------------------------------------------------------------------------------------

    def _text(self) -> Iterator[Document | Lost]:
        file, data = self.span.file, b""
        try:
            parts, size = [], 0
            for chunk in chunks(file):
                parts.append(chunk.data)
                if (size := size + len(chunk.data)) > self.most:
                    yield Lost(self._path, None, self._too_long(), size=size)
                    return
            data = b"".join(parts)
            if encoding := _other_encoding(data[:8]):
                yield Lost(self._path, None, f"is {encoding}; convert it to UTF-8", size=len(data))
                return
            text = data.decode("utf-8-sig")
            yield Document(text, text.encode(), file.number, 0)
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            yield Lost(self._path, line, f"byte {error.start} is not UTF-8", size=len(data))
        except TornError as torn:
            yield Lost(self._path, None, str(torn), size=file.size)


def _rows_of(value: object) -> list[object]:
    """Return the rows that a value of a line stands for: elements of arrays, at any depth, that hold objects."""
    rows, left = [], [value]
    while left:
        value = left.pop()
        if isinstance(value, list) and any(isinstance(row, dict | list) for row in value):
            left += reversed(value)
        else:
            rows.append(value)
    return rows


def text_of(row: object, name: str) -> str:
    """Return the text of a row. Raises ValueError saying why it has none."""
    if isinstance(row, Unreadable):
        raise ValueError(row.why)
    if not isinstance(row, dict):
        raise ValueError(f"is {type(row).__name__}, not an object with a field {name!r}")
    if not row:
        raise ValueError(f"has no field {name!r}; it is empty")
    if name not in row:
        raise ValueError(f"has no field {name!r}; it has {', '.join(map(repr, list(row)[:6]))}")
    if not isinstance(row[name], str):
        raise ValueError(f"field {name!r} is {type(row[name]).__name__}, not text")
    return row[name]


def layout_of(file: InputFile, name: str) -> str:
    """Return how the values of a file of rows lie in it, by its beginning: ``lines`` (one a line), ``values`` (an
    array, or one after another), ``foreign`` (a .json of something else), or the encoding that it is in.

    Raises: MisnamedError.
    """
    head, whole = b"", True
    try:
        for chunk in chunks(file):
            head += chunk.data
            if b"\n" in head.lstrip() or len(head) >= _HEAD_BYTES:
                whole = chunk.disk >= file.size
                break
    except MisnamedError:
        raise
    except TornError:
        pass  # told where the rows are read
    if encoding := _other_encoding(head[:8]):
        return encoding
    text = head.decode("utf-8", "replace").lstrip("\ufeff\0 \t\r\n")
    is_json = ".json" in (part.lower() for part in PurePath(file.path).suffixes[-2:])
    names = {json.dumps(name), json.dumps(name, ensure_ascii=False)}
    if is_json and whole and text and not any(re.search(re.escape(each) + r"\s*:", text) for each in names):
        return "foreign"
    return _layout(text, whole)


def _layout(text: str, whole: bool) -> Literal["lines", "values"]:
    if re.match(r"\[\s*[\[{]", text):
        return "values"
    line, newline, _ = text.partition("\n")
    if not newline and not whole:
        return "values" if line.startswith("[") or _value_ends_in(text) else "lines"
    values: list[Any] = list(line_values(line))
    if len(values) != 1:
        return "values" if len(values) > 1 and not isinstance(values[0], Unreadable) else "lines"
    if isinstance(values[0], list):
        return "values" if any(isinstance(row, dict | list) for row in values[0]) else "lines"
    if not isinstance(values[0], Unreadable):
        return "lines"
    if line.strip() in ("[", "{"):
        return "values"
    try:  # a value may take several lines
        value, _ = value_at(text, 0, final=whole)
    except IncompleteError:
        return "values" if text.startswith("[") else "lines"
    return "lines" if isinstance(value, Unreadable) else "values"


def _value_ends_in(text: str) -> bool:
    try:
        return not isinstance(value_at(text, 0, final=False)[0], Unreadable)
    except IncompleteError:
        return False


def _other_encoding(head: bytes) -> str | None:
    """Return the encoding of text that is not UTF-8, by its first eight bytes: a mark, or the zeros of wide letters."""
    zeros = [not byte for byte in head]
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "UTF-32"
    if zeros in ([True, True, True, False] * 2, [False, True, True, True] * 2):
        return "UTF-32"
    wide = zeros[:4] in ([True, False] * 2, [False, True] * 2)
    return "UTF-16" if wide or head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else None


def _column(path: str, name: str, kind: Any) -> list[ColumnChunk]:
    """Return where a table's column lies, for each group of rows.

    Raises: ValueError: it holds lists or objects, of which a few bytes may stand for any number. PagesError, OSError:
    the footer cannot be read.
    """
    import pyarrow as pa  # for Parquet input alone

    if pa.types.is_nested(kind):
        raise ValueError(f"field {name!r} is {str(kind)[:60]}, not text")
    with open(path, "rb") as file:
        return chunks_of(file, name)


def _rows_at_once(path: str, chunk: ColumnChunk, limit: int) -> int:
    """Return how many rows of a column are read at a time, so that they take about ``limit`` bytes at most.

    Raises: ValueError: even one page would take more. PagesError, OSError: they cannot be read.
    """
    with open(path, "rb") as file:
        found = pages_of(file, chunk)
    if (largest := max(found.data, found.dictionary)) > limit:
        raise ValueError(f"a page of {largest:,} bytes, more than {_PAGE_TIMES} times document_bytes; raise that")
    return max(1, min(_TABLE_ROWS, limit // max(found.dictionary, 1)))


def _bytes_or_values(column: Any) -> list[object]:
    """Return the cells of a column, text as bytes: one that is no UTF-8 must not cost the others."""
    import pyarrow as pa  # for Parquet input alone

    kinds = pa.types
    if kinds.is_dictionary(column.type):
        column = column.dictionary_decode()
    if kinds.is_string(column.type):
        column = column.cast(pa.binary())
    elif kinds.is_large_string(column.type):
        column = column.cast(pa.large_binary())
    return column.to_pylist()
