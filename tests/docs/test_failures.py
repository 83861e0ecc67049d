"""The table of failures in docs/checkpoints.md: what is said, the code, and whether a batch job is refused."""

import re
import socket
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from launcher.command_line.last_words import Failure
from launcher.command_line.refusal import REFUSED_FILE, refusal_file
from parallel.agree import agree
from parallel.errors import CheckpointError, DataError, RecipeError, RunInUseError
from parallel.groups import start_processes
from parallel.world import World
from testing.ranks import run_ranks

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "checkpoints.md").read_text()
TABLE = PAGE.split("| what fails | what is said |")[1].split("\n\n")[0].splitlines()[2:]
ROWS = {what: (said, code, job) for what, said, code, job in (row[2:-2].split(" | ") for row in TABLE)}

KEY = RecipeError("run.steps = 0: input should be greater than 0")
NO_PLACE = RecipeError("run.directory = /x cannot be written (Read-only file system); name another directory")
IN_USE = RunInUseError("run.directory = /x is in use by process 1 on node-0")
MISFIT = CheckpointError("step_1 holds no tensor a; use the recipe it was trained with")
DAMAGED = CheckpointError("step_1 is damaged, and no other checkpoint is valid; restore one")
# what each of two ranks has met, and how they agree: rows whose every rank ends by what the ranks agree on
MET = {
    "a key of the recipe, on all ranks": ([KEY, KEY], {}),
    "the data, on all hosts": ([DataError("data.path = /x is missing")] * 2, {}),
    "the run directory, on all hosts": ([NO_PLACE, NO_PLACE], {}),
    "the run directory, on some hosts": ([None, NO_PLACE], {}),
    "the run directory is in use": ([IN_USE, IN_USE], {}),
    "the checkpoint is of another model": ([None, MISFIT], {"any_counts": True}),
    "every checkpoint is damaged": ([DAMAGED, DAMAGED], {}),
    "another read fails on one rank": ([None, OSError(5, "Input/output error")], {"any_counts": True}),
    "CUDA is out of memory on one rank": ([None, torch.OutOfMemoryError("CUDA out of memory.")], {"any_counts": True}),
}
# the others, and the tests that bring them about
ELSEWHERE = {
    "the data, on some hosts": "launcher/test_refusal.py::test_a_mistake_of_one_rank_is_a_fault_of_its_host",
    "a connection is closed": "launcher/test_last_words.py::test_what_one_rank_fails_of_comes_before_what_others_make",
    "a read of a checkpoint fails": "dsv3_megatron/checkpoint/test_load_failures.py::test_what_cannot_be_read",
    "a piece is not what was written": "dsv3_megatron/checkpoint/test_load_failures.py::test_what_cannot_be_read",
    "one host misses files of a checkpoint that another sees": (
        "dsv3_megatron/checkpoint/test_load_failures.py::test_what_one_host_misses"
    ),
    "no memory, or a copy that does not arrive": (
        "dsv3_megatron/checkpoint/memory/test_restore.py::test_a_save_that_one_rank_cannot_make"
    ),
    "a share in memory is damaged": (
        "dsv3_megatron/checkpoint/memory/test_restore.py::test_a_state_comes_back_from_where_it_is_whole"
    ),
    "no space for a save": "dsv3_megatron/checkpoint/test_saving.py::test_a_full_disk_on_one_rank_fails_the_save",
    "no space for the last save, in three tries": "dsv3_megatron/checkpoint/test_saving.py::test_a_disk_that_stays",
    **dict.fromkeys(
        [what for what in ROWS if "_seconds`" in what],
        "end_to_end/test_time_outs.py::test_a_rank_that_hangs_ends_the_run_in_the_time_of_its_phase",
    ),
}


def ends(what):
    """Return how this rank ends: line, code, and whether it votes for a refusal."""
    errors, options = MET[what]
    start_processes(World.from_environment(), torch.device("cpu"), timeout_seconds=60)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(REFUSED_FILE, "/refused")
        try:
            agree(errors[dist.get_rank()], **options)
        except Exception as error:
            failure = Failure.of(error)
            return failure.line, failure.code, refusal_file(error) is not None


@cache
def ended():
    return dict(zip(MET, run_ranks(2, ends, list(MET), timeout_seconds=120)))


def test_every_row_is_tested():
    assert ROWS.keys() == MET.keys() | ELSEWHERE.keys()
    for test in ELSEWHERE.values():
        file, _, name = test.partition("::")
        assert f"def {name}" in (ROOT / "tests" / file).read_text(), test


@pytest.mark.parametrize("what", MET)
def test_ranks_end_as_the_row_says(what):
    said, code, job = ROWS[what]
    quoted = re.findall(r"`([^`]+)`", said)[-1].replace("N on HOST (and 7 more there)", "1 on HOST")
    pattern = re.escape(quoted.replace("N on HOST", "1 on HOST").replace("HOST", socket.gethostname()))
    pattern = pattern.replace(re.escape("..."), ".*")
    for rank, (line, its_code, refused) in enumerate(ended()[what]):
        if rank == 0 or "elsewhere" not in said:
            assert re.match(pattern, line), line
        assert (its_code, "refused" if refused else "starts again") == (int(code), job)
