"""Fill-in-the-middle: a document told as prefix, suffix, middle, so that a model learns to fill a gap.

DeepSeek-V3 (arXiv 2412.19437 section 4.1): a tenth of the documents, whole, before packing, in the order
``<fim_begin> prefix <fim_hole> suffix <fim_end> middle <end>``. How the two cuts are drawn is not published; here both
are uniform over the places between tokens, as for a split drawn at random of all splits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dsv3_megatron.data.source.hashing import key_of, uniform

MARKS = 3  # tokens a document grows by


@dataclass(frozen=True)
class Middle:
    """The marks of a tokenizer, and the cuts of documents.

    Which documents are rearranged, and where they are cut, is a function of their shard's content and of their number
    in it, not of a run's seed: a packing serves every run.
    """

    begin: int
    hole: int
    end: int

    def chosen(self, documents: int, rate: float, shard: bytes) -> np.ndarray:
        """Return which of a shard's documents are rearranged: [documents] bool. ``shard``: SHA-256 of its .bin."""
        return uniform(key_of("fill in the middle", shard.hex()), np.arange(documents)) < rate

    def cuts(self, length: int, document: int, shard: bytes) -> tuple[int, int]:
        """Return where prefix and middle end, 0 <= first <= second <= length (the end token is not counted)."""
        drawn = uniform(key_of("cuts", shard.hex()), 2 * document + np.arange(2))
        first, second = sorted((drawn * (length + 1)).astype(int).tolist())
        return first, second

    def segments(self, length: int, cuts: tuple[int, int]) -> list[int | tuple[int, int]]:
        """Return the rearranged document as marks (ids) and stretches (start, stop) of the original.

        ``length`` counts the end token, which stays last.
        """
        first, second = cuts
        return [
            self.begin,
            (0, first),
            self.hole,
            (second, length - 1),
            self.end,
            (first, second),
            (length - 1, length),
        ]


def restored(tokens: np.ndarray, marks: Middle) -> np.ndarray:
    """Return the original of a rearranged document [tokens]; one that is not rearranged comes back as it is."""
    if not len(tokens) or tokens[0] != marks.begin:
        return tokens
    hole, end = (int(np.flatnonzero(tokens == mark)[0]) for mark in (marks.hole, marks.end))
    return np.concatenate([tokens[1:hole], tokens[end + 1 : -1], tokens[hole + 1 : end], tokens[-1:]])
