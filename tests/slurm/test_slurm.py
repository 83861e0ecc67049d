"""launcher/submit.py on a real SLURM: real training over two nodes, and every way a job can end.

What trains is small; jobs whose training does not matter run a stand-in for Python that says what it was called with.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest

from dsv3_megatron.checkpoint.manifest import newest_valid
from launcher.command_line.recipe_files import ROOT
from launcher.slurm.client import job_facts
from launcher.submit import main
from parallel.errors import ClusterError
from testing.pages import commands
from testing.signals import catches
from testing.training.tiny import SMALL

pytestmark = pytest.mark.slow
full = pytest.mark.full

# Two nodes, a rank on each: a pipeline between them.
ON_CPUS = (
    "recipe=dsv3_tiny", "cluster=slurm", "cluster.device=cpu", "cluster.nodes=2", "cluster.gpus_per_node=0",
    "cluster.slurm.ranks_per_node=1", "cluster.slurm.exclusive=false", "cluster.slurm.memory=1000",
    "cluster.slurm.warning_seconds=60", "cluster.time_limit=10", "cluster.slurm.check_nodes=false",
    "cluster.slurm.exclude_after=0",
)  # fmt: skip
TRAINING = (*ON_CPUS, *SMALL, "parallel.pipeline=2", "checkpoint.every_steps=5", "logging.wandb=disabled")


def submit(directory, *words, base=TRAINING, capsys=None):
    """Submit; return the jobs' numbers."""
    assert main([*base, f"run.name={directory.name}", f"run.directory={directory}", *words]) == 0
    return [json.loads(line)["job"] for line in (directory / "jobs.jsonl").read_text().splitlines()]


def facts(job):
    return job_facts(job)[0]


