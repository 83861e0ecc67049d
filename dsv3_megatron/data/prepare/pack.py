"""Documents packed into sequences before a run does it: as a command of its own, or when preparing and merging end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dsv3_megatron.data.settings import DataSettings
from dsv3_megatron.data.source.open_files import OpenFiles
from dsv3_megatron.data.source.packing_files import OpenPacking
from dsv3_megatron.data.source.shard_folder import ShardFolder, packing_rule
from dsv3_megatron.data.tokenizer import Tokenizer
from dsv3_megatron.run.processes import in_processes

CACHE = str(DataSettings.model_fields["cache"].default)


@dataclass(frozen=True)
class PackAhead:
    """What to pack for; nothing by default.

    Args:
        lengths: tokens of a sequence, each as ``data.sequence_length``.
        fim_rate: as ``data.fim_rate``, for all of them.
    """

    lengths: tuple[int, ...] = ()
    fim_rate: float = 0.0

    def check(self, tokenizer: Tokenizer, name: str | Path) -> None:
        """Raise DataError where documents of a tokenizer, called ``name``, cannot be packed so."""
        for length in self.lengths:
            packing_rule(length, self.fim_rate, tokenizer, name)

    def settings(self, folder: str | Path, cache: str | Path = CACHE) -> Iterator[DataSettings]:
        """Yield for each length the settings of a run that reads the folder so."""
        for length in self.lengths:
            yield DataSettings(
                source="indexed", path=str(folder), cache=str(cache), sequence_length=length, fim_rate=self.fim_rate
            )

    def is_made(self, folder: Path) -> bool:
        """Return whether all is there that :meth:`make` makes."""
        return all(
            packing.index.exists()
            for found in map(ShardFolder.of, self.settings(folder))
            for packing in found.packings(found.beside)
        )

    def make(self, folder: Path, workers: int, tell: Callable[[str], None] = lambda _: None) -> None:
        """Pack what is not packed, beside the shards.

        Raises: DataError: it cannot be written there, or a shard is damaged.
        """
        for settings in self.settings(folder):
            tell(f"packing into sequences of {settings.sequence_length:,} tokens")
            found = ShardFolder.of(settings)
            # never elsewhere: that the disk is full is to be said
            pack_share(settings, found.beside, (1, 1), workers)
            packed(found, found.beside)

    def results(self, folder: str | Path) -> list[str]:
        """Return what :meth:`make` has made, a line for each length."""
        return [packed(found, found.beside) for found in map(ShardFolder.of, self.settings(folder))]


def pack_share(settings: DataSettings, place: Path, part: tuple[int, int], workers: int) -> None:
    """Make one part of the packings that a run with ``settings`` reads; :func:`packed` says when all are there.

    Args:
        place: folder of the packings.
        part: its number from 1, and how many there are: several nodes make one each.
    Raises: DataError: a shard is damaged, or the place cannot be written.
    """
    number, parts = part
    shares = [((number - 1) * workers + worker, parts * workers) for worker in range(workers)]
    in_processes(partial(_make_share, settings, place), shares, workers)


def packed(folder: ShardFolder, place: Path) -> str:
    """Say that the packings of a place are ready, and return in a line what they came to.

    Raises: DataError: some are missing.
    """
    folder.seal(place)
    files, packings = OpenFiles(), folder.packings(place)
    for packing in packings:
        packing.tidy()  # sealing does it too, unless a kill came between
    sequences = sum(int(OpenPacking(packing, files).sequences[-1]) for packing in packings)
    return f"{sequences:,} sequences of {folder.rule.sequence_length:,} tokens in {place}"


def _make_share(settings: DataSettings, place: Path, share: tuple[int, int]) -> None:
    ShardFolder.of(settings).make_ready(place, share)
