"""What the batch script does on every node before there are ranks. bash runs it; SLURM's commands are stand-ins."""

import os
import subprocess

import pytest

from launcher.command_line.compose import compose
from launcher.slurm.job import Point, job_of
from launcher.slurm.script import render

NODES = ("localhost", "node2", "node10")  # in the order of SLURM, which counts: by letters node10 is before node2
SRUN = """#!/bin/bash
until [ "$1" = bash ]; do shift; done
n=0
for name in {nodes}; do SLURM_NODEID=$n SLURMD_NODENAME=$name "$@" || exit; n=$((n + 1)); done
"""
PYTHON = '#!/bin/bash\necho "$SLURMD_NODENAME is $PET_NODE_RANK; $*" >>said\n'


def programs(folder, **texts):
    """Make executables; return the PATH that finds them first."""
    (folder / "programs").mkdir(exist_ok=True)
    for name, text in texts.items():
        (folder / "programs" / name).write_text(text)
        (folder / "programs" / name).chmod(0o755)
    return f"{folder / 'programs'}:{os.environ['PATH']}"


def run(folder, *words, **texts):
    """Run the script of a recipe; return what it wrote to stderr, and what the stand-in for Python was called with."""
    standins = {
        "srun": SRUN.format(nodes=" ".join(NODES)),
        "scontrol": f"#!/bin/sh\nprintf '%s\\n' {' '.join(NODES)}\n",
    }
    path = programs(folder, **{**standins, "python": PYTHON, **texts})
    overrides = [
        "recipe=dsv3_tiny",
        "cluster=slurm",
        "cluster.nodes=3",
        "cluster.gpus_per_node=2",
        "optim.global_batch=24",
    ]
    recipe = compose([*overrides, "cluster.slurm.python=python", *words])
    job = job_of(recipe, [Point((), folder / "run")], chained=False, working_directory=folder)
    (folder / "run" / "logs").mkdir(parents=True)
    environment = {"PATH": path, "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "all", "SLURM_JOB_NUM_NODES": "3"}
    environment["SLURM_CPUS_ON_NODE"] = "4"
    done = subprocess.run(
        ["bash", "-c", render(job)], cwd=folder, capture_output=True, text=True, timeout=20, env=environment
    )
    said = folder / "said"
    return done.stderr, said.read_text().splitlines() if said.exists() else []


def test_ranks_follow_the_order_of_slurm_and_rank_0_is_where_they_meet(tmp_path):
    _, said = run(tmp_path)
    assert [line.split(";")[0] for line in said] == ["localhost is 0", "node2 is 1", "node10 is 2"]
    assert all("--master-addr=localhost " in line and "--rdzv-backend" not in line for line in said)


def test_a_name_that_does_not_resolve_is_one_line_with_the_node_and_what_to_set(tmp_path):
    scontrol = "#!/bin/sh\nif [ $1 = show ]; then echo nowhere.invalid; fi\n"
    stderr, said = run(tmp_path, scontrol=scontrol)
    [line] = [line for line in stderr.splitlines() if line.startswith("cluster: ")]
    assert line.startswith("cluster: localhost finds no address for nowhere.invalid, the first node of the job; set")
    assert "cluster.slurm.interface" in line
    assert not said  # torchrun would wait for it


def test_an_address_of_an_interface_is_not_looked_up(tmp_path):
    ip = "#!/bin/sh\necho '1: ib0    inet 192.0.2.7/24 scope global ib0'\n"  # of a block that no name server knows
    _, said = run(tmp_path, "cluster.slurm.interface=ib0", ip=ip)
    assert len(said) == 3 and all("--master-addr=192.0.2.7 " in line for line in said)


@pytest.mark.parametrize("container", ["pyxis", "apptainer"])
def test_a_container_gets_its_mounts_as_words_of_their_own(tmp_path, container):
    srun = '#!/bin/bash\nprintf "%s\\n" "$@" >>said\n'
    words = [f"cluster.slurm.container={container}", "cluster.slurm.image=/x y.sif", "cluster.slurm.mounts=[/da ta]"]
    _, said = run(tmp_path, *words, srun=srun)
    if container == "pyxis":
        [mounts] = [word.partition("=")[2] for word in said if word.startswith("--container-mounts=")]
        mounts = mounts.split(",")
        assert "--container-image=/x y.sif" in said
    else:
        mounts = [word.partition("=")[2] for word in said if word.startswith("--bind=")]
        assert said[said.index("apptainer") - 1] == "torchrun" and said[said.index("/x y.sif") + 1] == "python"
    assert {"/da ta:/da ta", f"{tmp_path}:{tmp_path}"} <= set(mounts)
