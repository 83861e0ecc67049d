"""The Python standard library's own source as training text: real text on every machine, no download.

The tokenizer is trained and the text encoded once, into a cache folder named by what went in; later starts only map
the arrays. Files are held out by a hash of their name, so that no part of a held-out file is trained on.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sysconfig
import tempfile
from pathlib import Path

import numpy as np

from dsv3_megatron.data.checked.npy import open_npy
from dsv3_megatron.data.source.shards import file_sha256
from dsv3_megatron.data.tokenizer import Tokenizer
from dsv3_megatron.run.files import write_json
from dsv3_megatron.run.handed import read_json_file
from dsv3_megatron.run.reasons import why_unread
from parallel.errors import DataError

VERSION = 3  # of what is written to the cache
# Tests repeat themselves, and tables (encodings, topics) are not text a person wrote.
SKIPPED = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "encodings",
    "__pycache__",
    "lib2to3",
    "pydoc_data",
    "ensurepip",
    "turtledemo",
    "config",
}
TOKENIZER_SAMPLE_BYTES = 3_000_000


def source_files() -> list[Path]:
    """Return the library's files in a fixed order. Raises DataError where this Python ships none."""
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for folder, inner, names in os.walk(root):
        inner[:] = [name for name in inner if name not in SKIPPED]  # site-packages is large: not even walked
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    files.sort()
    if len(files) < 100:
        raise DataError(
            f"data.source = stdlib, but this Python has only {len(files)} library source files; use data=synthetic"
        )
    return files


def load(cache: str | Path, vocab_size: int, held_out: float) -> tuple[Tokenizer, np.ndarray, np.ndarray]:
    """Return tokenizer, training tokens and held-out tokens (int32, memory-mapped), preparing them the first time."""
    root, files = Path(sysconfig.get_path("stdlib")), source_files()
    digest = hashlib.blake2b(f"{VERSION}/{vocab_size}/{held_out}".encode(), digest_size=8)
    for path in files:
        digest.update(f"{path.relative_to(root)}:{path.stat().st_size}".encode())
    folder = Path(cache) / f"stdlib-{digest.hexdigest()}"
    if not (folder / "meta.json").exists():
        _prepare(folder, root, files, vocab_size, held_out)
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    return tokenizer, _tokens(folder, "train"), _tokens(folder, "held_out")


def _tokens(folder: Path, name: str) -> np.ndarray:
    """Return a split as it was written. Raises: DataError: it is damaged."""
    path = folder / f"{name}.npy"
    try:
        meta = read_json_file(folder / "meta.json")
        try:
            count, sha256 = int(meta["tokens"][name]), str(meta["sha256"][name])
        except (KeyError, TypeError) as error:
            raise ValueError(f"meta.json does not say its {error}") from None
        if file_sha256(path) != sha256:
            raise ValueError("it is not what was written")
        return open_npy(path, np.dtype("<i4"), count, mapped=True)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({why_unread(error)}); remove {folder} to have it made again") from None


def is_held_out(name: str, share: float) -> bool:
    """Return whether the document called ``name`` is never trained on; about ``share`` of all names are."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "big") < share * 2**32


def _prepare(folder: Path, root: Path, files: list[Path], vocab_size: int, held_out: float) -> None:
    """Write the cache beside its place and rename it: two processes may start at once, either's result is complete."""
    by_text: dict[str, str] = {}  # text -> name: the library holds some files twice, and a copy must not be split off
    for path in files:
        by_text.setdefault(path.read_text(encoding="utf-8", errors="replace"), path.relative_to(root).as_posix())
    texts = list(by_text)
    split = [is_held_out(name, held_out) for name in by_text.values()]
    tokenizer = Tokenizer.train(_sample([t for t, out in zip(texts, split) if not out]), vocab_size)
    documents = tokenizer.encode_documents(texts)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=folder.name))
    except OSError as error:
        raise DataError(f"data.cache = {folder.parent} cannot be written ({error.strerror}); name another") from None
    try:
        tokenizer.save(temporary / "tokenizer.json")
        counts, sums = {}, {}
        for name, wanted in (("train", False), ("held_out", True)):
            chosen = [d for d, out in zip(documents, split) if out is wanted]
            tokens = np.concatenate(chosen) if chosen else np.zeros(0, np.int32)
            np.save(temporary / f"{name}.npy", tokens)
            counts[name], sums[name] = len(tokens), file_sha256(temporary / f"{name}.npy")
        write_json(temporary / "meta.json", {"files": len(texts), "tokens": counts, "sha256": sums})
        os.replace(temporary, folder)
    except OSError:
        if not (folder / "meta.json").exists():  # else another process was first, with the same content
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sample(texts: list[str]) -> list[str]:
    """Return every so manieth text, enough for the tokenizer to learn from."""
    stride = max(1, sum(map(len, texts)) // TOKENIZER_SAMPLE_BYTES)
    return texts[::stride]
