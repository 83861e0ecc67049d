"""The batch script does what the recipe asks for and nothing that a value or a run directory has smuggled in.

Scripts are run by bash, with stand-ins for SLURM's commands that do nothing.
"""

import itertools
import os
import subprocess
import types
import typing

import pytest
from omegaconf import OmegaConf

from dsv3_megatron.checkpoint.memory.folder import State
from dsv3_megatron.checkpoint.memory.lives import Lives
from dsv3_megatron.settings import ClusterSettings, SlurmSettings
from launcher.command_line.compose import build, compose, compose_config
from launcher.command_line.overrides import quoted
from launcher.slurm.job import Point, job_of
from launcher.slurm.script import render
from parallel.errors import UserError

TWO_NODES = ["recipe=dsv3_tiny", "cluster=slurm", "cluster.nodes=2", "cluster.gpus_per_node=2", "parallel.pipeline=2"]


def script_of(recipe, folder, overrides=()):
    job = job_of(recipe, [Point(tuple(overrides), folder / "run")], chained=False, working_directory=folder)
    return render(job)


def run(text, folder, programs=None, **variables):
    """Run a script; return what it printed. Commands of SLURM do nothing, but for those that ``programs`` has."""
    place = folder / "programs"
    place.mkdir(exist_ok=True)
    for name in ("srun", "scontrol"):
        (place / name).write_text((programs or {}).get(name, "#!/bin/sh\n"))
        (place / name).chmod(0o755)
    environment = {"PATH": f"{place}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "a",
                   "SLURM_JOB_NUM_NODES": "1", "SLURM_CPUS_ON_NODE": "4"}  # fmt: skip
    done = subprocess.run(
        ["bash", "-c", text], cwd=folder, capture_output=True, text=True, timeout=20, env=environment | variables
    )
    return done.stdout + done.stderr


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "logs").mkdir()
    return tmp_path


@pytest.fixture
def script(folder):
    return script_of(compose([*TWO_NODES, "cluster.slurm.python='true'"]), folder)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("nothing BASH_VERSINFO[$(touch ran)0]", "nothing 1 1"),
        ("nothing a[$(touch ran)]", "nothing 1 1"),
        ("nothing 1 a[$(touch ran)]", "nothing 2 1"),
        ("$(touch ran) `touch ran`", "nothing 1 1"),
        ("nothing 08 08", "nothing 9 9"),
        ("nothing 99999999999999999999", "nothing 1 1"),
        ("nothing -5", "nothing 1 1"),
        ("", "nothing 1 1"),
        ("nothing 1", "nothing 2 1"),
        ("nothing 7 2", "nothing 8 3"),
        ("step_00000001 2", "nothing 1 1"),
    ],
)
def test_the_count_of_starts_is_a_number_and_runs_nothing(folder, script, before, after):
    (folder / "run" / "starts").write_text(before + "\n")
    run(script.replace("-ge 3 ]", "-ge 30 ]"), folder)
    assert (folder / "run" / "starts").read_text().strip() == after
    assert not list(folder.rglob("ran"))


@pytest.mark.parametrize("name", ["starts", "refused", "logs/environment-7-0.txt"])
def test_the_script_writes_through_no_link(folder, script, name):
    (folder / "precious").write_text("precious")
    (folder / "run" / "starts").write_text("nothing 30\n" if name == "refused" else "nothing 0\n")
    (folder / "run" / name).unlink(missing_ok=True)
    (folder / "run" / name).symlink_to(folder / ("absent" if name == "refused" else "precious"))
    run(script, folder)
    assert (folder / "precious").read_text() == "precious" and not (folder / "absent").exists()
    assert (folder / "run" / name).read_text() and not (folder / "run" / name).is_symlink()


@pytest.mark.parametrize(
    ("begun_with", "before", "after"),
    [
        (None, "nothing 2", "nothing 3 1"),
        (State(95, "a" * 8), "nothing 2", "nothing+95 1 1"),  # the last start has resumed from memory: progress
        (State(95, "b" * 8), "nothing+95 2", "nothing+95 3 1"),  # and the one after it has come no further
        ("$(touch ran)", "nothing 2", "nothing 3 1"),
    ],
)
def test_a_start_from_a_newer_state_in_memory_is_progress(folder, script, begun_with, before, after):
    Lives("0" * 16, "c" * 8, begun_with if isinstance(begun_with, State) else None).write(folder / "run/memory.json")
    if isinstance(begun_with, str):
        (folder / "run/memory.json").write_text(f'"step": {begun_with}\n"step": a[{begun_with}]')
    (folder / "run" / "starts").write_text(before + "\n")
    run(script, folder)
    assert (folder / "run" / "starts").read_text().strip() == after
    assert not list(folder.rglob("ran"))


