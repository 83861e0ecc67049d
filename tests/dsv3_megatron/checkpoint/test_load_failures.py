"""What goes wrong while a checkpoint is loaded is called what it is, on all ranks together.

Real ranks, real files; what fails is put into the functions that read.
"""

import errno
import os
import shutil

import pytest
import torch
import torch.distributed as dist

import dsv3_megatron.checkpoint.find as find
import dsv3_megatron.checkpoint.load as load
import dsv3_megatron.run.files as files
from dsv3_megatron.checkpoint.manifest import DamageError
from dsv3_megatron.train.build import build_parts
from parallel.errors import CheckpointError, RankFault, UserError
from parallel.groups import start_processes, stop_processes
from parallel.world import World
from testing.ranks import run_ranks
from testing.training.lives import Life, live
from testing.training.tiny import named_weights, small_recipe

WORDS = ("parallel.expert=2",)
ON_RANK_1 = {
    "closed connection": RuntimeError("Connection closed by peer [127.0.0.1]:29500"),
    "time-out": dist.DistBackendError("Timed out waiting 600000ms for recv operation to complete"),
    "out of memory": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
}


def injected(case, place):
    """Put the case's failure where it belongs, on rank 1; return what takes it out again."""
    kept = load.read_entries, load.misfit, os.preadv, find.size_problems, dict(os.environ)
    mine = dist.get_rank() == 1
    preadv, looks, left = os.preadv, find.size_problems, [1 if case == "EIO once" else 10**9]

    def fail(*given, **options):
        raise ON_RANK_1[case]

    def flaky(*arguments):
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(*arguments)

    if mine and case in ON_RANK_1:
        load.read_entries = fail
    if mine and case.startswith("EIO"):
        os.preadv = flaky
    if mine and case == "misfit":
        load.misfit = lambda index, entries: "it holds no decoder.layers.7.weight"
    if case == "mount":
        os.environ["GROUP_WORLD_SIZE"] = "2"  # as where torchrun has started ranks on two hosts
        if mine:
            find.size_problems = lambda path, files, names: (f"{path / name} is missing; ..." for name in names)
    if case == "gone":
        os.environ["GROUP_WORLD_SIZE"] = "2"
        find.size_problems = lambda path, *given: looks(path.with_name("nowhere"), *given)

    def restore():
        load.read_entries, load.misfit, os.preadv, find.size_problems, _ = kept
        os.environ.pop("GROUP_WORLD_SIZE", None)

    return restore


def load_rank(case):
    """Load the newest of two checkpoints; return its step and what was wrong with others, or what was raised."""
    name, place = case
    files.WAITS = (0.0, 0.0)
    recipe, world = small_recipe(*WORDS), World.from_environment()
    start_processes(world, torch.device("cpu"), timeout_seconds=120)
    restore = injected(name, place)
    try:
        parts = build_parts(recipe, recipe.layout(world.size), torch.device("cpu"))
        candidates = [place / f"step_{step:08d}" for step in (4, 2)]
        found, _, wrong = find.load_newest(
            lambda: candidates, lambda found: load.load_checkpoint(found, parts, training=True)
        )
        first = next(iter(named_weights(parts).values())).flatten()[:4].tolist()
        return found and found.progress["step"], wrong, first
    except Exception as error:
        return type(error), isinstance(error, UserError), str(error)
    finally:
        restore()
        stop_processes()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("checkpoints")
    run_ranks(2, live, [Life(WORDS, steps=steps, save=place) for steps in (2, 4)])
    return place


@pytest.fixture(scope="module")
def outcomes(place):
    """Return what each rank met, by case."""
    hurt = shutil.copytree(place, place.with_name("hurt"))
    file = hurt / "step_00000004" / "__1_1.distcp"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    cases = {case: place for case in ("none", *ON_RANK_1, "EIO once", "EIO", "misfit", "mount", "gone")}
    cases["flipped byte"] = hurt
    return dict(zip(cases, run_ranks(2, load_rank, list(cases.items()))))


@pytest.mark.parametrize("case", ON_RANK_1)
def test_a_fault_of_one_rank_is_no_misfit_and_no_refusal(outcomes, case):
    others, its_own = outcomes[case]
    kind, is_refusal, said = its_own
    assert kind is type(ON_RANK_1[case]) and not is_refusal and said == str(ON_RANK_1[case])
    kind, is_refusal, said = others
    assert kind is RankFault and not is_refusal
    assert "rank 1 on " in said and str(ON_RANK_1[case]) in said and "does not fit" not in said


def test_a_misfit_that_one_rank_sees_is_a_refusal_of_all(outcomes):
    for kind, is_refusal, said in outcomes["misfit"]:
        assert kind is CheckpointError and is_refusal
        assert "does not fit this model (it holds no decoder.layers.7.weight)" in said


def test_a_read_error_is_read_again(outcomes):
    assert [rank[:2] for rank in outcomes["EIO once"]] == [(4, [])] * 2
    assert outcomes["EIO once"] == outcomes["none"]


def test_what_cannot_be_read_or_is_not_what_was_written_is_damaged_and_the_older_one_is_loaded(outcomes):
    for case, file, why in (("flipped byte", "__1_1.distcp", "is not what was written"),):
        for step, wrong, _ in outcomes[case]:
            assert step == 2 and len(wrong) == 1
            assert f"step_00000004/{file}" in wrong[0] and why in wrong[0]
    for kind, wrong, _ in outcomes["EIO"]:  # every file of the rank's: no checkpoint is left
        assert kind is None and len(wrong) == 2 and "cannot be read (Input/output error)" in wrong[0]


def test_what_one_host_misses_and_another_sees_is_no_damage(outcomes):
    for kind, is_refusal, said in outcomes["mount"]:
        assert kind is RankFault and not is_refusal
        assert "rank 1 on " in said and "is missing" in said and "look at the mount on" in said


def test_what_no_host_sees_is_damage(outcomes):
    for step, wrong, _ in outcomes["gone"]:
        assert step is None and len(wrong) == 2 and "is missing" in wrong[0]


def test_damage_is_an_error_of_checkpoints():
    assert issubclass(DamageError, CheckpointError)
