"""What a save costs again and again, and what is made once: host memory, and the index of where everything lies."""

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dsv3_megatron.checkpoint.index as index_module
from dsv3_megatron.checkpoint.index import Described, Index
from dsv3_megatron.checkpoint.write import Staging, write_share
from dsv3_megatron.pipeline.saved import Entry
from testing.lanes import examples


def states(*sizes, dtype=torch.float32):
    """Return states of one tensor for each size, whole."""
    return {
        f"state{n}": [Entry(f"key{n}", (size,), (0,), torch.arange(size, dtype=dtype))] for n, size in enumerate(sizes)
    }


@settings(deadline=None, max_examples=examples(50))
@given(st.lists(st.integers(0, 3000), min_size=1, max_size=6), st.sampled_from([torch.float32, torch.bfloat16]))
def test_a_copy_is_of_what_was_and_its_memory_is_used_again(sizes, dtype):
    staging, mine = Staging(), states(*sizes, dtype=dtype)
    for _ in range(3):
        files = staging.files(mine, rank=0, copy=True)
        expected = [entry.tensor.clone() for each in mine.values() for entry in each]
        for each in mine.values():
            for entry in each:
                entry.tensor.add_(1)
        assert all(torch.equal(*pair) for pair in zip((t for file in files for t in file.tensors), expected))
    taken = sum(block.nbytes for block in staging._blocks)
    assert taken <= sum(tensor.nbytes + 64 for tensor in expected), "as much as the states, once"


def test_what_does_not_change_before_it_is_written_is_not_copied():
    staging, mine = Staging(), states(10)
    (file,) = staging.files(mine, rank=3, copy=False)
    assert file.tensors[0] is mine["state0"][0].tensor and staging._blocks == []
    assert file.name == "__3_0.distcp" and file.holds == "state0"


def test_what_another_rank_saves_is_not_written():
    mine = {"weights": [Entry("key", (2,), (0,), torch.ones(2), writes=False)]}
    assert Staging().files(mine, rank=0, copy=True) == []


def described(name, start, extent, whole=(8,)):
    return {name: [Described("key", whole, (start,), (extent,), torch.float32)]}


def test_a_tensor_with_a_gap_is_not_saved():
    with pytest.raises(AssertionError, match="1 tensors would not be saved whole, key for one"):
        Index().describe(described("a", 0, 4) | described("b", 5, 3))


def test_the_index_is_made_once_where_pieces_stay_where_they_are(monkeypatch):
    made, describe = [], index_module.describe_pieces
    monkeypatch.setattr(index_module, "describe_pieces", lambda *given: made.append(1) or describe(*given))
    index = Index()
    index.describe(described("a", 0, 4) | described("b", 4, 4))
    for _ in range(3):
        index.place({"a": [(0, 100)]})
        index.place({"b": [(0, 90)]})
        first = index.stored()
    assert made == [1]
    index.place({"b": [(10, 90)]})
    assert index.stored() != first and made == [1, 1]
    places = {(box.fqn, tuple(box.offset)): place for box, place in pickle.loads(index.stored()).storage_data.items()}
    assert (places["key", (4,)].relative_path, places["key", (4,)].offset) == ("b", 10)


def test_pieces_are_written_where_the_index_says(tmp_path):
    files = Staging().files(states(5, 700), rank=1, copy=False)
    written = write_share(files, tmp_path / "new")
    assert set(written.files) == set(written.places) == {"__1_0.distcp", "__1_1.distcp"}
    assert {facts["holds"] for facts in written.files.values()} == {"state0", "state1"}
    assert (tmp_path / "new/__1_1.distcp").stat().st_size == written.files["__1_1.distcp"]["bytes"]
