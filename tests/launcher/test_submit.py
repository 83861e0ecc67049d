"""launcher/submit.py without SLURM: the script it writes, and what it refuses in one line."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from launcher.command_line.compose import compose
from launcher.command_line.overrides import quoted
from launcher.command_line.recipe_files import ROOT
from launcher.slurm.client import call
from launcher.slurm.watch import note_job, status_text
from launcher.submit import main
from parallel.errors import ClusterError, DoesNotFitError, LayoutError, RecipeError

GOLDEN = Path(__file__).parent / "golden"
TWO_NODES = ["recipe=dsv3_tiny", "cluster=slurm", "cluster.nodes=2", "cluster.gpus_per_node=2", "parallel.pipeline=2"]


def script(capsys, *words):
    """Return what dry_run=true prints, with this machine's paths replaced."""
    assert main([*words, "dry_run=true"]) == 0
    return capsys.readouterr().out


def portable(text):
    return text.replace(str(ROOT), "/repository")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("two_nodes", []),
        ("chain", ["chain=3"]),
        ("sweep", ["--multirun", "optim.learning_rate=1e-3,3e-3", "cluster.slurm.array_limit=1"]),
        (
            "pyxis",
            [
                "cluster.slurm.container=pyxis", "cluster.slurm.image=/images/dsv3 1.sqsh",
                "cluster.slurm.mounts=[/data]", "cluster.slurm.interface=ib0",
            ],
        ),
        (
            "apptainer",
            [
                "cluster.slurm.container=apptainer", "cluster.slurm.image=/images/dsv3.sif", "cluster.partition=batch",
                "cluster.slurm.account=lab", "cluster.slurm.cpus_per_task=64", "cluster.slurm.exclude='node[1,7]'",
                "cluster.slurm.options=['--switches=1']", "cluster.slurm.setup=[module load cuda]",
                "cluster.slurm.restarts=2", "+cluster.slurm.environment.NCCL_SOCKET_IFNAME='a b;$c'",
            ],
        ),
        (
            "nodes_256",
            [
                "recipe=dsv3_671b", "cluster=h800_2048", "cluster.nodes=256", "cluster.gpus_per_node=8",
                "parallel.pipeline=16", "data.path=/data/tokens", "cluster.slurm.interface=ib0",
                "cluster.slurm.container=pyxis", "cluster.slurm.image=/images/dsv3.sqsh",
            ],
        ),
    ],
)  # fmt: skip
def test_the_script_is_the_one_that_was_reviewed(capsys, monkeypatch, name, words):
    """Golden texts: a change of the script is a change somebody reads. To renew: write the printed text there."""
    monkeypatch.chdir(ROOT)
    text = portable(script(capsys, *TWO_NODES, "cluster.slurm.python=python", *words))
    assert text == (GOLDEN / f"{name}.sbatch").read_text()


