"""Which samples a rank reads: its share, none where its stages look at no text, in one order whatever is read ahead."""

import threading

import numpy as np
import pytest
import torch

from dsv3_megatron.data.source.samples import Synthetic
from dsv3_megatron.optim.regime import Regime
from dsv3_megatron.train.build import build_parts
from dsv3_megatron.train.data.batches import BatchReader
from dsv3_megatron.train.progress import Progress
from parallel.groups import start_processes, stop_processes
from parallel.world import World
from testing.ranks import run_ranks
from testing.training.tiny import reading, small_recipe
from testing.training.whole_runs import run_here

FIXED, RAMP = "optim.global_batch=8", "optim.global_batch=[{until: 1024, at: 8},{until: 3072, shape: linear, to: 24}]"


class Recorded(Synthetic):
    """Synthetic samples that remember their numbers."""

    def __init__(self):
        super().__init__(256, 32, seed=5)
        self.asked = []

    def sample(self, number):
        self.asked.append(number)
        return super().sample(number)


def reading_of(overrides):
    """Return what this rank asks for over three steps, and the tokens it was given."""
    recipe, world = small_recipe(*overrides), World.from_environment()
    start_processes(world, torch.device("cpu"), timeout_seconds=120)
    try:
        parts = build_parts(recipe, recipe.layout(world.size), torch.device("cpu"))
        source, regime = Recorded(), Regime(recipe.optim, recipe.data.sequence_length)
        reader, progress, given = BatchReader(parts, reading(source), regime), Progress(), []
        for _ in range(3):
            read = reader.take(progress)
            given += [batch["tokens"].clone().numpy() for batch in read.microbatches]
            progress.samples = read.samples.next
            progress.tokens += read.samples.count * recipe.data.sequence_length
        reader.close()
        return sorted(set(source.asked)), len(source.asked), np.concatenate(given), progress.samples
    finally:
        stop_processes()


def test_the_stages_in_the_middle_read_nothing():
    alone, dualpipe, isolated = run_ranks(
        4,
        reading_of,
        [
            ("parallel.pipeline=4", "data.read_ahead=0"),
            ("parallel.pipeline=4", "parallel.schedule=dualpipev", "model.num_hidden_layers=8", "data.read_ahead=0"),
            ("parallel.pipeline=4", "data.isolate_documents=true", "data.read_ahead=0"),
        ],
    )
    assert [len(asked) for asked, *_ in alone] == [24, 0, 0, 24]
    assert [len(asked) for asked, *_ in dualpipe] == [24, 0, 0, 0]  # both ends of the model are on the first rank
    assert [len(asked) for asked, *_ in isolated] == [24] * 4
    assert all(given.shape == alone[0][2].shape for _, _, given, _ in (*alone, *dualpipe, *isolated))


def test_data_parallel_ranks_share_a_step():
    ((first, *_), (second, *_)), *_ = run_ranks(2, reading_of, [("data.read_ahead=0",)])
    assert first == [n for n in range(24) if n % 8 < 4]
    assert second == [n for n in range(24) if n % 8 >= 4]


@pytest.mark.parametrize("batch", [FIXED, RAMP])
def test_reading_ahead_changes_no_batch_and_reads_each_once(batch):
    ((at_need,), (ahead,), (far,)) = run_ranks(
        1, reading_of, [(batch, "optim.batch_multiple=2", f"data.read_ahead={steps}") for steps in (0, 2, 5)]
    )
    for other in (ahead, far):
        np.testing.assert_array_equal(at_need[2], other[2])
        assert other[3] == at_need[3]
        assert len(other[0]) == other[1], "no sample was made twice"


def run_and_look(case):
    """Train to the end, or into an error in a step; return the threads that are left, and whether it failed."""
    directory, fails = case
    try:
        with pytest.MonkeyPatch.context() as patched:
            if fails:
                patched.setattr("dsv3_megatron.train.trainer.train_step", lambda *given: 1 / 0)
            run_here(["run.steps=2", f"run.directory={directory}"])
        failed = False
    except ZeroDivisionError:
        failed = True
    return [thread.name for thread in threading.enumerate()], failed


def test_no_thread_reads_on_after_the_run_or_an_error(tmp_path):
    ended, broken = run_ranks(1, run_and_look, [(f"{tmp_path}/a", False), (f"{tmp_path}/b", True)])
    assert (ended[0][1], broken[0][1]) == (False, True)
    assert "reading ahead" not in (*ended[0][0], *broken[0][0])
