"""A folder of shards as a recipe reads it, and what must be there before it can be read: files and packings.

One process reads at once. Ranks go through it together: one chooses the place and tells the others, each makes its
share ready, and when all have, one seals; after that nothing that opening costs grows with the shards, but the table.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

from dsv3_megatron.data.mixture.phases import mixture_of_recipe
from dsv3_megatron.data.settings import DataSettings
from dsv3_megatron.data.source import packing_files
from dsv3_megatron.data.source.fim import Middle
from dsv3_megatron.data.source.packing import PackingRule
from dsv3_megatron.data.source.packing_files import PackingFiles
from dsv3_megatron.data.source.shard_table import check_files, check_table, open_table
from dsv3_megatron.data.source.shards import SPLITS, TOKENIZER, read_manifest, stored_alike
from dsv3_megatron.data.tokenizer import Tokenizer
from parallel.errors import DataError


class ShardFolder:
    """Shards, their tokenizer, and how they are packed."""

    def __init__(
        self,
        path: str | Path,
        rule: Callable[[Tokenizer], PackingRule],
        *,
        cache: str | Path,
        tokenizer: str | None = None,
        sources: Collection[str] | None = None,
    ):
        """Read manifest and table, whatever the number of shards.

        Args:
            rule: from the tokenizer, whose marks it needs.
            cache: where packings go if the folder cannot be written.
            tokenizer: another place where the folder's tokenizer lies; None = in it.
            sources: names of those that are trained on; None = all.
        Raises: DataError: the folder is not one of shards, or the tokenizer is not its own.
        """
        self.path, self.cache, self.sources = Path(path), cache, sources
        self.manifest = read_manifest(path)
        self.table = open_table(path, self.manifest)
        self.tokenizer = Tokenizer.load(tokenizer or self.path / TOKENIZER)
        if self.tokenizer.sha256 != self.manifest.tokenizer_sha256:
            given = f"data.tokenizer = {tokenizer}" if tokenizer else f"{self.path / TOKENIZER}"
            fix = "set data.tokenizer=null" if tokenizer else "restore that"
            raise DataError(
                f"{given} is not the tokenizer that {path} was made with; {fix}, or prepare the shards again"
            )
        if not stored_alike(self.manifest.vocab_size, self.tokenizer.vocab_size):
            raise DataError(
                f"data.path = {path} was prepared for {self.manifest.vocab_size} ids, and its tokenizer has ids up to "
                f"{self.tokenizer.vocab_size - 1}, which do not fit what its files hold; prepare the shards again"
            )
        self.rule = rule(self.tokenizer)

    @classmethod
    def of(cls, settings: DataSettings) -> ShardFolder:
        """Return the folder of a recipe. Raises: DataError: as above, or its tokenizer lacks marks."""
        assert settings.path is not None, "check_source lets no shards without a folder through"
        folder = cls(
            settings.path,
            lambda tokenizer: packing_rule(settings.sequence_length, settings.fim_rate, tokenizer, settings.path),
            cache=settings.cache,
            tokenizer=settings.tokenizer,
            sources=None if (given := mixture_of_recipe(settings)) is None else given.names,
        )
        known = [source.name for source in folder.manifest.sources if source.shards["train"].shards]
        if unknown := [name for name in folder.sources or () if name not in known]:
            key = "weights" if settings.mixture is None else "mixture"
            raise DataError(f"data.{key} names {unknown[0]}, but the sources are: {', '.join(known)}")
        return folder

    @property
    def beside(self) -> Path:
        """Where the packings lie if the folder can be written."""
        return self.path / packing_files.PACKINGS

    def choose_place(self) -> Path:
        """Return where the packings are kept; ask one process and tell the others.

        Those that are there already are taken where the folder cannot be written too.
        """
        if all(packing.index.exists() for packing in self.packings(self.beside)):
            return self.beside
        return packing_files.choose_place(self.path, self.cache)

    def packings(self, place: Path) -> list[PackingFiles]:
        """Return the packings that are needed, split after split: of the sources that are trained on, and of all
        held-out text."""
        return [
            PackingFiles(
                self.path,
                place,
                self.table,
                self.manifest.table_sha256,
                self.manifest.vocab_size,
                number,
                split,
                self.rule,
            )
            for split in SPLITS
            for number, source in enumerate(self.manifest.sources)
            if source.shards[split].shards
            and (split == "held_out" or self.sources is None or source.name in self.sources)
        ]

    def make_ready(
        self,
        place: Path,
        share: tuple[int, int] = (0, 1),
        progress: Callable[[int, int], None] = lambda *_: None,
        tell: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Look at a share of the files, and make what is missing of a share of the packings.

        Args:
            place: what :meth:`choose_place` returned, to all ranks the same.
            share: (rank, ranks).
            progress: told files of packings done, of how many to make.
            tell: gets a line for each file of a packing that is damaged and made again.
        Raises: DataError: a file is missing or cut, the table is of another time, or the place cannot be written.
        """
        if share[0] == 0:
            check_table(self.path, self.manifest)
        check_files(self.path, self.table, share)
        packing_files.make_ready(self.packings(place), share, progress, tell)

    def seal(self, place: Path, tell: Callable[[str], None] = lambda _: None) -> None:
        """Say that the packings are ready, when all shares are made. One process does it.

        ``tell``: gets a line for each index that is damaged and made again.

        Raises: DataError: some are missing, as where the ranks' nodes do not share the place.
        """
        packing_files.seal(self.packings(place), tell)


def packing_rule(sequence_length: int, fim_rate: float, tokenizer: Tokenizer, folder: str | Path | None) -> PackingRule:
    """Return how documents are packed. Raises: DataError: the tokenizer of ``folder`` lacks the marks that it needs."""
    if not fim_rate:
        return PackingRule(sequence_length)
    begin, hole, end = tokenizer.fim_begin, tokenizer.fim_hole, tokenizer.fim_end
    if begin is None or hole is None or end is None:
        raise DataError(
            f"data.fim_rate = {fim_rate}, but the tokenizer of {folder} has no fill-in-the-middle tokens; "
            "set data.fim_rate=0"
        )
    return PackingRule(sequence_length, fim_rate, Middle(begin, hole, end))
