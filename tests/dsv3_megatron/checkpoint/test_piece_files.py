"""Files of pieces: what is read is what was written, or the file is called damaged; a failed read is tried again."""

import errno
import os

import pytest
import torch
import xxhash

import dsv3_megatron.run.files as files
from dsv3_megatron.checkpoint.manifest import DamageError
from dsv3_megatron.checkpoint.piece_files import PieceFile, open_pieces


@pytest.fixture
def written(tmp_path):
    """Return a file of three pieces, its pieces, and their places."""
    pieces = [torch.arange(12.0).view(3, 4), torch.ones(5, dtype=torch.bfloat16), torch.zeros(())]
    file = PieceFile(tmp_path / "file")
    places = [file.add(piece) for piece in pieces]
    facts = file.finish()
    data = (tmp_path / "file").read_bytes()
    assert facts == {"bytes": len(data), "xxh3": xxhash.xxh3_128_hexdigest(data)}
    return tmp_path / "file", pieces, places


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(files, "WAITS", (0.0, 0.0))


def read_all(path, places, checked=True):
    with open_pieces(path, checked=checked) as read:
        return [read(*place) for place in places]


def test_pieces_come_back(written):
    path, pieces, places = written
    for found, expected in zip(read_all(path, places), pieces):
        assert found.dtype == expected.dtype and torch.equal(found, expected)


def test_a_view_is_written_without_the_memory_it_is_a_part_of(tmp_path):
    file, whole = PieceFile(tmp_path / "file"), torch.arange(100_000.0).view(100, 1000)
    _, length = file.add(whole[3:5, 10:20])
    file.finish()
    assert length < 2_000
    assert torch.equal(read_all(tmp_path / "file", [(0, length)])[0], whole[3:5, 10:20])


def test_no_flipped_byte_is_read_as_data(written):
    path, _, places = written
    data = path.read_bytes()
    for position in range(0, len(data), 7):
        hurt = bytearray(data)
        hurt[position] ^= 4
        path.write_bytes(hurt)
        with pytest.raises(DamageError, match="is not what was written|does not end as it was written"):
            read_all(path, places)


@pytest.mark.parametrize("left", [0, 10, 31, 2000])
def test_a_torn_file_is_damaged(written, left):
    path, _, places = written
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(DamageError, match="does not end as it was written"):
        read_all(path, places)


def test_a_missing_file_is_damaged(written):
    path, _, places = written
    path.unlink()
    with pytest.raises(DamageError, match="is missing; use an older checkpoint"):
        read_all(path, places)


def test_files_without_a_table_can_be_read_where_they_were_checked_before(written):
    path, pieces, places = written
    start, length = places[-1]
    path.write_bytes(path.read_bytes()[: start + length])
    assert torch.equal(read_all(path, places, checked=False)[0], pieces[0])


@pytest.mark.parametrize(("failures", "is_read"), [(1, True), (2, True), (99, False)])
def test_what_cannot_be_read_is_read_again(written, monkeypatch, failures, is_read):
    path, pieces, places = written
    preadv, left = os.preadv, failures

    def flaky(*arguments):
        nonlocal left
        left -= 1
        if left >= 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(*arguments)

    monkeypatch.setattr(os, "preadv", flaky)
    if is_read:
        assert torch.equal(read_all(path, places)[0], pieces[0])
    else:
        with pytest.raises(DamageError, match="cannot be read .Input/output error."):
            read_all(path, places)


def test_what_a_network_delivers_wrong_once_is_asked_for_again(written, monkeypatch):
    path, pieces, places = written
    preadv, calls = os.preadv, []

    def flaky(descriptor, buffers, offset):
        count = preadv(descriptor, buffers, offset)
        calls.append(offset)
        if len(calls) == 3:  # after the table: the first piece
            buffers[0][count // 2] ^= 1
        return count

    monkeypatch.setattr(os, "preadv", flaky)
    assert torch.equal(read_all(path, places)[0], pieces[0])
    assert calls[2] == calls[3]
