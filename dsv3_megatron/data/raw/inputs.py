"""The files under an input: which are read, how, in what order, and what is left out, with the reason."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from parallel.errors import DataError
from parallel.units import show_bytes

Kind = Literal["rows", "table", "text"]
ROWS, TABLE, TEXT = (".jsonl", ".ndjson", ".json"), (".parquet",), (".txt", ".md", ".rst", ".tex")
# fmt: off
CODE = (
    ".py", ".pyi", ".ipynb", ".c", ".h", ".cc", ".cpp", ".cxx", ".hpp", ".cu", ".cuh", ".rs", ".go", ".java", ".kt",
    ".scala", ".js", ".jsx", ".ts", ".tsx", ".rb", ".php", ".pl", ".lua", ".jl", ".r", ".m", ".swift", ".cs", ".fs",
    ".hs", ".ml", ".ex", ".erl", ".clj", ".lisp", ".el", ".sh", ".bash", ".ps1", ".sql", ".html", ".css", ".scss",
    ".vue", ".yaml", ".yml", ".toml", ".cmake", ".proto", ".v", ".sv", ".vhd", ".f90", ".asm", ".s", ".zig", ".nim",
    ".dart", ".tf",
)
# fmt: on
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
_AGAIN = "prepare again from inputs that stay as they are, into another folder"
KNOWN = f"{', '.join((*ROWS, *TABLE, *TEXT))}, code"


@dataclass(frozen=True)
class InputFile:
    """A file that holds documents.

    Args:
        path: as the system knows it; bytes of a name that are no text stand in it as surrogates.
        name: what people read: the path inside its input, printable.
        number: from 0, among the files of its input.
        size: bytes on disk.
        mtime_ns: when it was last written.
    """

    path: str
    name: str
    number: int
    kind: Kind
    size: int
    mtime_ns: int

    @property
    def compressed(self) -> bool:
        """Whether it must be unpacked."""
        return Path(self.path).suffix.lower() in COMPRESSED


@dataclass
class Found:
    """The files of an input, in a fixed order, and what else was there."""

    files: list[InputFile] = field(default_factory=list)
    ignored: int = 0  # files of unknown kind
    skipped: list[str] = field(default_factory=list)  # links, pipes and hidden files, each with the reason


def printable(path: str | Path) -> str:
    """Return a path as text that can be written anywhere: bytes that are no UTF-8 as ``\\xff``."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def kind_of(path: str | Path) -> Kind | None:
    """Return how a file is read, by its name; None when it holds no documents."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    compressed = bool(suffixes) and suffixes[-1] in COMPRESSED
    if compressed:
        suffixes.pop()
    last = suffixes[-1] if suffixes else ""
    if last in ROWS:
        return "rows"
    if last in TABLE:
        return None if compressed else "table"
    return "text" if last in TEXT + CODE else None


def files_of(path: str | Path) -> Found:
    """Return the files under an input.

    A link inside the input is followed to a file of a Hugging Face cache (``snapshots/...`` to ``blobs/...``), and to
    what is inside the input under a name that is not read by itself; every file is read once. Others are skipped.
    Names that begin with a dot are not read. Raises: DataError: there is no such input, nothing in it can be read, it
    holds something that this user may not read, or two revisions of a cache's file.
    """
    root = Path(path)
    shown = printable(root)
    try:
        if not root.exists():
            raise DataError(
                f"input = {shown} does not exist; name a file or a folder (a comma in a name is written \\,)"
            )
        if root.is_file():
            kind = kind_of(root)
            if kind is None:
                raise DataError(f"input = {shown} is of no known kind; known are {KNOWN}")
            return Found([_file(root, printable(root.name), 0, kind)])
        if not root.is_dir():
            raise DataError(f"input = {shown} is a pipe, a socket or a device; name a file or a folder")
        found = _walk(root)
    except PermissionError as error:
        name = printable(error.filename or root)
        raise DataError(f"input = {shown}: {name} may not be read ({error.strerror}); change its permissions") from None
    _check_revisions(shown, found.files)
    if not found.files:
        skipped = f"; skipped: {found.skipped[0]}" if found.skipped else ""
        raise DataError(f"input = {shown} holds no file of a known kind ({KNOWN}){skipped}")
    return found


def check_unchanged(files: Iterable[InputFile]) -> None:
    """Raise DataError where a file is no longer what it was when it was found: some of it was read, and some not."""
    for file in files:
        name = printable(file.path)
        try:
            now = os.stat(file.path)
        except OSError as error:
            raise DataError(f"{name} is gone ({error.strerror}) while it was read; {_AGAIN}") from None
        if (now.st_size, now.st_mtime_ns) != (file.size, file.mtime_ns):
            was, size = show_bytes(file.size), show_bytes(now.st_size)
            raise DataError(f"{name} has changed while it was read (it had {was}, and has {size}); {_AGAIN}")


def check_outside(output: str | Path, inputs: Iterable[str]) -> None:
    """Raise DataError where the output is inside an input: what is written would be read."""
    real = os.path.realpath(output)
    for given in inputs:
        if os.path.isdir(given) and _inside(real, os.path.realpath(given)):
            raise DataError(
                f"output = {printable(output)} is inside input = {printable(given)}; name a folder outside of it"
            )


def check_distinct(inputs: tuple[str, ...], found: list[Found]) -> None:
    """Raise DataError where two inputs share a file: its documents would count twice."""
    seen: dict[str, str] = {}
    for given, each in zip(inputs, found):
        for file in each.files:
            other = seen.setdefault(os.path.realpath(file.path), given)
            if other is not given:
                which = "is named twice" if os.path.realpath(given) == os.path.realpath(other) else (
                    f"and input = {printable(other)} share {printable(file.path)}"
                )  # fmt: skip
                raise DataError(f"input = {printable(given)} {which}; leave one out, and weigh it with weights")


def _file(path: Path, name: str, number: int, kind: Kind) -> InputFile:
    """Raises: PermissionError."""
    if not os.access(path, os.R_OK, effective_ids=os.access in os.supports_effective_ids):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    found = path.stat()
    return InputFile(str(path), name, number, kind, found.st_size, found.st_mtime_ns)


def _walk(root: Path) -> Found:
    """Raises: PermissionError."""
    found = Found()
    plain: list[Path] = []
    links, unknown = [], []
    for folder, inner, names in os.walk(root, onerror=_refuse):
        for name in [each for each in inner if each.startswith(".")]:
            found.skipped.append(f"{printable(Path(folder, name).relative_to(root))}: a hidden folder")
            inner.remove(name)
        inner.sort()
        for name in sorted([*names, *(name for name in inner if Path(folder, name).is_symlink())]):
            path = Path(folder, name)
            shown = printable(path.relative_to(root))
            if name.startswith("."):
                if kind_of(path):
                    found.skipped.append(f"{shown}: a hidden file")
                else:
                    found.ignored += 1
            elif path.is_symlink():
                links.append(path)
            elif not path.is_file():
                if kind_of(path):
                    found.skipped.append(f"{shown}: not a file, but a pipe, a socket or a device")
                else:
                    found.ignored += 1
            elif kind_of(path) is None:
                unknown.append(path)
            else:
                plain.append(path)
    real = os.path.realpath(root)
    taken = {os.path.realpath(path) for path in plain}
    for link in sorted(links):
        target = os.path.realpath(link)
        if reason := _not_followed(link, target, real, taken):
            if kind_of(link) or os.path.isdir(target):
                found.skipped.append(f"{printable(link.relative_to(root))}: {reason}")
            else:
                found.ignored += 1
        else:
            taken.add(target)
            plain.append(link)
    for number, path in enumerate(sorted(plain)):
        kind = kind_of(path)
        assert kind is not None, path
        found.files.append(_file(path, printable(path.relative_to(root)), number, kind))
    found.ignored += sum(os.path.realpath(path) not in taken for path in unknown)
    return found


def _check_revisions(shown: str, files: list[InputFile]) -> None:
    """Raise DataError where a cache of Hugging Face's holds a file in two revisions: both would be read."""
    seen: dict[tuple[str, str], str] = {}
    for file in files:
        before, snapshots, after = os.path.abspath(file.path).rpartition("/snapshots/")
        if snapshots:
            revision, _, name = after.partition("/")
            if (other := seen.setdefault((before, name), revision)) != revision and os.path.isdir(f"{before}/blobs"):
                raise DataError(
                    f"input = {shown} holds two revisions of {printable(name)}, {printable(other)} and "
                    f"{printable(revision)}; name one, as input={printable(before)}/snapshots/{printable(revision)}"
                )


def _refuse(error: OSError) -> None:
    raise error


def _not_followed(link: Path, target: str, root: str, taken: set[str]) -> str | None:
    """Return why a link is skipped, None where it is followed."""
    if not os.path.exists(target):
        return "a link to nothing"
    if os.path.isdir(target):
        return f"a link to a folder, {printable(target)}; name that as an input of its own"
    if kind_of(link) is None:
        return "of unknown kind"
    if not _inside(target, root) and not any(
        (cache / "blobs").is_dir() and (cache / "snapshots").is_dir() and _inside(target, os.path.realpath(cache))
        for cache in Path(os.path.abspath(link)).parents
    ):
        return f"a link out of the input, to {printable(target)}; name that as an input of its own"
    return "a link to a file that is read under another name" if target in taken else None


def _inside(path: str, folder: str) -> bool:
    return os.path.commonpath([path, folder]) == folder
