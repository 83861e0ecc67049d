"""Shares between nodes: each end takes checksums of what it sends or receives, and compares them with the manifest.

Ranks call this in pairs, over a group that nothing else uses, also from a thread beside training. A rank sends to one
and receives from one at the same time, in the same order of messages: header, manifest, consent, pieces, verdict.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor

from dsv3_megatron.checkpoint.manifest import MANIFEST, DamageError
from dsv3_megatron.checkpoint.memory.host import free_bytes
from dsv3_megatron.checkpoint.memory.share import Share, read
from dsv3_megatron.run.files import write_atomically
from dsv3_megatron.run.handed import TEXT_BYTES, open_regular, read_bytes
from dsv3_megatron.run.made import new_file
from dsv3_megatron.run.reasons import reason_of
from parallel.units import show_bytes

_BLOCK = 1 << 24  # bytes of a message
_FAILURES = (OSError, ValueError, DamageError)


@dataclass
class Exchanged:
    """What came of an exchange.

    Attributes:
        received: the share that lies in the folder now; None where none was sent, or it failed.
        not_sent, not_received: why this end has failed, in a line. What has failed at another end, that one says.
        sent_bytes: of the share that was sent, and has arrived whole.
    """

    received: Share | None = None
    not_sent: str | None = None
    not_received: str | None = None
    sent_bytes: int = 0

    @property
    def failure(self) -> str | None:
        """Why this end has failed."""
        return self.not_sent or self.not_received


def exchange(
    group: dist.ProcessGroup, give: Share | None, to: int | None, folder: Path | None, source: int | None
) -> Exchanged:
    """Send ``give`` to rank ``to`` and receive into ``folder`` what rank ``source`` sends; return what came of it.

    ``give`` None: there is nothing to send, which the other end is told. ``to``, ``source`` None: nobody is there.
    Raises RuntimeError: the connection is lost.
    """
    line = _Line(group, to, source)
    done = Exchanged()
    sending, receiving = _Sending(give, done), _Receiving(folder, done)
    size = line.swap(torch.tensor([len(sending.manifest)]), torch.zeros(1, dtype=torch.int64))
    receiving.open(line.swap(sending.manifest, torch.empty(min(int(size), TEXT_BYTES), dtype=torch.uint8)), source)
    accepted = line.answer(torch.tensor([int(receiving.is_open)]), torch.zeros(1, dtype=torch.int64))
    blocks = sending.blocks() if accepted[0] else iter(())
    wanted = receiving.blocks()
    while True:
        block, place = next(blocks, None), next(wanted, None)
        if block is None and place is None:
            break
        line.swap(block, place)
        if place is not None:
            receiving.take(place)
    receiving.close()
    verdict = line.answer(torch.tensor([int(done.received is not None)]), torch.zeros(1, dtype=torch.int64))
    if give is not None and verdict[0]:
        done.sent_bytes = sum(facts["bytes"] for facts in give.files.values())
    return done


class _Line:
    """The two neighbours of a rank."""

    def __init__(self, group: dist.ProcessGroup, to: int | None, source: int | None):
        self._group, self._to, self._source = group, to, source

    def swap(self, out: Tensor | None, into: Tensor | None) -> Tensor:
        """Send to the one and receive from the other."""
        return self._both(out, self._to, into, self._source)

    def answer(self, out: Tensor, into: Tensor) -> Tensor:
        """The same in the other direction: ``into`` stays as it is where nobody answers."""
        return self._both(out, self._source, into, self._to)

    def _both(self, out: Tensor | None, to: int | None, into: Tensor | None, source: int | None) -> Tensor:
        under_way = []
        if into is not None and source is not None and into.numel():
            under_way.append(dist.irecv(into, source, group=self._group))
        if out is not None and to is not None and out.numel():
            under_way.append(dist.isend(out, to, group=self._group))
        for each in under_way:
            assert each is not None
            each.wait()
        return into if into is not None else torch.empty(0)


class _Sending:
    """A share on its way out."""

    def __init__(self, share: Share | None, done: Exchanged):
        self._share, self._done = share, done
        self.manifest = torch.empty(0, dtype=torch.uint8)
        if share is not None:
            try:
                self.manifest = torch.frombuffer(bytearray(read_bytes(share.folder / MANIFEST)), dtype=torch.uint8)
            except _FAILURES as error:
                self._share, done.not_sent = None, _reason(error)

    def blocks(self) -> Iterator[Tensor]:
        """Yield all bytes of the files. Those that cannot be read are sent as zeros: whoever receives finds out."""
        assert self._share is not None
        for name, facts in sorted(self._share.files.items()):
            path, left, digest = self._share.folder / name, facts["bytes"], xxhash.xxh3_128()
            try:
                with open_regular(path) as file:
                    while left:
                        block = torch.zeros(min(left, _BLOCK), dtype=torch.uint8)
                        if file.readinto(_bytes_of(block)) != len(block):
                            raise OSError(None, "is too short")
                        digest.update(_bytes_of(block))
                        left -= len(block)
                        yield block
                if digest.hexdigest() != facts["xxh3"]:
                    raise OSError(None, "is not what was written")
            except OSError as error:
                self._done.not_sent = f"{path} cannot be sent ({error.strerror})"
                while left:
                    yield torch.zeros(min(left, _BLOCK), dtype=torch.uint8)
                    left -= min(left, _BLOCK)


class _Receiving:
    """A share on its way in."""

    def __init__(self, folder: Path | None, done: Exchanged):
        self._folder, self._done = folder, done
        self._share: Share | None = None
        self._manifest = b""
        self._file: BinaryIO | None = None  # the one that is being received, its digest and the bytes that are to come
        self._digest, self._left = xxhash.xxh3_128(), 0

    @property
    def is_open(self) -> bool:
        """Whether pieces may come."""
        return self._share is not None

    def open(self, manifest: Tensor, source: int | None) -> None:
        """Take the manifest, and see whether there is room."""
        if self._folder is None or source is None or not manifest.numel():
            return
        self._manifest = manifest.numpy().tobytes()
        try:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder.mkdir(parents=True)
            write_atomically(self._folder / MANIFEST, self._manifest)
            share = read(self._folder)
            (self._folder / MANIFEST).unlink()  # until all files are there
            if (size := sum(facts["bytes"] for facts in share.files.values())) > (free := free_bytes(self._folder)):
                raise OSError(None, f"{show_bytes(size)} of rank {share.rank} do not fit into {show_bytes(free)}")
        except _FAILURES as error:
            self._fail(error)
            return
        self._share = share

    def blocks(self) -> Iterator[Tensor]:
        """Yield room for the next bytes."""
        if self._share is None:
            return
        for name, facts in sorted(self._share.files.items()):
            self._file, self._digest, self._left = None, xxhash.xxh3_128(), facts["bytes"]
            self._start(name)
            while self._left:
                yield torch.empty(min(self._left, _BLOCK), dtype=torch.uint8)
            self._end(name, facts["xxh3"])

    def take(self, block: Tensor) -> None:
        """Write bytes that have come."""
        self._left -= len(block)
        self._digest.update(_bytes_of(block))
        if self._file is not None and self._done.not_received is None:
            try:
                self._file.write(_bytes_of(block))
            except OSError as error:
                self._fail(error)

    def close(self) -> None:
        """Put the manifest in its place, if all files are as the sender has described them."""
        if self._share is None or self._folder is None:
            return
        if self._done.not_received is None:
            try:
                write_atomically(self._folder / MANIFEST, self._manifest)
                self._done.received = self._share
            except OSError as error:
                self._fail(error)
        if self._done.received is None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self, name: str) -> None:
        assert self._folder is not None
        try:
            self._file = new_file(self._folder / name)
        except OSError as error:
            self._fail(error)

    def _end(self, name: str, expected: str) -> None:
        if self._file is not None:
            try:
                self._file.close()
            except OSError as error:
                self._fail(error)
        if self._digest.hexdigest() != expected and self._done.not_received is None:
            self._done.not_received = f"{name} has not come as it was written"

    def _fail(self, error: Exception) -> None:
        if self._done.not_received is None:
            self._done.not_received = _reason(error)


def _bytes_of(block: Tensor) -> memoryview:
    """Return the memory of a tensor of bytes."""
    return memoryview(cast(Any, block.numpy()))


def _reason(error: Exception) -> str:
    """Return why, without the kind of an error of ours."""
    return str(error.args[0]) if isinstance(error, DamageError) else reason_of(error)
