"""Checkpoints whose files were changed, with checksums that match."""

import json
import tarfile
from pathlib import Path

import pytest
import torch

from dsv3_megatron.checkpoint.find import Found
from dsv3_megatron.checkpoint.index import INDEX, read_index
from dsv3_megatron.checkpoint.load import _updates_in_format_1
from dsv3_megatron.checkpoint.manifest import MANIFEST, read_content, read_manifest
from dsv3_megatron.train.progress import Progress
from testing.fuzz.mutate import binary, json_text
from testing.small_checkpoint import FILE, both, checkpoint, replace, seal

FORMAT_1 = Path(__file__).parents[1] / "dsv3_megatron/checkpoint/data/format_1.tar.xz"


@pytest.fixture
def folder(tmp_path):
    return checkpoint(tmp_path / "checkpoint")


def test_an_index(fuzz, folder):
    def read(data):
        replace(folder, INDEX, data)
        assert both(folder).shape == (4, 6)

    fuzz(binary, [(folder / INDEX).read_bytes()], read)


def test_an_index_of_format_1(fuzz, tmp_path):
    with tarfile.open(FORMAT_1) as archive:
        archive.extractall(tmp_path, filter="data")
    folder = tmp_path / "step_00000002"

    def read(data):
        replace(folder, INDEX, data)
        assert len(read_index(folder).state_dict_metadata) >= 0

    fuzz(binary, [(folder / INDEX).read_bytes()], read)


def test_a_piece(fuzz, tmp_path):
    numbers = iter(range(10**9))

    def read(data):
        assert both(checkpoint(tmp_path / str(next(numbers)), piece=data)).shape == (4, 6)

    good = tmp_path / "piece"
    torch.save(torch.ones(2, 6), good)
    fuzz(binary, [good.read_bytes()], read)


def test_a_file_of_pieces(fuzz, folder):
    good = (folder / FILE).read_bytes()

    def read(data):
        replace(folder, FILE, data)
        read_manifest(folder)
        assert both(folder).shape == (4, 6)

    fuzz(binary, [good], read)


def test_a_manifest(fuzz, folder):
    good = json.dumps(json.loads((folder / MANIFEST).read_text())["content"]).encode()

    def read(data):
        try:
            seal(folder, json.loads(data))
        except (ValueError, RecursionError):
            (folder / MANIFEST).write_bytes(data)
        read_manifest(folder)
        Progress.of(Found.of(folder, read_content(folder)).progress)
        both(folder)

    fuzz(json_text, [good], read)


def test_the_file_of_format_1_that_is_no_tensor(fuzz, tmp_path):
    path = tmp_path / "common.pt"
    torch.save({"optimizer": {0: {"param_groups": [{"lr": 0.5, "betas": (0.9, 0.95), "step": 2}]}}}, path)

    def read(data):
        path.write_bytes(data)
        assert _updates_in_format_1(path) >= 0

    fuzz(binary, [path.read_bytes()], read)
