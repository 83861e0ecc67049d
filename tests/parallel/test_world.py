"""What a process is told of its world, and by whom."""

import pytest

from parallel.errors import LayoutError
from parallel.world import World

TOLD = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


def world(monkeypatch, **variables):
    for name in TOLD:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return World.from_environment()


@pytest.mark.parametrize("variable", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_several_tasks_that_are_no_ranks_are_refused_with_how_to_start_ranks(monkeypatch, variable):
    """`srun -n2 python launcher/pretrain.py`: each would train as the only rank, in one directory."""
    for told in ({}, {"RANK": "0"}, {"LOCAL_RANK": "0"}):
        with pytest.raises(LayoutError, match=f"{variable} = 2, but WORLD_SIZE is not set.*dsv3 submit") as caught:
            world(monkeypatch, **{variable: "2"}, **told)
        assert "\n" not in str(caught.value)
    assert world(monkeypatch, **{variable: "2"}, RANK="1", WORLD_SIZE="2", LOCAL_RANK="1").rank == 1
    assert world(monkeypatch, **{variable: "2"}, WORLD_SIZE="1").size == 1  # runs of their own, as their user says
    assert world(monkeypatch, **{variable: "1"}).size == 1
    assert world(monkeypatch, **{variable: "of somebody else"}).size == 1


def test_a_shell_of_a_job_with_several_tasks_is_one_process(monkeypatch):
    """salloc and the batch script know the job's tasks (SLURM_NTASKS), and are none of a step's."""
    monkeypatch.setenv("SLURM_NTASKS", "2")
    assert world(monkeypatch, SLURM_PROCID="0").size == 1
