"""Data settings -> what the trainer reads from."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from dsv3_megatron.data.checked.shards import CheckedShards
from dsv3_megatron.data.exclude import Exclusion, find_excluded, read_exclusion
from dsv3_megatron.data.identity import DataIdentity
from dsv3_megatron.data.mixture.blend import Blend
from dsv3_megatron.data.mixture.order import Mixture
from dsv3_megatron.data.mixture.phases import mixture_of
from dsv3_megatron.data.settings import DataSettings
from dsv3_megatron.data.source import stdlib
from dsv3_megatron.data.source.held_out import SEED, HeldOut, HeldOutSource
from dsv3_megatron.data.source.indexed import PackedShards
from dsv3_megatron.data.source.open_files import OpenFiles
from dsv3_megatron.data.source.packing_files import OpenPacking
from dsv3_megatron.data.source.samples import ORDER, Recall, SampleSource, Synthetic, TokenWindows
from dsv3_megatron.data.source.shard_folder import ShardFolder
from dsv3_megatron.data.tokenizer import Tokenizer
from dsv3_megatron.data.tokenizer_identity import check_rows
from parallel.errors import DataError

_ENDLESS = 32  # sequences that are held out of a source which makes as many as it is asked for


@dataclass(frozen=True)
class Data:
    """A run's data: training samples, the held-out ones that are evaluated, how to read tokens as text, and which text
    it is."""

    train: SampleSource
    held_out: HeldOut
    tokenizer: Tokenizer | None
    identity: DataIdentity | None = None  # None where samples are made from a seed
    exclusion: Exclusion = field(default_factory=Exclusion)  # what is left out
    notes: tuple[str, ...] = ()  # what a person should know of the sources, in a line each

    def held_out_bytes(self) -> np.ndarray | None:
        """Return how many bytes of text each held-out sequence that is evaluated predicts, [count] int64; None if no
        text."""
        if self.tokenizer is None:
            return None
        lengths = self.tokenizer.token_bytes()
        samples = (self.held_out.sample(n) for n in range(self.held_out.count))
        return np.asarray([lengths[s.labels[s.weights > 0]].sum() for s in samples], dtype=np.int64)


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
    settings.check_source()
    exclusion = read_exclusion(settings.exclude) if settings.exclude else Exclusion()
    if settings.source == "indexed":
        return _shards(settings, vocab_size, seed, exclusion, folder, place)
    if exclusion.documents:
        raise DataError(
            f"data.exclude = {exclusion.path}, line {exclusion.documents[0].line} names a document, which is for token "
            f"shards; data={settings.source} knows samples alone"
        )
    return replace(_without_shards(settings, vocab_size, seed), exclusion=exclusion)


def _without_shards(settings: DataSettings, vocab_size: int, seed: int) -> Data:
    length = settings.sequence_length
    if settings.source == "synthetic":
        # The held-out stream has a seed of its own: no sample of it is ever trained on but by chance.
        return _made(settings, Synthetic(vocab_size, length, seed), Synthetic(vocab_size, length, seed + 1))
    if settings.source == "recall":
        if length < (least := 8 * Recall.SLOTS):
            raise DataError(f"data.sequence_length = {length}, but data=recall needs {least} tokens at least; raise it")
        if vocab_size <= (least := Recall.FIRST_NOISE):
            raise DataError(f"model.vocab_size = {vocab_size}, but data=recall needs {least + 1} at least; raise it")
        return _made(settings, Recall(vocab_size, length, seed), Recall(vocab_size, length, seed + 1))
    tokenizer, tokens, held_out = stdlib.load(settings.cache, vocab_size, settings.held_out)
    return _windows(tokenizer, tokens, held_out, settings, seed)


def _made(settings: DataSettings, train: SampleSource, held_out: SampleSource) -> Data:
    out = HeldOutSource(settings.source, held_out, _ENDLESS)
    return Data(train, HeldOut([out], settings.held_out_sequences), None)


def _windows(tokenizer: Tokenizer, train: np.ndarray, held_out: np.ndarray, settings: DataSettings, seed: int) -> Data:
    length = settings.sequence_length
    for name, tokens in (("training", train), ("held-out", held_out)):
        if len(tokens) <= length:
            raise DataError(
                f"data.sequence_length = {length}, but there are only {len(tokens)} {name} tokens; "
                "shorten it, or change data.held_out"
            )
    end = tokenizer.end if settings.isolate_documents else None
    out = TokenWindows(held_out, length, SEED, end=end)
    parts = HeldOut([HeldOutSource(settings.source, out, out.count)], settings.held_out_sequences)
    digest = hashlib.sha256(np.ascontiguousarray(train).data).hexdigest()
    name = f"the standard library's {len(train):,} tokens ({digest[:8]})"
    identity = DataIdentity(digest, name, ORDER)
    return Data(TokenWindows(train, length, seed, end=end), parts, tokenizer, identity)


def _shards(
    settings: DataSettings,
    vocab_size: int,
    seed: int,
    exclusion: Exclusion,
    folder: ShardFolder | None,
    place: Path | None,
) -> Data:
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
        shards=CheckedShards(folder.path, folder.table, manifest.vocab_size, files, tokenizer.vocab_size),
        excluded=find_excluded(folder.path, manifest, folder.table, exclusion) if exclusion.documents else None,
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
    curve = mixture_of(settings, {name: (given[name], source.count) for name, source in train.items()})
    kept = {name: source for name, source in train.items() if name in curve.names}
    blend = Blend(kept, Mixture(curve, settings.sequence_length), settings.at_source_end)
    notes = [f"source {name} of {folder.path} is in no phase of the mixture, and is not read"
             for name in names if name not in kept]  # fmt: skip
    if not manifest.has_sums:
        notes.append(
            f"warning: {folder.path} has no checksums of blocks, so damage to its shards is not noticed; "
            f"python launcher/data.py check data={folder.path} adds them"
        )
    out = {
        names[packing.files.source]: packed([packing], name=f"{names[packing.files.source]}/held_out", seed=SEED)
        for packing in opened
        if packing.files.split == "held_out"
    }
    if not out:
        raise DataError(f"data.path = {folder.path} holds no held-out document; prepare it with a higher held_out")
    parts = [HeldOutSource(name, source, source.count) for name, source in out.items()]
    tokens = sum(source.shards["train"].tokens for source in manifest.sources)
    name = f"shards {manifest.table_sha256[:8]} ({tokens:,} tokens)"
    identity = DataIdentity(manifest.table_sha256, name, ORDER)
    return Data(blend, HeldOut(parts, settings.held_out_sequences), tokenizer, identity, exclusion, tuple(notes))
