"""What a rank fails of reaches the terminal, with rank and host, in few lines, whoever leaves first."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dsv3_megatron.run.failures.blame import first_to_fail
from dsv3_megatron.run.failures.records import failed_starts
from launcher.command_line.last_words import Failure
from parallel.errors import DataError, RankFault
from testing.torchrun import torchrun

ROOT = Path(__file__).resolve().parents[2]
HOST = socket.gethostname()
MISTAKE = "model.n_routed_expert=8"
LINE = "recipe: model.n_routed_expert is not a key of a recipe; did you mean model.n_routed_experts?"
REPORT_LINES = 40  # two of ours, torchrun's traceback, and its block for one rank: 36 by torch 2.13
BLOCK_LINES = 8  # and for each other rank that it had to end

# Fails on the last rank alone, which no recipe can ask for: argv = where, what, then the command.
OF_THE_LAST = """
import os, runpy, sys
where, what = sys.argv[1:3]
del sys.argv[:3]
if int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
    from parallel.errors import DataError

    def fail(*arguments):
        raise {"mistake": DataError("shard_7 cannot be read on this host"), "bug": ValueError("a bug")}[what]

    if where == "start":
        import dsv3_megatron.preflight.world
        dsv3_megatron.preflight.world.check_world = fail
    else:
        import dsv3_megatron.train.run
        dsv3_megatron.train.run.prepare_trainer = fail
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def root_cause(lines):
    """Return (rank, words) of torchrun's report."""
    text = "\n".join(lines).partition("Root Cause")[2]
    return int(re.search(r"rank +: (\d+)", text)[1]), re.search(r"traceback : (.*)", text)[1]


@pytest.mark.slow
@pytest.mark.parametrize("tries", [1, pytest.param(3, marks=pytest.mark.full)])
def test_a_mistake_of_all_ranks_is_told_once_in_every_try(tries):
    for _ in range(tries):
        lines, code = torchrun(4, "launcher/pretrain.py", "recipe=dsv3_tiny", MISTAKE)
        assert code == 1  # torchrun's, whatever the ranks leave with
        first = re.fullmatch(rf"\[rank (\d) on {HOST}\] {re.escape(LINE)}", lines[0])
        assert first, lines[0]
        same = re.fullmatch(r"\[the same from ranks? ([\d, ]+)\]", lines[1])
        others = {int(rank) for rank in same[1].split(",")} if same else set()
        assert others <= {0, 1, 2, 3} - {int(first[1])}  # on a busy machine some come too late: torchrun ended them
        assert root_cause(lines) == (int(first[1]), LINE)
        assert sum(LINE in line for line in lines) == 2
        assert len(lines) <= REPORT_LINES + BLOCK_LINES * (3 - len(others)), "\n".join(lines)


@pytest.mark.slow
def test_a_mistake_of_one_rank_names_rank_and_host(tmp_path):
    wrapper = tmp_path / "rank"
    wrapper.write_text(f'#!/bin/sh\n[ "$RANK" = 2 ] && set -- "$@" {MISTAKE}\nexec {sys.executable} "$@"\n')
    wrapper.chmod(0o755)
    words = ("launcher/pretrain.py", "recipe=dsv3_tiny", "optim.global_batch=12", f"run.directory={tmp_path / 'run'}")
    lines, code = torchrun(3, wrapper, *words, flags=("--no-python",))
    assert code == 1
    assert lines[0] == f"[rank 2 on {HOST}] {LINE}", lines[:3]
    assert root_cause(lines) == (2, LINE)
    assert len(lines) <= REPORT_LINES + 2 * BLOCK_LINES, "\n".join(lines)


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.parametrize(("where", "what", "ranks"), [("start", "bug", 3), ("group", "mistake", 2)])
def test_what_one_rank_fails_of_comes_before_what_others_make_of_it(tmp_path, where, what, ranks):
    """The others wait for that rank in a collective, and fail when it is gone."""
    script = tmp_path / "of_the_last.py"
    script.write_text(OF_THE_LAST)
    words = ("recipe=dsv3_tiny", "data=synthetic", "optim.global_batch=12", f"run.directory={tmp_path / 'run'}")
    lines, code = torchrun(ranks, script, where, what, "launcher/pretrain.py", *words)
    said = next(line for line in lines if line.startswith("[rank "))
    rank, cause = root_cause(lines)
    assert (code, rank) == (1, ranks - 1), "\n".join(lines)
    if what == "mistake":
        assert said == f"[rank {rank} on {HOST}] {cause}" and "shard_7" in cause
    else:
        assert said == f"[rank {rank} on {HOST}]"
        after = lines[lines.index(said) + 1 :]
        assert after[0].startswith("Traceback") and "ValueError: a bug" in after
        assert cause.startswith("ValueError: a bug (") and "of_the_last.py" in cause
    assert sum("Traceback" in line for line in lines) <= 2  # that one and torchrun's own


RANK = """
import os, sys, time
from pathlib import Path
from launcher.command_line.last_words import Failure, arrived, last_words
from parallel.errors import DoesNotFitError, RecipeError
errors = {"a": RecipeError("a"), "b": DoesNotFitError("b"), "c": OSError("port 1"),
          "lost": RuntimeError("Connection closed by peer")}
arrived()
if sys.argv[1] == "sleep":
    time.sleep(60)
sys.exit(last_words(Failure.of(errors[sys.argv[1]]), note_in=Path(os.environ["NOTES"])))
"""


