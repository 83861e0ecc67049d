"""Token shards -> packed samples, numbered.

A document is a stream of targets, its tokens and the end token; its inputs are the start token and the stream without
its last. So every token of a document is a target exactly once, whatever piece it falls into, and no token is
predicted from another document's end.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dsv3_megatron.data.source.fim import MARKS, Middle
from dsv3_megatron.data.source.packing import best_fit, cut
from dsv3_megatron.data.source.samples import Sample, permuted
from dsv3_megatron.data.source.shard_table import ShardRow
from dsv3_megatron.data.source.shards import open_shard
from dsv3_megatron.run.exclusive import exclusive
from parallel.errors import DataError

VERSION = 1  # of the packing kept in the cache


@dataclass(frozen=True)
class Packing:
    """What every packed sequence of a shard is made of."""

    pieces: np.ndarray  # [pieces, 4] int64: document, offset, length, rearranged (0 or 1)
    starts: np.ndarray  # [sequences + 1] int64: first piece of each sequence


@dataclass(frozen=True)
class PackingRule:
    """What decides a packing beside the shard."""

    sequence_length: int
    seed: int
    fim_rate: float = 0.0
    fim: Middle | None = None


class PackedShards:
    """The packed samples of one source, shuffled anew every epoch, or in order."""

    def __init__(
        self,
        folder: str | Path,
        shards: list[ShardRow],
        rule: PackingRule,
        *,
        name: str,
        start_token: int,
        pad_token: int,
        cache: str,
        isolate: bool,
        shuffle: bool = True,
    ):
        self._rule, self._name, self._isolate, self._shuffle = rule, name, isolate, shuffle
        self._start, self._pad = start_token, pad_token
        self._keys = [int(shard.bin_sha256.hex()[:12], 16) for shard in shards]
        self._data = [open_shard(folder, shard) for shard in shards]
        self._packings = [
            load_packing(cache, shard, data.sequence_lengths, rule, key)
            for shard, data, key in zip(shards, self._data, self._keys)
        ]
        sequences = np.asarray([len(p.starts) - 1 for p in self._packings], dtype=np.int64)
        self._ends = np.cumsum(sequences)
        self.count = int(self._ends[-1]) if len(sequences) else 0

    def sample(self, number: int) -> Sample:
        """Return sample ``number``; after ``count`` of them the next epoch begins."""
        epoch, index = divmod(number, self.count)
        if self._shuffle:
            index = permuted(index, self.count, f"{self._rule.seed}/{self._name}/{epoch}")
        shard = int(np.searchsorted(self._ends, index, side="right"))
        within = index - (int(self._ends[shard - 1]) if shard else 0)
        return self._build(shard, within)

    def _build(self, shard: int, sequence: int) -> Sample:
        length, packing = self._rule.sequence_length, self._packings[shard]
        tokens = np.full(length, self._pad, dtype=np.int64)
        labels = np.full(length, self._pad, dtype=np.int64)
        weights = np.zeros(length, dtype=np.float32)
        documents = np.zeros(length, dtype=np.int32) if self._isolate else None
        at = 0
        pieces = packing.pieces[packing.starts[sequence] : packing.starts[sequence + 1]]
        for order, (document, offset, size, rearranged) in enumerate(pieces.tolist()):
            inputs, targets = self._piece(shard, document, offset, size, bool(rearranged))
            here = slice(at, at + size)
            tokens[here], labels[here], weights[here] = inputs, targets, 1.0
            if documents is not None:
                documents[here] = order
            at += size
        if documents is not None:
            documents[at:] = len(pieces)  # what fills the sequence is a document of its own
        return Sample(tokens, labels, weights, documents)

    def _piece(
        self, shard: int, document: int, offset: int, size: int, rearranged: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return (inputs, targets) of ``size`` places of a document's stream."""
        data = self._data[shard]
        before = min(offset, 1)  # a piece that goes on from another begins with the token before it
        if rearranged:
            stream = self._rearranged(shard, document, offset - before, size + before)
        else:
            stream = data.get(document, offset=offset - before, length=size + before)
        targets = stream[before:]
        first = stream[0] if before else self._start
        return np.concatenate([[first], targets[:-1]]), targets

    def _rearranged(self, shard: int, document: int, offset: int, size: int) -> np.ndarray:
        """Return places ``offset`` to ``offset + size`` of a document in fill-in-the-middle order."""
        fim, data = self._rule.fim, self._data[shard]
        assert fim is not None, "nothing is rearranged without a rule"
        length = int(data.sequence_lengths[document])
        found, at = [], 0
        for segment in fim.segments(length, fim.cuts(length - 1, document, self._keys[shard])):
            start, stop = (0, 1) if isinstance(segment, int) else segment
            low, high = max(offset - at, 0), min(offset + size - at, stop - start)
            at += stop - start
            if low < high:
                found.append(
                    np.asarray([segment])
                    if isinstance(segment, int)
                    else data.get(document, offset=start + low, length=high - low)
                )
        return np.concatenate(found)


def make_packing(lengths: np.ndarray, rule: PackingRule, key: int) -> Packing:
    """Return the packing of a shard's documents. ``lengths`` count the end token; ``key`` names the shard."""
    lengths = np.asarray(lengths, dtype=np.int64)
    chosen = np.zeros(len(lengths), dtype=bool)
    if rule.fim_rate and rule.fim is not None:
        chosen = rule.fim.chosen(len(lengths), rule.fim_rate, key)
    document, offset, length = cut(lengths + MARKS * chosen, rule.sequence_length)
    bins = best_fit(length, rule.sequence_length)
    # Best fit sorts by length, and no position of a sequence should mean a length.
    mixed = np.random.default_rng([rule.seed, key, 2]).permutation(len(bins))
    order = mixed[np.argsort(bins[mixed], kind="stable")]
    pieces = np.stack([document, offset, length, chosen[document].astype(np.int64)], axis=1)[order]
    starts = np.concatenate([[0], np.cumsum(np.bincount(bins, minlength=0))]).astype(np.int64)
    return Packing(pieces.astype(np.int64), starts)


def load_packing(cache: str | Path, shard: ShardRow, lengths: np.ndarray, rule: PackingRule, key: int) -> Packing:
    """Return the packing of a shard, memory-mapped from the cache; the first process to ask makes it."""
    what = f"{VERSION}/{shard.idx_sha256.hex()}/{key}/{rule}"
    folder = Path(cache) / f"packing-{hashlib.blake2b(what.encode(), digest_size=12).hexdigest()}"
    with _one_at_a_time(folder):
        if not folder.exists():
            packing = make_packing(lengths, rule, key)
            temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=folder.name))
            try:
                np.save(temporary / "pieces.npy", packing.pieces)
                np.save(temporary / "starts.npy", packing.starts)
                with _unless_published(folder):
                    os.replace(temporary, folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    return Packing(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("pieces", "starts")))


@contextmanager
def _unless_published(folder: Path) -> Iterator[None]:
    """Take the folder of another machine, which its lock may not reach: both made the same."""
    try:
        yield
    except OSError:
        if not folder.exists():
            raise


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Let the processes of a machine make a cache entry one after another, so that only the first does the work."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        waiting = ExitStack()
        waiting.enter_context(exclusive(folder.parent / "packing.lock"))
    except OSError as error:
        raise DataError(f"data.cache = {folder.parent} cannot be written ({error.strerror}); name another") from None
    with waiting:
        yield