def wait_for(what, seconds, told=lambda: "", every=0.3):
    """Wait until ``what()`` holds; return its value."""
    deadline = time.monotonic() + seconds
    while not (value := what()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {told()}"
        time.sleep(every)
    return value


def wait_for_end(job, directory, seconds=240):
    """Wait until a job has ended for good; return its state."""

    def ended():
        state = facts(job)["JobState"]
        return state not in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING") and state

    return wait_for(ended, seconds, lambda: f"{facts(job)}\n{logs(directory)}")


def logs(directory):
    files = [*directory.glob("slurm-*.out"), *(directory / "logs").glob("*.log")]
    return "\n".join(f"== {f.name}\n{f.read_text()[-3000:]}" for f in files)


def steps(directory):
    file = directory / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")] if file.exists() else []


def resumed(directory):
    """Return whether the run went on from a checkpoint."""
    return '"resumed"' in (directory / "events.jsonl").read_text()


def at_step(directory, step):
    return wait_for(lambda: len(steps(directory)) >= step, 240, lambda: logs(directory))


def cancelled(job, directory):
    subprocess.run(["scancel", job], check=True)
    return wait_for_end(job, directory, 60)


def stand_in(tmp_path, body):
    """Return an executable that takes Python's place in a job. $run is the run directory."""
    file = tmp_path / "stand in"
    head = """#!/bin/bash
for word; do [[ $word == run.directory=* ]] && run=${word#*=}; done
run=${run#"'"} run=${run%"'"}
"""
    file.write_text(head + body)
    file.chmod(0o755)
    return f"cluster.slurm.python='{file}'"


@pytest.fixture(scope="module")
def undisturbed(cluster, tmp_path_factory):
    """A run of forty steps over two nodes that nothing happened to."""
    directory = tmp_path_factory.mktemp("slurm") / "undisturbed run"
    [job] = submit(directory, "run.steps=40", "cluster.slurm.interface=lo", "cluster.slurm.check_nodes=true")
    assert wait_for_end(job, directory) == "COMPLETED", logs(directory)
    return directory


def same_losses(mine, theirs):
    for a, b in zip(steps(mine), steps(theirs), strict=True):
        for field in ("step", "lm_loss", "mtp_loss", "grad_norm", "max_violation"):
            assert a[field] == b[field], (field, a["step"])


def test_a_run_trains_over_two_nodes_and_finishes(undisturbed, capsys):
    assert [s["step"] for s in steps(undisturbed)] == list(range(1, 41))
    assert (undisturbed / "finished").exists() and not (undisturbed / "refused").exists()
    of_nodes = sorted((undisturbed / "logs").glob("*-[01]-*.log"))
    assert len(of_nodes) == 2
    lines = [line for file in of_nodes for line in file.read_text().splitlines()]
    assert any(re.fullmatch(r"0: nodes: 2 with 2 ranks checked in \d+ s: fit", line) for line in lines)
    (checked,) = (json.loads(file.read_text()) for file in (undisturbed / "logs").glob("nodes-*.json"))
    assert [rank["host"] for rank in checked["ranks"]] == ["node1", "node2"] and checked["findings"] == []
    assert "0: finished: 40 steps" in "\n".join(line[:22] for line in lines)  # the rank that says it
    assert main(["status", f"run={undisturbed}"]) == 0
    text = capsys.readouterr().out
    assert "COMPLETED" in text and "step 40 " in text and "finished" in text
    assert main(["logs", f"run={undisturbed}", "lines=3"]) == 0
    text = capsys.readouterr().out
    assert "finished: 40 steps" in text and text.index("COMPLETED") < text.index("step 40 ") < text.index("==>")


def test_tasks_that_are_no_ranks_are_refused(cluster, tmp_path):
    """Each would train as the only rank; a step of one task is a run, also in a job of several."""
    pretrain = [sys.executable, str(ROOT / "launcher" / "pretrain.py"), f"run.directory={tmp_path / 'run'}"]
    allocation = ["salloc", "--quiet", "--ntasks=2", "--nodes=2", "--mem=1000"]
    done = subprocess.run(
        [*allocation, "bash", "-c", 'srun "$0" "$@"; srun --ntasks=1 --nodes=1 "$0" -c "$one"', *pretrain],
        capture_output=True, text=True, timeout=120,
        env=os.environ | {"one": "from parallel.world import World; print(World.from_environment())"},
    )  # fmt: skip
    assert done.stderr.count("SLURM_STEP_NUM_TASKS = 2, but WORLD_SIZE is not set") == 2, done.stderr
    assert "World(rank=0, size=1, local_rank=0)" in done.stdout, done.stdout + done.stderr
    assert not (tmp_path / "run").exists()


@full
def test_the_command_of_the_page_runs(cluster, tmp_path, capsys):
    """What docs/slurm.md offers to try on one machine, with a smaller model."""
    [command] = [c for c in commands(ROOT / "docs" / "slurm.md") if "cluster.device=cpu" in c]
    run = tmp_path / "by hand"
    [job] = submit(run, *SMALL, "run.steps=3", base=shlex.split(command)[2:])
    assert wait_for_end(job, run) == "COMPLETED", logs(run)
    capsys.readouterr()
    assert main(["status", f"run={run}"]) == 0
    assert "step 3 " in capsys.readouterr().out


def test_the_warning_saves_requeues_and_goes_on_bit_exact(undisturbed, cluster, tmp_path, capsys):
    run = tmp_path / "warned"
    [job] = submit(run, "run.steps=40", "checkpoint.every_steps=0")
    with pytest.raises(ClusterError, match=f"is in use by job {job}"):
        submit(run, "run.steps=40")
    at_step(run, 2)
    subprocess.run(["scancel", "-s", "USR1", job], check=True)  # what SLURM does before the time limit
    wait_for(lambda: facts(job)["Restarts"] == "1", 60, lambda: f"{facts(job)}\n{logs(run)}")
    saved = newest_valid(run / "checkpoints")[0]
    assert saved is not None and not (run / "finished").exists()
    assert wait_for_end(job, run) == "COMPLETED", logs(run)
    assert resumed(run)
    same_losses(run, undisturbed)


def shells_that_keep_warnings(run):
    """Return how many of the shells around the run's agents wait for the signal by now: those of both nodes' steps."""
    found = 0
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            words = process.cmdline()
            shell = len(words) > 2 and words[1] == "-c" and words[2].strip().startswith("trap")
            found += shell and any(str(run) in word for word in words[3:]) and catches(process.pid, signal.SIGUSR1)
    return found


@full
def test_a_warning_before_there_are_ranks_is_kept(cluster, tmp_path):
    """The agents are still importing torch: they ignore the signal, and nobody else is there to hear it."""
    run = tmp_path / "warned early"
    [job] = submit(run, "run.steps=4")
    wait_for(lambda: shells_that_keep_warnings(run) == 2, 120, lambda: f"{facts(job)}\n{logs(run)}", every=0.02)
    assert not (run / "lock").exists()
    subprocess.run(["scancel", "-s", "USR1", job], check=True)
    assert wait_for_end(job, run) == "COMPLETED", logs(run)
    assert facts(job)["Restarts"] == "1" and "asked to stop before the first step" in logs(run)
    assert [s["step"] for s in steps(run)] == [1, 2, 3, 4]


def test_cancelling_leaves_a_valid_checkpoint_and_no_requeue(cluster, tmp_path, capsys):
    run = tmp_path / "cancelled"
    [job] = submit(run, "run.steps=2000")
    at_step(run, 6)
    capsys.readouterr()
    assert main(["cancel", f"run={run}"]) == 0  # scancel
    text = capsys.readouterr().out
    assert f"cancelled {job}" in text and f"job {job}" in text and re.search(r"step \d+  loss", text)
    assert wait_for_end(job, run, 60) == "CANCELLED"
    found, wrong = newest_valid(run / "checkpoints")
    assert found is not None and not wrong
    assert facts(job)["Restarts"] == "0"


@full
def test_a_dead_node_requeues_on_the_others(undisturbed, cluster, tmp_path):
    run = tmp_path / "node died"
    [job] = submit(run, "run.steps=2000")
    at_step(run, 6)
    lost = re.findall(r"\d", facts(job)["NodeList"])[-1]
    cluster("fail", f"node{lost}")
    try:
        wait_for(lambda: facts(job)["Restarts"] == "1" and facts(job)["JobState"] == "RUNNING", 120,
                 lambda: f"{facts(job)}\n{logs(run)}")  # fmt: skip
        assert lost not in re.findall(r"\d", facts(job)["NodeList"])
        wait_for(lambda: resumed(run), 120, lambda: logs(run))
    finally:
        subprocess.run(["scancel", job], check=True)
        wait_for_end(job, run, 60)
        cluster("recover", f"node{lost}")


def test_a_bad_recipe_is_not_started_again(cluster, tmp_path):
    run = tmp_path / "bad"
    [job] = submit(run, "run.resume=required")  # only the run itself can find out that there is no checkpoint
    assert wait_for_end(job, run, 120) == "FAILED"
    assert facts(job)["Restarts"] == "0" and facts(job)["ExitCode"] == "2:0"
    assert "holds no valid checkpoint" in (run / "refused").read_text()


def test_a_crash_is_tried_again_but_not_for_ever(cluster, tmp_path, capsys):
    run = tmp_path / "crashing"
    # The first node to fail ends the others: each waits until both have written.
    body = 'echo start >>"$run/log"; until (($(wc -l <"$run/log") % 2 == 0)); do sleep 0.05; done; exit 7\n'
    python = stand_in(tmp_path, body)
    [job] = submit(run, python, "cluster.slurm.max_starts=2", base=ON_CPUS)
    assert wait_for_end(job, run, 120) == "FAILED"
    assert (run / "log").read_text().split() == ["start"] * 4  # two nodes, two starts
    assert main(["status", f"run={run}"]) == 0
    assert "2 failed starts without a new checkpoint" in capsys.readouterr().out


def test_a_host_that_failed_is_not_used_again(cluster, tmp_path):
    run = tmp_path / "bad host"
    body = """case "$*" in *launcher.slurm.after*) echo node1; exit;; esac
echo "$SLURMD_NODENAME" >>"$run/log"
until (($(wc -l <"$run/log") % 2 == 0)); do sleep 0.05; done
[ -e "$run/excluded" ] && exec touch "$run/finished"; exit 7
"""
    [job] = submit(run, stand_in(tmp_path, body), "cluster.slurm.exclude_after=1", base=ON_CPUS)
    assert wait_for_end(job, run, 120) == "COMPLETED", logs(run)
    hosts = (run / "log").read_text().split()
    assert sorted(hosts[:2]) == ["node1", "node2"] and sorted(hosts[2:]) == ["node2", "node3"]
    assert facts(job)["ExcNodeList"] == "node1" and facts(job)["Restarts"] == "1"


def test_starts_are_counted_anew_after_a_checkpoint(cluster, tmp_path):
    run = tmp_path / "slow_but_sure"
    body = '[[ $SLURM_PROCID == 0 ]] || exit 0\nn=$(ls "$run/checkpoints" | wc -l)\n'
    body += 'mkdir "$run/checkpoints/step_0000000$n"\n[[ $n == 2 ]] && touch "$run/finished"\nexit 0\n'
    [job] = submit(run, stand_in(tmp_path, body), "cluster.slurm.max_starts=1", base=ON_CPUS)
    assert wait_for_end(job, run, 120) == "COMPLETED"
    assert facts(job)["Restarts"] == "2"


def test_a_chain_runs_in_order_and_stops_when_the_run_is_finished(cluster, tmp_path):
    run = tmp_path / "chain"
    body = '[[ $PET_NODE_RANK == 0 ]] || exit 0\necho "$SLURM_JOB_ID" >>"$run/log"\n'
    body += 'echo "$SLURMD_NODENAME $*" >>"$run/first"\n'
    body += '[[ $(wc -l <"$run/log") == 2 ]] && touch "$run/finished"\nexit 0\n'
    jobs = submit(run, stand_in(tmp_path, body), "chain=3", base=ON_CPUS)
    assert len(jobs) == 3
    assert wait_for_end(jobs[-1], run, 120) == "COMPLETED"
    assert (run / "log").read_text().split() == jobs[:2]  # the third finds nothing to do
    assert all(facts(job)["Restarts"] == "0" for job in jobs)
    for line in (run / "first").read_text().splitlines():  # rank 0 is on the node that the others look for it
        node, _, words = line.partition(" ")
        assert f"--master-addr={node} " in words


def test_a_sweep_is_an_array_of_runs_that_requeue_apart(cluster, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    body = '[[ $SLURM_PROCID == 0 ]] || exit 0\nprintf "%s\\n" "$@" >>"$run/words"\n'
    body += (
        '[[ $run == *seed=4* && ! -e $run/failed ]] && touch "$run/failed" && exit 3\nsleep 4; touch "$run/finished"\n'
    )
    assert main([*ON_CPUS, stand_in(tmp_path, body), "--multirun", "run.seed=3,4"]) == 0
    for seed, starts in ((4, 2), (3, 1)):  # the last task fails once, and is started again alone
        run = tmp_path / f"runs/dsv3_tiny-run.seed={seed}"
        wait_for((run / "finished").exists, 90, lambda: logs(tmp_path / "runs/dsv3_tiny-sweep"))
        words = (run / "words").read_text().split("\n")
        assert words.count(f"run.seed={seed}") == starts


def test_slurm_judges_a_script_without_running_it(cluster, tmp_path, capsys):
    assert main([*ON_CPUS, f"run.directory={tmp_path / 'a'}", "dry_run=test"]) == 0
    assert "to start at" in capsys.readouterr().out
    with pytest.raises(ClusterError, match="cluster.partition names no partition") as caught:
        main([*ON_CPUS, f"run.directory={tmp_path / 'a'}", "cluster.partition=nowhere"])
    assert "\n" not in str(caught.value)
    with pytest.raises(ClusterError, match="ask for more than the partition has"):
        main([*ON_CPUS, f"run.directory={tmp_path / 'a'}", "cluster.nodes=8", "dry_run=test"])


@full
@pytest.mark.skipif("SLURM_LONG" not in os.environ, reason="takes three minutes; set SLURM_LONG=1")
def test_the_time_limit_itself_warns_and_the_run_goes_on(undisturbed, cluster, tmp_path):
    run = tmp_path / "timed"
    words = (
        "run.steps=1000000",
        "checkpoint.every_steps=0",
        "cluster.time_limit=2",
        "cluster.slurm.warning_seconds=60",
    )
    [job] = submit(run, *words)
    wait_for(lambda: facts(job)["Restarts"] == "1", 180, lambda: f"{facts(job)}\n{logs(run)}")
    last = steps(run)[-1]["step"]
    wait_for(lambda: resumed(run), 120, lambda: logs(run))
    [saved] = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines() if '"resumed"' in line]
    assert saved["step"] == last > 0  # no step lost: the only save is the warning's
    cancelled(job, run)
