"""Data settings -> what the trainer reads from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dsv3_megatron.data.samples import SampleSource, Synthetic, TokenWindows
from dsv3_megatron.data.settings import DataSettings
from dsv3_megatron.data.tokenizer import Tokenizer
from parallel.errors import DataError

HELD_OUT_SEQUENCES = 64  # evaluated at most, so that an evaluation costs about as much as a few steps


@dataclass(frozen=True)
class Data:
    """A run's data: training samples, held-out samples, and how to read tokens as text."""

    train: SampleSource
    held_out: SampleSource
    held_out_count: int
    tokenizer: Tokenizer | None

    def bytes_per_token(self) -> float | None:
        """Return the bytes of text a held-out token stands for, on average over what is evaluated; None if no text."""
        if self.tokenizer is None:
            return None
        lengths = self.tokenizer.token_bytes()
        targets = np.concatenate([self.held_out.sample(n)[1:] for n in range(self.held_out_count)])
        return float(lengths[targets].mean())


def build(settings: DataSettings, *, vocab_size: int, seed: int) -> Data:
    """Return the data of a run. Raises DataError when the source is missing or does not fit the model."""
    length = settings.sequence_length
    if settings.source == "synthetic":
        # The held-out stream has a seed of its own: no sample of it is ever trained on but by chance.
        return Data(Synthetic(vocab_size, length, seed), Synthetic(vocab_size, length, seed + 1), 32, None)
    if settings.source == "stdlib":
        from dsv3_megatron.data import stdlib

        tokenizer, train, held_out = stdlib.load(settings.cache, vocab_size, settings.held_out)
        return _windows(tokenizer, train, held_out, settings, seed)
    raise DataError(
        f"data.source = {settings.source} needs token shards (data.path = {settings.path}), whose reader is not here "
        "yet; use data=stdlib or data=synthetic"
    )


def _windows(tokenizer: Tokenizer, train: np.ndarray, held_out: np.ndarray, settings: DataSettings, seed: int) -> Data:
    length = settings.sequence_length
    for name, tokens in (("training", train), ("held-out", held_out)):
        if len(tokens) <= length:
            raise DataError(
                f"data.sequence_length = {length}, but there are only {len(tokens)} {name} tokens; "
                "shorten it, or change data.held_out"
            )
    out = TokenWindows(held_out, length, seed, shuffle=False)
    return Data(TokenWindows(train, length, seed), out, min(out.count, HELD_OUT_SEQUENCES), tokenizer)
