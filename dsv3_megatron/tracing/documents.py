"""The documents of a sample by name: from the function that makes the sample, and where documents come from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dsv3_megatron.data.identity import other_text
from dsv3_megatron.data.mixture.blend import Blend
from dsv3_megatron.data.settings import DataSettings
from dsv3_megatron.data.source.build import build
from dsv3_megatron.data.source.origins import document_origin
from dsv3_megatron.data.source.shard_folder import ShardFolder
from parallel.errors import DataError


class Tracer:
    """The samples of a run, as documents with names."""

    def __init__(self, settings: DataSettings, *, vocab_size: int, seed: int, text: Mapping[str, Any] | None = None):
        """Read what a run of these settings reads.

        ``text``: which one it must be, as data/identity.py describes it; None = any.
        Raises: DataError: the source has no documents with names, it is another text, or as a run would be refused.
        """
        if settings.source != "indexed":
            raise DataError(
                f"data.source = {settings.source} keeps no names of documents; trace reads token shards (data=indexed)"
            )
        self._folder = ShardFolder.of(settings)
        self._data = build(settings, vocab_size=vocab_size, seed=seed, folder=self._folder)
        if difference := other_text(text, self._data.identity):
            raise DataError(f"this step reads {difference}; restore those, or name the folder: data.path=FOLDER")

    def sample(self, number: int, *, with_text: bool = False) -> Iterator[dict[str, Any]]:
        """Yield the stretches of documents in sample ``number``, in order.

        Each has source, file and row (from 1; 0: the file is the document) of the input; shard and document (from 0 in
        it); offset and length in the document's tokens, or, where ``rearranged``, in those of its fill-in-the-middle
        order; ``at``, its place in the sequence; ``excluded``; and its text, null where it is excluded.
        Raises: DataError: a file of the shards is missing or damaged, or does not say where documents come from.
        """
        blend, folder = self._data.train, self._folder
        assert isinstance(blend, Blend), "shards are always a blend"
        _, pieces = blend.pieces(number)
        labels = blend.sample(number).labels if with_text else None
        for piece in pieces:
            origin = document_origin(folder.path, folder.manifest, folder.table, piece.shard, piece.document)
            found = {
                "source": origin.source,
                "file": origin.file,
                "row": origin.row,
                "shard": folder.table.name(piece.shard),
                "document": piece.document,
                "offset": piece.offset,
                "length": piece.length,
                "at": piece.at,
                "rearranged": piece.rearranged,
                "excluded": piece.excluded,
            }
            if labels is not None:
                ids = labels[piece.at : piece.at + piece.length]
                found["text"] = None if piece.excluded else folder.tokenizer.decode(ids)
            yield found
