"""Token shards -> packed samples, numbered.

A document is a stream of targets, its tokens and the end token; its inputs are the start token and the stream without
its last. So every token of a document is a target exactly once, whatever piece it falls into, and no token is
predicted from another document's end.

A shard is opened when a sample of it is read, and closed again: what a rank holds does not grow with the shards.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from dsv3_megatron.data.checked.shards import CheckedShards
from dsv3_megatron.data.source.packing_files import OpenPacking
from dsv3_megatron.data.source.samples import Sample, permuted


class Piece(NamedTuple):
    """A stretch of a document in a sequence.

    Args:
        shard: its number in the table of the folder.
        document: its number in the shard.
        offset: where the piece begins in the document's stream of targets.
        length: in tokens.
        rearranged: whether the stream is the document in fill-in-the-middle order.
        at: where the piece begins in the sequence.
        position: where the document begins in the shard's .bin, in tokens.
        document_length: in the .bin, with the end token.
        excluded: whether its place is left empty.
    """

    shard: int
    document: int
    offset: int
    length: int
    rearranged: bool
    at: int
    position: int
    document_length: int
    excluded: bool = False


class Excluded(Protocol):
    """Documents that are not to be read."""

    def documents_of(self, shard: int) -> np.ndarray:
        """Return the numbers of a shard's documents, ascending. ``shard``: its number in the table."""


class PackedShards:
    """The packed samples of one source or several, shuffled anew every epoch, or in order."""

    def __init__(
        self,
        packings: Sequence[OpenPacking],
        *,
        name: str,
        seed: int,
        start_token: int,
        pad_token: int,
        isolate: bool,
        shards: CheckedShards,
        shuffle: bool = True,
        excluded: Excluded | None = None,
    ):
        """Read the sequences of ``packings``, of one folder and rule, as one row.

        Args:
            name: with the seed, what names the order.
            start_token: what a document's first token is predicted from.
            pad_token: fills sequences up, and stands for excluded documents; both weigh nothing.
            isolate: number the documents of a sequence.
            shards: what reads their tokens, shared by all sources of a run.
        """
        self._packings, self._name, self._seed = packings, name, seed
        self._start, self._pad, self._isolate, self._shuffle = start_token, pad_token, isolate, shuffle
        self._shards, self._excluded = shards, excluded
        self._ends = np.cumsum([int(packing.sequences[-1]) for packing in packings], dtype=np.int64)
        self.count = int(self._ends[-1]) if len(packings) else 0

    def pieces(self, number: int) -> list[Piece]:
        """Return what sample ``number`` is made of, in order, without reading tokens."""
        epoch, index = divmod(number, self.count)
        if self._shuffle:
            index = permuted(index, self.count, f"{self._seed}/{self._name}/{epoch}")
        which = int(np.searchsorted(self._ends, index, side="right"))
        shard, found = self._packings[which].find(index - (int(self._ends[which - 1]) if which else 0))
        left_out = None if self._excluded is None else self._excluded.documents_of(shard)
        pieces, at = [], 0
        for document, position, document_length, offset, length, rearranged in found.tolist():
            excluded = left_out is not None and _holds(left_out, document)
            pieces.append(
                Piece(shard, document, offset, length, bool(rearranged), at, position, document_length, excluded)
            )
            at += length
        return pieces

    def sample(self, number: int) -> Sample:
        """Return sample ``number``; after ``count`` of them the next epoch begins.

        Raises: DataError: a file is missing, cut or damaged.
        """
        length = self._packings[0].files.rule.sequence_length
        tokens = np.full(length, self._pad, dtype=np.int64)
        labels = np.full(length, self._pad, dtype=np.int64)
        weights = np.zeros(length, dtype=np.float32)
        documents = np.zeros(length, dtype=np.int32) if self._isolate else None
        pieces = self.pieces(number)
        for order, piece in enumerate(pieces):
            here = slice(piece.at, piece.at + piece.length)
            if documents is not None:
                documents[here] = order
            if not piece.excluded:
                tokens[here], labels[here] = self._stretch(piece)
                weights[here] = 1.0
        if documents is not None and pieces:  # what fills the sequence is a document of its own
            documents[pieces[-1].at + pieces[-1].length :] = len(pieces)
        return Sample(tokens, labels, weights, documents)

    def _stretch(self, piece: Piece) -> tuple[np.ndarray, np.ndarray]:
        """Return (inputs, targets) of a piece's places of its document's stream."""
        before = min(piece.offset, 1)  # a piece that goes on from another begins with the token before it
        read = self._rearranged if piece.rearranged else self._tokens
        stream = read(piece, piece.offset - before, piece.length + before)
        targets = stream[before:]
        first = stream[0] if before else self._start
        return np.concatenate([[first], targets[:-1]]), targets

    def _rearranged(self, piece: Piece, offset: int, size: int) -> np.ndarray:
        """Return places ``offset`` to ``offset + size`` of a document in fill-in-the-middle order."""
        packing = self._packings[0].files
        fim = packing.rule.fim
        assert fim is not None, "nothing is rearranged without a rule"
        cuts = fim.cuts(piece.document_length - 1, piece.document, packing.table.bin_sha256(piece.shard))
        found, at = [], 0
        for segment in fim.segments(piece.document_length, cuts):
            start, stop = (0, 1) if isinstance(segment, int) else segment
            low, high = max(offset - at, 0), min(offset + size - at, stop - start)
            at += stop - start
            if low < high:
                found.append(
                    np.asarray([segment]) if isinstance(segment, int) else self._tokens(piece, start + low, high - low)
                )
        return np.concatenate(found)

    def _tokens(self, piece: Piece, offset: int, size: int) -> np.ndarray:
        """Return ``size`` tokens of a document as it lies in its shard, from ``offset`` on."""
        return self._shards.tokens(piece.shard, piece.position + offset, size, piece.document)


def _holds(numbers: np.ndarray, number: int) -> bool:
    """Return whether ascending ``numbers`` hold a number."""
    place = int(np.searchsorted(numbers, number))
    return place < len(numbers) and int(numbers[place]) == number
