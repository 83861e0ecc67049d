"""Which sequence a sample number is, by value: whoever changes one of these changes every run, and raises ORDER."""

import hashlib

import numpy as np
import pytest

from dsv3_megatron.data.checked.shards import CheckedShards
from dsv3_megatron.data.mixture.blend import Blend
from dsv3_megatron.data.mixture.order import Mixture
from dsv3_megatron.data.mixture.phases import MixtureCurve
from dsv3_megatron.data.source.fim import Middle
from dsv3_megatron.data.source.indexed import PackedShards
from dsv3_megatron.data.source.open_files import OpenFiles
from dsv3_megatron.data.source.packing import PackingRule
from dsv3_megatron.data.source.packing_files import OpenPacking, PackingFiles, make_ready, seal
from dsv3_megatron.data.source.samples import ORDER, Recall, Synthetic, TokenWindows, permuted
from dsv3_megatron.data.source.shard_table import open_table, write_table
from dsv3_megatron.data.source.shards import Manifest, ShardWriter, Source

FIM = Middle(begin=4, hole=3, end=5)


def digest(samples):
    """Return the beginning of a digest of all that samples hold."""
    found = hashlib.sha256()
    for sample in samples:
        for values in (sample.tokens, sample.labels, sample.weights, sample.documents):
            if values is not None:
                found.update(np.asarray(values, dtype=np.int64).tobytes())
    return found.hexdigest()[:16]


@pytest.fixture
def sources(tmp_path):
    """Two sources whose documents count up: 100, 101, 102, ... of lengths 1, 8, 15, ..."""
    written = []
    for name in ("a", "b"):
        for number in range(3):
            writer = ShardWriter(tmp_path, f"{name}/train_{number:05d}", 60_000)
            lengths = [1 + (7 * n + number) % 50 for n in range(20)]
            writer.add([np.append(100 + np.arange(n) + 1000 * number, 1) for n in lengths])
            written.append(writer.commit())
    folders, sha256 = write_table(tmp_path, [Source(name=name, input=name) for name in "ab"], written)
    manifest = Manifest(tokenizer_sha256="", vocab_size=60_000, options={}, sources=folders, table_sha256=sha256)
    table, opened, found = open_table(tmp_path, manifest), OpenFiles(), {}
    for number, name in enumerate("ab"):
        rule = PackingRule(32, 0.4, FIM)
        files = PackingFiles(tmp_path, tmp_path / "packing", table, sha256, 60_000, number, "train", rule)
        make_ready([files])
        seal([files])
        found[name] = PackedShards(
            [OpenPacking(files, opened)], name=name, seed=7, start_token=0, pad_token=2, isolate=True,
            shards=CheckedShards(tmp_path, table, 60_000, opened),
        )  # fmt: skip
    return found


def test_the_order_has_a_version():
    assert ORDER == 2, "the numbers below are those of version 2"


def test_a_permutation():
    assert [permuted(n, 10, "a key") for n in range(10)] == [4, 6, 7, 5, 9, 1, 0, 8, 2, 3]
    assert [permuted(n, 10**10, "a key") for n in range(3)] == [8265513823, 4475066982, 2834938179]


def test_sequences_made_from_a_seed():
    assert [Synthetic(97, 8, 3).sample(n).tokens[:2].tolist() for n in (0, 1, 10**9)] == [[83, 87], [53, 55], [29, 31]]
    assert digest(Synthetic(97, 8, 3).sample(n) for n in range(50)) == "e7d61ca7737bc948"
    assert Recall(100, 64, 3).sample(5).tokens[:16].tolist() == [
        36, 12, 24, 19, 42, 49, 63, 4, 94, 64, 98, 87, 99, 68, 98, 83,
    ]  # fmt: skip
    assert digest(Recall(100, 64, 3).sample(n) for n in range(50)) == "e73a8a9a372ac081"


def test_windows_of_a_row_of_tokens():
    windows = TokenWindows(np.arange(1000), 8, seed=3)
    assert [int(windows.sample(n).tokens[0]) for n in (0, 1, 2, windows.count)] == [424, 760, 232, 512]


def test_packed_shards(sources):
    source = sources["a"]
    assert source.count == 51
    assert [tuple(piece[:6]) for piece in source.pieces(0)] == [(0, 6, 0, 32, True, 0)]
    assert source.sample(0).labels.tolist() == [
        4, 100, 101, 102, 103, 3, 126, 127, 128, 129, 130, 131, 132, 133, 134, 135, 136, 137, 138, 139, 140, 141,
        142, 5, 104, 105, 106, 107, 108, 109, 110, 111,
    ]  # fmt: skip
    assert digest(source.sample(n) for n in range(2 * source.count)) == "2396b9cf7a139e03"


def test_a_mixture_of_packed_shards(sources):
    blend = Blend(sources, Mixture(MixtureCurve.constant({"a": 0.7, "b": 0.3}), 32))
    assert [blend.locate(n) for n in range(8)] == [(0, 0), (0, 1), (1, 0), (0, 2), (0, 3), (1, 1), (0, 4), (0, 5)]
    assert digest(blend.sample(n) for n in range(60)) == "8f4a8074949eedf7"
