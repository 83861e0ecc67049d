"""Data settings -> what the trainer reads from."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from dsv3_megatron.data.exclude import Exclusion, read_exclusion
from dsv3_megatron.data.identity import DataIdentity
from dsv3_megatron.data.mixture.order import Mixture
from dsv3_megatron.data.mixture.phases import mixture_of
from dsv3_megatron.data.settings import DataSettings
from dsv3_megatron.data.source.held_out import SEED, HeldOut, HeldOutSource
from dsv3_megatron.data.source.samples import ORDER, Recall, SampleSource, Synthetic, TokenWindows
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


def build(settings: DataSettings, *, vocab_size: int, seed: int) -> Data:
    """Return the data of a run. Raises DataError when the source is missing or does not fit the model."""
    settings.check_source()
    exclusion = read_exclusion(settings.exclude) if settings.exclude else Exclusion()
    if settings.source == "indexed":
        return _shards(settings, vocab_size, seed, exclusion)
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
    from dsv3_megatron.data.source import stdlib  # each source imports what it needs: shards megatron-core

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


def _shards(settings: DataSettings, vocab_size: int, seed: int, exclusion: Exclusion) -> Data:
    from dsv3_megatron.data.source.blend import Blend  # shards need megatron-core, seconds to import
    from dsv3_megatron.data.source.fim import Middle
    from dsv3_megatron.data.source.indexed import PackedShards, PackingRule
    from dsv3_megatron.data.source.shard_table import check_files, open_table
    from dsv3_megatron.data.source.shards import TOKENIZER, read_manifest, stored_alike

    folder = settings.path
    assert folder is not None, "check_source lets no shards without a folder through"
    manifest = read_manifest(folder)
    table = open_table(folder, manifest)
    check_files(folder, table)
    tokenizer = Tokenizer.load(settings.tokenizer or Path(folder) / TOKENIZER)
    _check_tokenizer(settings, tokenizer, manifest.tokenizer_sha256, vocab_size)
    if not stored_alike(manifest.vocab_size, tokenizer.vocab_size):
        raise DataError(
            f"data.path = {folder} was prepared for {manifest.vocab_size} ids, and its tokenizer has ids up to "
            f"{tokenizer.vocab_size - 1}, which do not fit what its files hold; prepare the shards anew"
        )
    fim = None
    if settings.fim_rate:
        begin, hole, end = tokenizer.fim_begin, tokenizer.fim_hole, tokenizer.fim_end
        if begin is None or hole is None or end is None:
            raise DataError(
                f"data.fim_rate = {settings.fim_rate}, but the tokenizer of {folder} has no fill-in-the-middle tokens; "
                "set data.fim_rate=0"
            )
        fim = Middle(begin, hole, end, seed)
    assert tokenizer.end is not None, "Tokenizer.load refuses one without an end token"
    start = tokenizer.begin if settings.start_token == "begin" and tokenizer.begin is not None else tokenizer.end
    packed = partial(
        PackedShards,
        start_token=start,
        pad_token=tokenizer.end if tokenizer.pad is None else tokenizer.pad,
        cache=settings.cache,
        isolate=settings.isolate_documents,
    )
    rule = PackingRule(settings.sequence_length, seed, settings.fim_rate, fim)
    train = {
        source.name: packed(folder, list(map(table.row, table.range_of(n, "train"))), rule, name=source.name)
        for n, source in enumerate(manifest.sources)
        if source.shards["train"].shards
    }
    if not train:
        raise DataError(f"data.path = {folder} holds no training document; prepare it with a lower held_out")
    given = {source.name: source.weight for source in manifest.sources}
    curve = mixture_of(settings, {name: (given[name], source.count) for name, source in train.items()})
    kept = {name: source for name, source in train.items() if name in curve.names}
    blend = Blend(kept, Mixture(curve, settings.sequence_length), settings.at_source_end)
    notes = tuple(f"source {name} of {folder} is in no phase of the mixture, and is not read"
                  for name in train if name not in kept)  # fmt: skip
    out_rule = PackingRule(settings.sequence_length, SEED)  # held-out text is read as it stands
    out = {
        source.name: packed(
            folder, list(map(table.row, table.range_of(n, "held_out"))), out_rule, name=f"{source.name}/held_out"
        )
        for n, source in enumerate(manifest.sources)
        if source.shards["held_out"].shards
    }
    if not out:
        raise DataError(f"data.path = {folder} holds no held-out document; prepare it with a higher held_out")
    parts = [HeldOutSource(name, source, source.count) for name, source in out.items()]
    tokens = sum(source.shards["train"].tokens for source in manifest.sources)
    name = f"shards {manifest.table_sha256[:8]} ({tokens:,} tokens)"
    identity = DataIdentity(manifest.table_sha256, name, ORDER)
    return Data(blend, HeldOut(parts, settings.held_out_sequences), tokenizer, identity, exclusion, notes)


def _check_tokenizer(settings: DataSettings, tokenizer: Tokenizer, sha256: str, vocab_size: int) -> None:
    if tokenizer.sha256 != sha256:
        raise DataError(
            f"data.tokenizer = {settings.tokenizer or f'{settings.path}/tokenizer.json'} is not the tokenizer that "
            f"{settings.path} was made with; set data.tokenizer=null, or prepare the shards anew"
        )
    assert settings.path is not None, "check_source lets no shards without a folder through"
    check_rows(tokenizer, vocab_size, settings.path)
