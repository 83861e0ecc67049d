"""Best-fit packing: documents into sequences with hardly any cut and hardly any gap (arXiv 2404.10830).

Concatenate-and-cut tears most documents; here only a document longer than a sequence is cut, and each piece goes to
the fullest sequence that still has room for it, long pieces first. Over the millions of documents of a shard that
leaves a fraction of a percent of the places empty.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from dsv3_megatron.data.source.fim import MARKS, Middle
from dsv3_megatron.data.source.hashing import hashed, key_of
from dsv3_megatron.data.source.shards import Split

# All that reading a piece needs beside the tokens: a training run opens no .idx.
PIECE = np.dtype(
    [
        ("document", "<u4"),  # its number in the shard
        ("position", "<u8"),  # where the document begins in the .bin, in tokens
        ("document_length", "<u4"),  # in the .bin, with its end token
        ("offset", "<u4"),  # of the piece in the document's stream, which marks make longer
        ("length", "<u4"),
        ("rearranged", "u1"),  # 1 = the stream is the document in fill-in-the-middle order
    ]
)


@dataclass(frozen=True)
class PackingRule:
    """What decides a packing beside the shard."""

    sequence_length: int
    fim_rate: float = 0.0
    fim: Middle | None = None

    def of(self, split: Split) -> PackingRule:
        """Return the rule of a split: held-out text is read as it stands."""
        return self if split == "train" else replace(self, fim_rate=0.0, fim=None)


@dataclass(frozen=True)
class Packing:
    """What every packed sequence of a shard is made of."""

    pieces: np.ndarray  # [pieces] of PIECE, sequence after sequence
    starts: np.ndarray  # [sequences + 1] uint32: first piece of each sequence


def pack(lengths: np.ndarray, rule: PackingRule, shard: bytes) -> Packing:
    """Return the packing of a shard's documents.

    Args:
        lengths: [documents], the end token counted.
        shard: SHA-256 of its .bin, which decides what looks random.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    chosen = np.zeros(len(lengths), dtype=bool)
    if rule.fim_rate and rule.fim is not None:
        chosen = rule.fim.chosen(len(lengths), rule.fim_rate, shard)
    document, offset, length = cut(lengths + MARKS * chosen, rule.sequence_length)
    bins = best_fit(length, rule.sequence_length)
    # Best fit sorts by length, and no place in a sequence should mean a length.
    order = np.lexsort((hashed(key_of("order in a sequence", shard.hex()), np.arange(len(bins))), bins))
    pieces = np.empty(len(bins), dtype=PIECE)
    pieces["document"], pieces["offset"], pieces["length"] = document, offset, length
    pieces["position"] = (np.cumsum(lengths) - lengths)[document]
    pieces["document_length"], pieces["rearranged"] = lengths[document], chosen[document]
    starts = np.concatenate([[0], np.cumsum(np.bincount(bins, minlength=0))])
    return Packing(pieces[order], starts.astype(np.uint32))


def cut(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the pieces of documents as (document, offset, length), each at most ``capacity`` long.

    Args:
        lengths: [documents], >= 1.
    Returns: three arrays [pieces], in the order of documents; only documents above the capacity have several pieces.
    """
    pieces = -(-lengths // capacity)
    document = np.repeat(np.arange(len(lengths)), pieces)
    first = np.cumsum(pieces) - pieces
    offset = (np.arange(len(document)) - first[document]) * capacity
    return document, offset, np.minimum(lengths[document] - offset, capacity)


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Return the bin of each piece [pieces], bins numbered from 0 in the order in which they are opened.

    Best-fit decreasing: the longest piece first, each into the fullest bin that has room, a new one where none has.
    All pieces of one length are placed together, into all bins of one fill at once, so that the work grows with the
    number of different lengths and not with the number of documents.

    Args:
        lengths: [pieces], 1 to ``capacity``.
        capacity: places of a bin.
    """
    assert len(lengths) == 0 or (lengths.min() >= 1 and lengths.max() <= capacity), (lengths.min(), lengths.max())
    chosen = np.empty(len(lengths), dtype=np.int64)
    by_length = np.argsort(-lengths, kind="stable")
    room: dict[int, list[np.ndarray]] = {}  # free places -> bins that have so many
    have = 0  # bit r is set where room[r] is not empty
    opened = 0
    ends = np.flatnonzero(np.diff(lengths[by_length], append=0))  # the last piece of each length
    for start, stop in zip([0, *(ends[:-1] + 1).tolist()], (ends + 1).tolist()):
        waiting, length = by_length[start:stop], int(lengths[by_length[start]])
        while len(waiting):
            fitting = have >> length
            if fitting:
                free = length + ((fitting & -fitting).bit_length() - 1)
                bins = np.concatenate(room.pop(free))
                have &= ~(1 << free)
            else:
                free = capacity
                bins = np.arange(opened, opened + -(-len(waiting) // (capacity // length)))
                opened += len(bins)
            # A bin that was just the best fit stays so until it has no room: it takes as many as it can.
            each = free // length
            filled = np.repeat(bins, each)[: len(waiting)]
            chosen[waiting[: len(filled)]] = filled
            waiting = waiting[len(filled) :]
            full, rest = divmod(len(filled), each)
            for some, left in (
                (bins[:full], free - each * length),
                (bins[full : full + 1], free - rest * length),
                (bins[full + 1 :], free),
            ):
                if len(some) and left:
                    room.setdefault(left, []).append(some)
                    have |= 1 << left
    return chosen
