"""Raw documents in files of many kinds -> texts, in blocks that any process can read for itself.

The order of blocks and of documents in them depends on the inputs alone, so that a run that was interrupted, or that
has more workers, makes the same shards. What cannot be read is counted and named by file and line, never guessed at.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from parallel.errors import DataError

BLOCK_BYTES = 1 << 20
_READ_BYTES = 1 << 20
LINES, TABLE, TEXT = (".jsonl", ".ndjson"), (".parquet",), (".txt", ".md", ".rst", ".tex")
# fmt: off
CODE = (
    ".py", ".pyi", ".ipynb", ".c", ".h", ".cc", ".cpp", ".cxx", ".hpp", ".cu", ".cuh", ".rs", ".go", ".java", ".kt",
    ".scala", ".js", ".jsx", ".ts", ".tsx", ".rb", ".php", ".pl", ".lua", ".jl", ".r", ".m", ".swift", ".cs", ".fs",
    ".hs", ".ml", ".ex", ".erl", ".clj", ".lisp", ".el", ".sh", ".bash", ".ps1", ".sql", ".html", ".css", ".scss",
    ".vue", ".yaml", ".yml", ".toml", ".cmake", ".proto", ".v", ".sv", ".vhd", ".f90", ".asm", ".s", ".zig", ".nim",
    ".dart", ".tf",
)
# fmt: on
PACKED = (".gz", ".zst")


@dataclass(frozen=True)
class Bad:
    """Something that could not be read, and where."""

    path: str
    line: int | None  # from 1; None = the whole file
    why: str

    def __str__(self) -> str:
        return f"{self.path}{'' if self.line is None else f':{self.line}'}: {self.why}"


@dataclass(frozen=True)
class Block:
    """A unit of work: some lines of a file, a row group of a table, or a few whole files."""

    kind: Literal["lines", "table", "files"]
    path: str
    first: int = 0  # number of the first line (from 1) or of the row group (from 0)
    lines: bytes = b""
    files: tuple[str, ...] = ()
    size: int = 0  # bytes of input it stands for, as on disk
    bad: tuple[Bad, ...] = ()  # found while cutting


def files_of(path: str | Path) -> tuple[list[Path], int]:
    """Return the files under an input that hold documents, in a fixed order, and how many others there are.

    Raises: DataError: there is no such input, or nothing in it can be read.
    """
    root = Path(path)
    if not root.exists():
        raise DataError(f"input = {path} does not exist; name a file or a folder")
    if root.is_file():
        if kind_of(root) is None:
            raise DataError(f"input = {path} is of no known kind; known are {', '.join((*LINES, *TABLE, *TEXT))}, code")
        return [root], 0
    every = sorted(p for p in root.rglob("*") if p.is_file() and not p.is_symlink())
    known = [p for p in every if kind_of(p) is not None]
    if not known:
        raise DataError(f"input = {path} holds no file of a known kind ({', '.join((*LINES, *TABLE, *TEXT))}, code)")
    return known, len(every) - len(known)


def kind_of(path: Path) -> Literal["lines", "table", "files"] | None:
    """Return how a file is read, by its name; None when it holds no documents."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in PACKED:
        suffixes.pop()
    last = suffixes[-1] if suffixes else ""
    if last in LINES:
        return "lines"
    if last in TABLE:
        return "table" if path.suffix.lower() in TABLE else None
    return "files" if last in TEXT + CODE else None


def blocks(files: list[Path]) -> Iterator[Block]:
    """Yield the blocks of files in order. Small files share one."""
    group: list[str] = []
    size = 0
    for path in files:
        kind = kind_of(path)
        if group and (kind != "files" or size >= BLOCK_BYTES):
            yield Block("files", group[0], files=tuple(group), size=size)
            group, size = [], 0
        if kind == "files":
            group.append(str(path))
            size += path.stat().st_size
        elif kind == "lines":
            yield from _line_blocks(path)
        else:
            yield from _table_blocks(path)
    if group:
        yield Block("files", group[0], files=tuple(group), size=size)


def texts(block: Block, field: str) -> tuple[list[str], list[Bad]]:
    """Return the documents of a block, and what in it is none."""
    read = {"lines": _texts_of_lines, "table": _texts_of_table, "files": _texts_of_files}[block.kind]
    found, bad = read(block, field)
    return found, [*block.bad, *bad]


# -- lines of JSON -----------------------------------------------------------------------------------------------------


class _TornError(Exception):
    """A compressed file ends in the middle, or is damaged."""


def _open_chunks(path: Path) -> Iterator[tuple[bytes, int]]:
    """Yield the unpacked content of a file, chunk by chunk, with how many bytes on disk were read for it."""
    with path.open("rb") as file:
        unpacker: Any = None
        while raw := file.read(_READ_BYTES):
            size = len(raw)
            if path.suffix.lower() not in PACKED:
                yield raw, size
                continue
            while raw:  # a file may hold several compressed streams in a row
                unpacker = unpacker or _unpacker(path)
                try:
                    chunk = unpacker.decompress(raw)
                except Exception as error:  # zlib.error, zstandard.ZstdError
                    raise _TornError(f"damaged ({error})") from None
                raw = unpacker.unused_data if unpacker.eof else b""
                unpacker = None if unpacker.eof else unpacker
                yield chunk, size
                size = 0
        if unpacker is not None:
            raise _TornError("truncated: its last compressed stream has no end")