@pytest.mark.parametrize("golden", sorted(GOLDEN.glob("*.sbatch")), ids=lambda p: p.stem)
def test_bash_and_shellcheck_accept_the_script(golden):
    subprocess.run(["bash", "-n", str(golden)], check=True)
    if shutil.which("shellcheck") is None:
        pytest.skip("no shellcheck here; install with: apt-get install shellcheck")
    done = subprocess.run(["shellcheck", str(golden)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_published_model_asks_for_what_its_layout_needs(capsys):
    assert main(["recipe=dsv3_671b", "cluster=h800_2048", "dry_run=true"]) == 0
    out, told = capsys.readouterr()
    assert "#SBATCH --nodes=256\n" in out and "--nproc-per-node=8 " in out
    assert main(["recipe=dsv3_671b", "cluster=slurm", "dry_run=true"]) == 0
    out, told = capsys.readouterr()
    assert "#SBATCH --nodes=128\n" in out
    assert "128 nodes x 8 ranks (the least its layout needs" in told


def test_an_nvlink_domain_is_no_node(capsys):
    layout = ["parallel.pipeline=4", "parallel.expert=64", "parallel.schedule=1f1b", "parallel.stages=null"]
    words = ["recipe=dsv3_671b", "cluster=gb200_256", *layout, "cluster.memory=0"]
    text = script(capsys, *words)
    assert "#SBATCH --nodes=64\n" in text and "#SBATCH --gpus-per-node=4\n" in text
    assert "#SBATCH --segment=16\n" in text and "--nproc-per-node=4 " in text  # sixteen nodes of a rack at a time
    assert "--segment" not in script(capsys, *words, "cluster.nvlink_domain=4")
    with pytest.raises(RecipeError, match="nvlink_domain = 6 is not a multiple of cluster.gpus_per_node = 4; count"):
        main([*words, "cluster.nvlink_domain=6", "dry_run=true"])


def test_what_does_not_fit_the_devices_is_not_submitted(capsys):
    assert main(["recipe=dsv3_671b", "cluster=h800_2048", "dry_run=true"]) == 0
    assert "fits by formulae: at most" in capsys.readouterr().err
    with pytest.raises(DoesNotFitError, match="would hold .* of 40.0 GiB") as caught:
        main(["recipe=dsv3_671b", "cluster=h800_2048", "cluster.memory=40GiB", "dry_run=true"])
    assert caught.value.exit_code == 3 and "\n" not in str(caught.value)


NASTY = [
    "a b",
    "it's",
    'say "x"',
    "$HOME",
    "${x}",
    "a,b",
    "back\\slash",
    "semi;colon",
    "per%cent",
    "tail\\",
    "[x]",
    "ü",
]


@pytest.mark.parametrize("value", NASTY)
def test_a_directory_arrives_at_the_run_as_it_was_written(capsys, tmp_path, value):
    """The script's own lines are run by bash; what they hand on is composed as the job would compose it."""
    directory = tmp_path / value
    text = script(capsys, *TWO_NODES, f"run.directory={quoted(directory)}")
    head = text.split("mkdir -p")[0] + 'printf "%s\\0" "$run" "${overrides[@]}"'
    run, *overrides = subprocess.run(
        ["bash", "-c", "SLURM_JOB_ID=1\n" + head], capture_output=True, check=True
    ).stdout.split(b"\0")[:-1]
    assert run.decode() == str(directory)
    assert compose([word.decode() for word in overrides]).run.directory == str(directory)


@pytest.mark.parametrize(
    ("words", "kind", "message"),
    [
        (["cluster=local"], ClusterError, "cluster = local is started by torchrun, not by SLURM"),
        (["cluster.nodes=1", "cluster.gpus_per_node=1"], DoesNotFitError, "needs at least 2; set cluster.nodes=2"),
        (["cluster.nodes=3", "cluster.gpus_per_node=1"], LayoutError, "3"),
        (["cluster.slurm.container=pyxis"], ClusterError, "needs an image"),
        (["chain=x"], RecipeError, "chain = x: input should be a valid integer"),
        (["dry_run=maybe"], RecipeError, "dry_run = maybe"),
        (["cluster.gpus_per_node=0"], ClusterError, "cluster.slurm.ranks_per_node"),
        (["+cluster.slurm.environment={A-B: x}"], RecipeError, "not a name of an environment variable"),
        (["cluster.slurm.acount=x"], RecipeError, "did you mean cluster.slurm.account"),
        (["--multirun", "chain=2", "run.seed=1,2"], ClusterError, "drop chain"),
        (["--verbose"], RecipeError, "--verbose is not a flag"),
        (["cluster.time_limit=86400"], RecipeError, "YAML reads 24:00:00 as 86400"),
        (["run.directory='a\nb'"], ClusterError, "control character"),
    ],
)
def test_what_cannot_be_submitted_is_one_line(words, kind, message):
    with pytest.raises(kind, match=message.replace("(", r"\(")) as caught:
        main([*TWO_NODES, *words, *([] if any(w.startswith("dry_run") for w in words) else ["dry_run=true"])])
    assert "\n" not in str(caught.value)


def test_without_slurm_the_line_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ClusterError, match="sbatch is not on PATH.*dry_run=true"):
        main([*TWO_NODES, f"run.directory={tmp_path / 'run'}"])


@pytest.mark.parametrize(
    ("says", "line"),
    [
        ("sbatch: error: invalid partition specified: x\nsbatch: error: Batch job submission failed: Invalid partition "
         "name specified", "cluster.partition names no partition"),
        ("sbatch: error: Unable to contact slurm controller (connect failure)", "cannot reach the controller"),
        ("sbatch: fatal: Could not establish a configuration source", "belongs to no cluster; log in"),
        ("sbatch: error: something new", "sbatch refused: something new"),
    ],
)  # fmt: skip
def test_what_sbatch_says_becomes_one_line(monkeypatch, tmp_path, says, line):
    (tmp_path / "sbatch").write_text(f"#!/bin/sh\ncat >&2 <<'END'\n{says}\nEND\nexit 1\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(ClusterError, match=line) as caught:
        call(["sbatch", "x"])
    assert "\n" not in str(caught.value)


def test_status_shows_the_last_step_beside_the_job(monkeypatch, tmp_path):
    facts = "JobId=7 JobState=RUNNING Reason=None Restarts=2 RunTime=00:01:00 TimeLimit=1-00:00:00 NodeList=n[1-2]"
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\necho '{facts}'\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    run = tmp_path / "run"
    (run / "checkpoints" / "step_00000002").mkdir(parents=True)
    note_job(run, "7", "singleton")
    (run / "metrics.jsonl").write_text(
        json.dumps({"step": 3, "lm_loss": 1.5, "tokens": 3000, "tokens_per_second": 100.0, "skipped": 0}) + "\n"
    )
    text = status_text(run)
    assert "RUNNING" in text and "00:01:00 of 1-00:00:00 on n[1-2]" in text and "restarts 2" in text
    assert "step 3  loss 1.5000  3K tokens" in text and "newest checkpoint: step_00000002" in text


@pytest.mark.parametrize(
    "row", ["{}", '{"step": "a"}', "x",
            '{"step": 1, "tokens": 1, "tokens_per_second": 1, "skipped": 0, "lm_loss": [1]}',
            f'{{"step": 1, "tokens": 1, "tokens_per_second": 1, "skipped": 0, "lm_loss": 1{"0" * 400}}}'],
)  # fmt: skip
def test_metrics_of_somebody_else_leave_a_status(monkeypatch, tmp_path, row):
    monkeypatch.setattr("launcher.slurm.watch.job_facts", lambda job: [])
    note_job(tmp_path, "7", None)
    (tmp_path / "metrics.jsonl").write_text(row + "\n")
    assert re.search("no step yet|ends with a row that is no step", status_text(tmp_path))


def test_a_pipe_in_the_place_of_metrics_and_endless_jobs_are_a_line(monkeypatch, tmp_path):
    monkeypatch.setattr("launcher.slurm.watch.job_facts", lambda job: [])
    note_job(tmp_path, "7", None)
    os.mkfifo(tmp_path / "metrics.jsonl")
    assert "metrics.jsonl cannot be read (not a regular file)" in status_text(tmp_path)
    with (tmp_path / "jobs.jsonl").open("r+b") as file:
        file.truncate(1 << 30)
    with pytest.raises(ClusterError, match=r"jobs\.jsonl has more than 262,144 bytes"):
        status_text(tmp_path)


def test_a_run_that_was_never_submitted_has_no_status(tmp_path):
    with pytest.raises(ClusterError, match="no job was submitted"):
        main(["status", f"run={tmp_path}"])


@pytest.mark.parametrize("job", ["--user=me", "1 2", "", None, 7.5, ["1"], "1" * 40, "7;x"])
@pytest.mark.parametrize("ask", ["status", "cancel", "logs"])
def test_a_job_file_of_somebody_else_names_numbers_or_nothing(tmp_path, job, ask):
    """scancel would take `--user=me` for an option."""
    (tmp_path / "jobs.jsonl").write_text(json.dumps({"job": job}) + "\n")
    with pytest.raises(ClusterError, match=r"jobs\.jsonl: entry 1 names no job by its number") as caught:
        main([ask, f"run={tmp_path}"])
    assert "\n" not in str(caught.value)


def test_a_job_of_another_run_is_not_cancelled(tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    run.mkdir()
    note_job(run, "7", None)
    running = {"JobId": "7", "JobState": "RUNNING", "Command": f"{tmp_path}/elsewhere/mine/submit.sbatch"}
    monkeypatch.setattr("launcher.slurm.watch.job_facts", lambda job: [running])
    monkeypatch.setattr("launcher.slurm.client.cancel", lambda jobs: pytest.fail("cancelled"))
    assert main(["cancel", f"run={run}"]) == 0
    assert "no job of this run" in capsys.readouterr().out


def test_logs_end_although_a_log_has_no_end(tmp_path, monkeypatch, capsys):
    note_job(tmp_path, "7", None)
    (tmp_path / "slurm-7.out").symlink_to("/dev/zero")
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "a-0-7.log").write_text("one\ntwo\n" * 1000)
    monkeypatch.setattr("launcher.slurm.watch.job_facts", lambda job: [])
    assert main(["logs", f"run={tmp_path}", "lines=1"]) == 0
    said = capsys.readouterr().out
    assert "not a regular file" in said and said.strip().endswith("two")