class Start:
    """Ranks of a host that fail, without torchrun: its signal is sent by hand."""

    def __init__(self, folder, size):
        self.folder, self.size, self.ranks = folder, size, {}

    def fail(self, rank, what, heard=True):
        """Let a rank fail; return when the others know of it."""
        (self.folder / str(rank)).mkdir(parents=True)
        environment = {
            **os.environ, "PYTHONPATH": str(ROOT), "RANK": str(rank), "LOCAL_WORLD_SIZE": str(self.size),
            "TORCHELASTIC_ERROR_FILE": str(self.folder / str(rank) / "error.json"),
            "NOTES": str(self.folder / "run" / "failures" / "start"),
        }  # fmt: skip
        command = [sys.executable, "-c", RANK, what]
        self.ranks[rank] = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + (30 if heard else 0)
        sign = (
            self.folder
            / ("living" if what == "sleep" else "failed")
            / (str(rank) if what == "sleep" else f"rank_{rank}")
        )
        while not sign.exists() and time.monotonic() < deadline:
            time.sleep(0.01)

    def end(self, rank):
        """Return (exit code, what was said) of a rank."""
        said = self.ranks[rank].communicate(timeout=30)[1]
        return self.ranks[rank].returncode, said.splitlines()


def test_each_leaves_with_its_own_code_and_a_signal_loses_no_word(tmp_path):
    start = Start(tmp_path, 4)
    start.fail(1, "a")
    start.fail(2, "b")
    start.fail(0, "a")
    for rank in (1, 2):
        start.ranks[rank].send_signal(signal.SIGTERM)
    assert start.end(1) == (2, [f"[rank 1 on {HOST}] recipe: a", "[the same from rank 0]"])
    assert start.end(2) == (3, [f"[rank 2 on {HOST}] plan: b"])
    assert start.end(0) == (0, [])
    error = json.loads((tmp_path / "1" / "error.json").read_text())
    assert error["message"]["message"] == "recipe: a"


def test_a_rank_that_is_gone_without_a_word_is_missed_and_noted(tmp_path):
    (tmp_path / "run").mkdir()
    start = Start(tmp_path, 4)
    start.fail(0, "sleep")
    start.fail(1, "sleep")
    start.ranks[1].kill()
    while Path(f"/proc/{start.ranks[1].pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)  # a zombie, as until torchrun asks for it
    start.fail(2, "lost")
    start.fail(3, "lost")
    start.ranks[2].send_signal(signal.SIGTERM)
    silent = f"[rank 1 on {HOST}] gone without a word: killed, crashed, or out of the host's memory"
    _, said = start.end(2)
    assert said[0] == silent and sum("rank 1" in line for line in said) == 1, "and rank 0 lives"
    ((_, found),) = failed_starts(tmp_path / "run")
    assert [(failed.rank, failed.kind, failed.of_host) for failed in found.ranks] == [
        (1, "silent", True),
        (2, "follows", False),  # and rank 3 says nothing new
    ]
    blame = first_to_fail(found)
    assert (blame.rank, blame.host, blame.of_host, blame.others) == (1, HOST, True, 1)
    for rank in (0, 3):
        start.ranks[rank].kill()
        start.end(rank)


def test_where_the_run_directory_is_missing_none_is_made(tmp_path):
    start = Start(tmp_path, 1)
    start.fail(0, "c")
    assert start.end(0)[0] == 1 and not (tmp_path / "run").exists()


ONE = "[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.3]:4711"


@pytest.mark.parametrize(
    ("error", "kind", "of_host"),
    [
        (RuntimeError(ONE), "follows", False),
        (RuntimeError("NCCL error: ncclRemoteError: A call failed possibly due to a network error"), "follows", False),
        (RankFault("rank 5 on node-1: OSError: [Errno 5] Input/output error"), "follows", False),
        (RankFault("rank 0 on node-1: OSError: [Errno 5] Input/output error"), "own", True),
        (RuntimeError("CUDA error: uncorrectable ECC error encountered"), "own", True),
        (OSError(5, "Input/output error"), "own", True),
        (ValueError("a bug"), "own", False),
        (DataError("shard_7 cannot be read"), "own", True),
    ],
)
def test_what_a_rank_met_itself_is_told_from_the_loss_of_another(error, kind, of_host, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    failure = Failure.of(error)
    assert (failure.kind, failure.of_host) == (kind, of_host)


def test_a_rank_that_nobody_joins_leaves_by_itself(tmp_path):
    start = Start(tmp_path, 2)
    start.fail(0, "a")
    assert start.end(0) == (2, [f"[rank 0 on {HOST}] recipe: a"])  # rank 1 never came


def test_where_ranks_cannot_agree_each_speaks(tmp_path):
    start = Start(tmp_path, 2)
    (tmp_path / "failed").touch()  # no folder can be made there
    start.fail(1, "c", heard=False)
    code, said = start.end(1)
    assert code == 1
    assert said[0] == f"[rank 1 on {HOST}]" and said[-1] == "OSError: port 1"


@pytest.mark.parametrize(("text", "same"), [("port 1 of 0xab12 is closed", True), ("port 1 of 0xab12 is open", False)])
def test_tracebacks_that_differ_in_numbers_are_the_same(text, same):
    other = Failure.of(OSError("port 23 of 0xff00 is closed"))
    assert (Failure.of(OSError(text)).key == other.key) == same
    assert Failure.of(DataError("shard 1")).key != Failure.of(DataError("shard 2")).key
