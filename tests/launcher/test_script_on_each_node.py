"""What the batch script does on every node before there are ranks. bash runs it; SLURM's commands are stand-ins."""

import os
import re
import shutil
import subprocess

import pytest

from launcher.command_line.compose import compose
from launcher.slurm.job import Point, job_of
from launcher.slurm.script import render
from parallel.errors import LayoutError

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


def only(folder, without):
    """Return a PATH that finds the stand-ins and what the script needs, but for one program."""
    (folder / "programs" / without).unlink(missing_ok=True)
    needed = ("bash", "cat", "env", "find", "getent", "grep", "head", "hostname", "mkdir", "rm", "sort", "tail", "tee")
    for name in needed:
        (folder / "programs" / name).symlink_to(shutil.which(name))
    return str(folder / "programs")


def script_job(folder, *words):
    """Return the job of a recipe over three nodes."""
    overrides = [
        "recipe=dsv3_tiny",
        "cluster=slurm",
        "cluster.nodes=3",
        "cluster.gpus_per_node=2",
        "optim.global_batch=24",
        "cluster.slurm.check_nodes=false",
        "cluster.slurm.exclude_after=0",
    ]
    recipe = compose([*overrides, "cluster.slurm.python=python", *words])
    return job_of(recipe, [Point((), folder / "run")], chained=False, working_directory=folder)


def run(folder, *words, without="", **texts):
    """Run the script of a recipe; return what it wrote to stderr, and what the stand-in for Python was called with."""
    standins = {
        "srun": SRUN.format(nodes=" ".join(NODES)),
        "scontrol": f"#!/bin/sh\nprintf '%s\\n' {' '.join(NODES)}\n",
    }
    path = programs(folder, **{**standins, "python": PYTHON, "numactl": "", **texts})
    job = script_job(folder, *words)
    (folder / "run" / "logs").mkdir(parents=True)
    environment = {"PATH": path, "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "all", "SLURM_JOB_NUM_NODES": "3"}
    environment["SLURM_CPUS_ON_NODE"] = "4"
    if without:
        path = only(folder, without)
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


def test_ranks_are_bound_to_their_numa_node_or_a_line_says_why_not(tmp_path):
    _, said = run(tmp_path)
    assert all("--numa-binding=node" in line for line in said)
    other = tmp_path / "without"
    other.mkdir()
    stderr, said = run(other, without="numactl")
    assert not said and "cluster: numactl is not installed on localhost, and cluster.slurm.numa_binding" in stderr


@pytest.mark.parametrize("words", [["cluster.slurm.numa_binding=null"], ["cluster.device=cpu"]])
def test_without_a_binding_nothing_is_asked_of_a_node(tmp_path, words):
    _, said = run(tmp_path, *words, without="numactl")
    assert len(said) == 3 and not any("numa" in line for line in said)


def test_nodes_are_checked_before_there_are_ranks_and_a_start_on_unfit_ones_ends(tmp_path):
    _, said = run(tmp_path, "cluster.slurm.check_nodes=true")
    checks = [" -m launcher.slurm.check_nodes " in line for line in said]
    assert checks == [True] * 3 + [False] * 3 and all(f"run.directory={tmp_path}/run" in line for line in said)
    ports = [re.findall(r"--master-port=(\d+)", line)[-1] for line in said]
    assert int(ports[0]) == int(ports[3]) + 1, "that of the check may not be free again at once"
    other = tmp_path / "unfit"
    other.mkdir()
    python = PYTHON + '[[ "$*" != *check_nodes* ]] || { echo "nodes: node2: no GPU" >&2; exit 1; }\n'
    stderr, said = run(other, "cluster.slurm.check_nodes=true", python=python)
    assert "nodes: node2: no GPU" in stderr and not any("pretrain.py" in line for line in said)


def test_hosts_that_failed_are_asked_for_and_kept(tmp_path):
    scontrol = f"#!/bin/sh\n[ $1 = show ] && printf '%s\\n' {' '.join(NODES)} || echo \"$*\" >>said\n"
    python = PYTHON + 'if [[ "$*" == *slurm.after* ]]; then echo node2; else exit 1; fi\n'
    words = ["cluster.slurm.exclude_after=2", "cluster.slurm.exclude='node[8-9]'"]
    _, said = run(tmp_path, *words, python=python, scontrol=scontrol)
    assert said[-3:] == [
        f" is ; -m launcher.slurm.after run={tmp_path}/run failures=2 slow=0",
        "requeue 7",
        "update JobId=7 ExcNodeList=node2,node[8-9]",
    ]
    assert (tmp_path / "run" / "excluded").read_text() == "node2\n"


def test_spares_are_asked_for_and_not_used(tmp_path):
    words = ["cluster.nodes=2", "cluster.slurm.spares=1", "optim.global_batch=16"]
    text = render(script_job(tmp_path, *words))
    assert "#SBATCH --nodes=2-3\n" in text and '--nodes=2 --nodelist="$nodes"' in text
    srun = '#!/bin/bash\nprintf "%s\\n" "$@" >>said\n'
    _, said = run(tmp_path, *words, srun=srun)
    assert "--nodelist=localhost,node2" in said and "--nnodes=2" in said


def test_what_the_user_sets_wins_over_what_the_script_and_the_shared_defaults_set(tmp_path):
    python = '#!/bin/bash\nenv | grep -E "^(TORCH|NCCL|PYTORCH|CUDA_D|PYTHONFAULT)" >>said\n'
    mine = ["cluster.slurm.environment.NCCL_DEBUG=INFO", "+cluster.slurm.environment.TORCH_FR_DUMP_TEMP_FILE=/x/r"]
    _, said = run(tmp_path, *mine, python=python)
    values = dict(line.split("=", 1) for line in said)
    assert (values["NCCL_DEBUG"], values["TORCH_FR_DUMP_TEMP_FILE"]) == ("INFO", "/x/r")
    assert values["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    assert values["TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE"] == "${rank}: " and values["PYTHONFAULTHANDLER"] == "1"


def test_one_queue_beside_a_pipeline_is_refused(tmp_path):
    words = ["parallel.pipeline=2", "optim.global_batch=12"]
    with pytest.raises(LayoutError, match="CUDA_DEVICE_MAX_CONNECTIONS = 1 beside parallel.pipeline = 2 can hang"):
        run(tmp_path, *words, "cluster.slurm.environment.CUDA_DEVICE_MAX_CONNECTIONS='1'")
