"""A batch job is told not to start again where all ranks refuse, and only there."""

import os
import socket
import sys

import pytest

from launcher.command_line.refusal import REFUSED_FILE, refusal_file, write_refusal
from parallel.errors import RankFault, RecipeError, RunInUseError
from testing.torchrun import torchrun

HOST = socket.gethostname()
# The store in the process of rank 0, as in a batch job; torchrun keeps it by itself on one host.
STORE_OF_RANK_0 = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
WORDS = ("recipe=dsv3_tiny", "data=synthetic", "run.steps=1", "logging.wandb=disabled")
NO_REFUSAL = "a fault of this host, not of the recipe; the job may start again"
NO_DATA = "data=indexed data.path=/not/mounted"


def test_what_a_batch_job_may_try_again_is_no_refusal(tmp_path, monkeypatch):
    assert refusal_file(RecipeError("a key")) is None  # nobody asks
    monkeypatch.setenv(REFUSED_FILE, str(tmp_path / "refused"))
    for error in (RunInUseError("another"), RankFault("rank 1 on node-7"), OSError(5, "Input/output error")):
        assert refusal_file(error) is None
    file = refusal_file(RecipeError("a key"))
    write_refusal(file, RecipeError("a key"))
    write_refusal(file, RecipeError("another"))  # the first is kept
    assert file.read_text() == "recipe: a key\n"


def start(tmp_path, *words, of_rank=None, extra="", variables=None):
    """Run two ranks as a batch job does; return the terminal's lines and what the job is told.

    ``of_rank``: which of them gets the ``extra`` words; None = both.
    """
    wrapper = tmp_path / "rank"
    case = "true" if of_rank is None else f'[ "$RANK" = {of_rank} ]'
    wrapper.write_text(f'#!/bin/sh\n{case} && set -- "$@" {extra}\nexec {sys.executable} "$@"\n')
    wrapper.chmod(0o755)
    refused = tmp_path / "refused"
    lines, code = torchrun(
        2, wrapper, "launcher/pretrain.py", *WORDS, f"run.directory={tmp_path / 'run'}", *words,
        flags=("--no-python", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"),
        variables={REFUSED_FILE: str(refused), **(variables or {})},
    )  # fmt: skip
    assert code == 1, "\n".join(lines)  # torchrun's
    return lines, refused.read_text() if refused.exists() else None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("extra", "line", "variables"),
    [
        ("run.steps=0", "recipe: run.steps = 0", STORE_OF_RANK_0),  # before torch is imported
        pytest.param(NO_DATA, "data: ", {}, marks=pytest.mark.full),  # before ranks have met
        ("run.resume=required", "checkpoint: run.resume = required", STORE_OF_RANK_0),  # and after
    ],
)
def test_a_mistake_of_all_ranks_is_told_to_the_job(tmp_path, extra, line, variables):
    lines, told = start(tmp_path, extra=extra, variables=variables)
    assert told is not None and told.startswith(line) and told.count("\n") == 1, "\n".join(lines)
    assert not any("not every rank" in text for text in lines)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.full)])
def test_a_mistake_of_one_rank_is_a_fault_of_its_host(tmp_path, rank):
    lines, told = start(tmp_path, of_rank=rank, extra=NO_DATA, variables=STORE_OF_RANK_0)
    who, rest = f"[rank {rank} on {HOST}]", "\n".join(lines)
    assert told is None, rest
    assert lines[0].startswith(f"{who} data: data.path = /not/mounted"), rest
    assert (
        f"{who} not every rank refuses this: a fault of this host, not of the recipe; the job may start again" in lines
    )
    assert "exitcode  : 1" in rest and "exitcode  : 2" not in rest, rest


@pytest.mark.slow
def test_one_process_tells_the_job_at_once(tmp_path):
    refused = tmp_path / "refused"
    code = os.spawnve(
        os.P_WAIT, sys.executable, [sys.executable, "-m", "launcher.pretrain", *WORDS, "run.steps=0"],
        {**os.environ, REFUSED_FILE: str(refused)},
    )  # fmt: skip
    assert code == 2 and refused.read_text().startswith("recipe: run.steps = 0")