@pytest.mark.parametrize(
    ("file", "text", "runs"),
    [
        ("excluded", "b,c\n", True),
        ("excluded", "c,a\n", False),  # this job's only node
        ("excluded", "$(touch ran),a[$(touch ran)]\n", True),
    ],
)
def test_a_job_on_an_excluded_host_asks_for_others_and_runs_nothing(folder, script, file, text, runs):
    (folder / "run" / file).write_text(text)
    scontrol = '#!/bin/sh\n[ "$1" = show ] && echo a || echo "scontrol $*"\n'
    said = run(script, folder, programs={"srun": "#!/bin/sh\necho trained\n", "scontrol": scontrol})
    assert ("trained" in said) is runs and "scontrol requeue 7" in said
    assert ("scontrol update JobId=7 ExcNodeList=c,a" in said) is not runs
    assert not list(folder.rglob("ran"))


@pytest.mark.parametrize(
    ("warned", "checkpoint", "after"),
    [
        (False, False, "nothing 6 2"),
        (True, False, "nothing 6 1"),  # the end of a slot, a preemption: SLURM has said so before
        (False, True, "step_00000010 0 0"),  # it has got somewhere before it failed
    ],
)
def test_only_a_start_that_fails_without_getting_anywhere_counts(folder, script, warned, checkpoint, after):
    (folder / "run" / "starts").write_text("nothing 5 1\n")
    srun = "#!/bin/sh\n" + ('touch "$DSV3_WARNED_FILE"\n' if warned else "")
    srun += f"mkdir {folder / 'run' / 'checkpoints' / 'step_00000010'}\n" if checkpoint else ""
    run(script, folder, programs={"srun": srun + "exit 1\n"})
    assert (folder / "run" / "starts").read_text().strip() == after


@pytest.mark.parametrize("name", ["starts", "refused", "memory.json", "excluded"])
def test_the_script_waits_for_no_pipe(folder, script, name):
    os.mkfifo(folder / "run" / name)
    run(script, folder)


def test_no_credential_is_noted_and_what_is_made_is_its_owners(folder, script):
    variables = {
        "SLURM_JWT": "secret", "NCCL_API_TOKEN": "secret", "UCX_PASSWORD": "secret", "AWS_SECRET_ACCESS_KEY": "secret",
        "NCCL_DEBUG_SUBSYS": "INIT",
    }  # fmt: skip
    run(script, folder, **variables)
    noted = folder / "run" / "logs" / "environment-7-0.txt"
    assert "NCCL_DEBUG_SUBSYS=INIT" in noted.read_text() and "secret" not in noted.read_text()
    assert noted.stat().st_mode & 0o077 == 0


def texts(model):
    """Return the names of a section's keys that take a text, alone or in a list or mapping."""

    def has_text(kind):
        return kind is str or any(has_text(part) for part in typing.get_args(kind) if part is not types.NoneType)

    return [name for name, field in model.model_fields.items() if has_text(field.annotation)]


COMPOSED = compose_config([*TWO_NODES, "cluster.slurm.container=apptainer", "cluster.slurm.image=/x.sif"])
KEYS = [f"cluster.{name}" for name in texts(ClusterSettings) if name != "peak_tflops"]
KEYS += [f"cluster.slurm.{name}" for name in texts(SlurmSettings) if name != "setup"]  # whose lines are commands
KEYS += ["recipe", "run.name", "run.directory"]
SMUGGLED = ("x\ntouch ran", "x\n#SBATCH --wrap='touch ran'\ntouch ran", "x'; touch ran; '", 'x"; touch ran; "',
            "$(touch ran)", "`touch ran`", "x\rtouch ran", "x\u2028touch ran", "; touch ran #")  # fmt: skip


def test_the_keys_that_take_a_text_are_found():
    assert {"cluster.partition", "cluster.slurm.account", "cluster.slurm.options", "cluster.slurm.environment"} <= set(
        KEYS
    )


def directives(text):
    """Return the lines that sbatch takes for its own: those before the first command."""
    lines = itertools.takewhile(lambda line: not line.strip() or line.startswith("#"), text.splitlines())
    return [line for line in lines if line.startswith("#SBATCH")]


@pytest.mark.parametrize("key", KEYS)
def test_no_value_of_a_recipe_is_run_as_a_command(folder, key):
    """A recipe that was handed over, with one text of it made to begin another line or to leave its quotes."""
    for smuggled in SMUGGLED:
        config = OmegaConf.to_container(COMPOSED, resolve=True)
        *sections, name = key.split(".")
        section = config
        for part in sections:
            section = section[part]
        as_it_is = {"environment": {"NCCL_DEBUG": smuggled}, "options": [smuggled], "mounts": [smuggled]}
        section[name] = as_it_is.get(name, smuggled)
        try:
            recipe = build(config)
            text = script_of(recipe, folder, [f"{key}={quoted(smuggled)}"])
        except UserError as error:
            assert "\n" not in str(error), (key, smuggled)
            continue
        said = run(text, folder)
        assert not list(folder.rglob("ran")), (key, smuggled, text, said)
        if key != "cluster.slurm.options":  # those are sbatch's options, as they stand
            assert not any(line.startswith("#SBATCH --wrap") for line in directives(text)), (key, smuggled, text)
        subprocess.run(["bash", "-n", "-c", text], check=True)
