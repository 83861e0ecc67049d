"""Data settings -> what the trainer reads from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from dsv3_megatron.data.settings import DataSettings
from dsv3_megatron.data.source import stdlib
from dsv3_megatron.data.source.blend import Blend
from dsv3_megatron.data.source.indexed import PackedShards
from dsv3_megatron.data.source.open_files import OpenFiles
from dsv3_megatron.data.source.packing_files import OpenPacking
from dsv3_megatron.data.source.samples import Recall, SampleSource, Synthetic, TokenWindows
from dsv3_megatron.data.source.shard_folder import ShardFolder
from dsv3_megatron.data.tokenizer import Tokenizer
from dsv3_megatron.data.tokenizer_identity import check_rows
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
        if self.tokenizer is None or not self.held_out_count:
            return None
        lengths = self.tokenizer.token_bytes()
        samples = [self.held_out.sample(n) for n in range(self.held_out_count)]
        return float(lengths[np.concatenate([s.labels[s.weights > 0] for s in samples])].mean())


def build(
    settings: DataSettings,
    *,
    vocab_size: int,
    seed: int,
    folder: ShardFolder | None = None,
    place: Path | None = None,
) -> Data:
    """Return the data of a run.

    Args:
        folder: of shards, where it was read before; None = it is read here.
        place: of packings that the ranks have made ready together; None = this process makes what is missing.
    Raises: DataError: the source is missing or does not fit the model.
    """
    length = settings.sequence_length
    settings.check_source()
    if settings.source == "synthetic":
        # The held-out stream has a seed of its own: no sample of it is ever trained on but by chance.
        return Data(Synthetic(vocab_size, length, seed), Synthetic(vocab_size, length, seed + 1), 32, None)
    if settings.source == "recall":
        if length < (least := 8 * Recall.SLOTS):
            raise DataError(f"data.sequence_length = {length}, but data=recall needs {least} tokens at least; raise it")
        if vocab_size <= (least := Recall.FIRST_NOISE):
            raise DataError(f"model.vocab_size = {vocab_size}, but data=recall needs {least + 1} at least; raise it")
        return Data(Recall(vocab_size, length, seed), Recall(vocab_size, length, seed + 1), 32, None)
    if settings.source == "stdlib":
        tokenizer, train, held_out = stdlib.load(settings.cache, vocab_size, settings.held_out)
        return _windows(tokenizer, train, held_out, settings, seed)
    return _shards(settings, vocab_size, seed, folder, place)


def _windows(tokenizer: Tokenizer, train: np.ndarray, held_out: np.ndarray, settings: DataSettings, seed: int) -> Data:
    length = settings.sequence_length
    for name, tokens in (("training", train), ("held-out", held_out)):
        if len(tokens) <= length:
            raise DataError(
                f"data.sequence_length = {length}, but there are only {len(tokens)} {name} tokens; "
                "shorten it, or change data.held_out"
            )
    end = tokenizer.end if settings.isolate_documents else None
    out = TokenWindows(held_out, length, seed, shuffle=False, end=end)
    return Data(TokenWindows(train, length, seed, end=end), out, min(out.count, HELD_OUT_SEQUENCES), tokenizer)


def _shards(settings: DataSettings, vocab_size: int, seed: int, folder: ShardFolder | None, place: Path | None) -> Data:
    folder = folder or ShardFolder.of(settings)
    tokenizer, manifest = folder.tokenizer, folder.manifest
    check_rows(tokenizer, vocab_size, folder.path)
    if place is None:  # one process: no other makes a share
        place = folder.choose_place()
        folder.make_ready(place)
        folder.seal(place)
    files = OpenFiles()
    opened = [OpenPacking(packing, files) for packing in folder.packings(place)]
    assert tokenizer.end is not None, "Tokenizer.load refuses one without an end token"
    start = tokenizer.begin if settings.start_token == "begin" and tokenizer.begin is not None else tokenizer.end
    packed = partial(
        PackedShards,
        seed=seed,
        start_token=start,
        pad_token=tokenizer.end if tokenizer.pad is None else tokenizer.pad,
        isolate=settings.isolate_documents,
        files=files,
    )
    names = [source.name for source in manifest.sources]
    train = {
        name: packed([packing], name=name)
        for packing in opened
        if packing.files.split == "train"
        for name in (names[packing.files.source],)
    }
    if not train:
        raise DataError(f"data.path = {folder.path} holds no training document; prepare it with a lower held_out")
    given = {source.name: source.weight for source in manifest.sources}
    weights = _weights(settings, {name: (given[name], source.count) for name, source in train.items()})
    blend = Blend(list(train.values()), [weights[name] for name in train], list(train))
    out = [packing for packing in opened if packing.files.split == "held_out"]
    held_out = packed(out, name="held_out", shuffle=False)
    if not held_out.count:
        raise DataError(f"data.path = {folder.path} holds no held-out document; prepare it with a higher held_out")
    return Data(blend, held_out, min(held_out.count, HELD_OUT_SEQUENCES), tokenizer)


def _weights(settings: DataSettings, sources: dict[str, tuple[float | None, int]]) -> dict[str, float]:
    """Return the weight of each source that takes part: the recipe's, else the manifest's, else by size."""
    if settings.weights is not None:
        return dict(settings.weights)
    return {name: count if weight is None else weight for name, (weight, count) in sources.items()}