def _unpacker(path: Path) -> object:
    if path.suffix.lower() == ".gz":
        return zlib.decompressobj(wbits=31)
    import zstandard  # for compressed input alone

    return zstandard.ZstdDecompressor().decompressobj()


def _line_blocks(path: Path) -> Iterator[Block]:
    first, size, parts, length = 1, 0, [], 0
    bad: tuple[Bad, ...] = ()
    try:
        for chunk, read in _open_chunks(path):
            parts.append(chunk)
            length, size = length + len(chunk), size + read
            if length < BLOCK_BYTES or (cut := (data := b"".join(parts)).rfind(b"\n") + 1) == 0:
                continue
            yield Block("lines", str(path), first, data[:cut], size=size)
            first += data.count(b"\n", 0, cut)
            parts, length, size = [data[cut:]], len(data) - cut, 0
    except (_TornError, OSError) as error:
        data = b"".join(parts)
        whole, _, _ = data.rpartition(b"\n")  # the line that the damage cuts is not a document
        bad = (Bad(str(path), first + whole.count(b"\n") + bool(whole), str(error)),)
        parts = [whole]
    if (data := b"".join(parts)) or bad:
        yield Block("lines", str(path), first, data, size=size, bad=bad)


def _texts_of_lines(block: Block, field: str) -> tuple[list[str], list[Bad]]:
    found, bad = [], []
    for number, line in enumerate(block.lines.split(b"\n"), block.first):
        if not line.strip():
            continue
        try:
            found.append(_text_of_row(json.loads(line), field))
        except UnicodeDecodeError as error:
            bad.append(Bad(block.path, number, f"byte {error.start} is not UTF-8"))
        except json.JSONDecodeError as error:
            bad.append(Bad(block.path, number, f"is no JSON: {error.msg} at character {error.pos + 1}"))
        except ValueError as error:
            bad.append(Bad(block.path, number, str(error)))
    return found, bad


def _text_of_row(row: object, field: str) -> str:
    if not isinstance(row, dict):
        raise ValueError(f"is {type(row).__name__}, not an object with a field {field!r}")
    if field not in row:
        raise ValueError(f"has no field {field!r}; it has {', '.join(map(repr, list(row)[:6]))}")
    text = row[field]
    if not isinstance(text, str):
        raise ValueError(f"field {field!r} is {type(text).__name__}, not text")
    text.encode()  # JSON can spell half a surrogate pair, which is no text
    return text


# -- tables ------------------------------------------------------------------------------------------------------------


def _table_blocks(path: Path) -> Iterator[Block]:
    import pyarrow.parquet  # for Parquet input alone

    try:
        groups = pyarrow.parquet.ParquetFile(path).num_row_groups
    except Exception as error:  # pyarrow has kinds of its own for each way of being damaged
        yield Block("table", str(path), -1, size=path.stat().st_size, bad=(Bad(str(path), None, _first_line(error)),))
        return
    for group in range(groups):
        yield Block("table", str(path), group, size=path.stat().st_size // groups)


def _texts_of_table(block: Block, field: str) -> tuple[list[str], list[Bad]]:
    if block.first < 0:
        return [], []
    import pyarrow.parquet  # for Parquet input alone

    try:
        table = pyarrow.parquet.ParquetFile(block.path)
        if field not in table.schema_arrow.names:
            have = ", ".join(map(repr, table.schema_arrow.names[:6]))
            return [], [Bad(block.path, None, f"has no column {field!r}; it has {have}")]
        before = sum(table.metadata.row_group(group).num_rows for group in range(block.first))
        rows = table.read_row_group(block.first, columns=[field])[field].to_pylist()
    except Exception as error:
        return [], [Bad(block.path, None, f"row group {block.first}: {_first_line(error)}")]
    found, bad = [], []
    for number, text in enumerate(rows, before + 1):
        try:
            found.append(_text_of_row({field: text}, field))
        except ValueError as error:
            bad.append(Bad(block.path, number, str(error)))
    return found, bad


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# -- whole files -------------------------------------------------------------------------------------------------------


def _texts_of_files(block: Block, field: str) -> tuple[list[str], list[Bad]]:
    found, bad = [], []
    for name in block.files:
        try:
            data = b"".join(chunk for chunk, _ in _open_chunks(Path(name)))
            found.append(data.decode("utf-8"))
        except UnicodeDecodeError as error:
            bad.append(Bad(name, data.count(b"\n", 0, error.start) + 1, f"byte {error.start} is not UTF-8"))
        except (_TornError, OSError) as error:
            bad.append(Bad(name, None, str(error)))
    return found, bad
