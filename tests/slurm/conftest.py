"""Three nodes of a real SLURM on this machine, for the tests of this folder."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "local_slurm.sh"
INSTALL = "apt-get install --no-install-recommends slurm-wlm munge"


class Cluster:
    """Starts, breaks and repairs the nodes."""

    def __call__(self, *words):
        done = subprocess.run([str(SCRIPT), *words], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, f"local_slurm.sh {' '.join(words)}: {done.stdout}{done.stderr}"
        return done.stdout


@pytest.fixture(scope="session")
def cluster():
    """A cluster of three idle nodes; its commands answer in this process."""
    if shutil.which("slurmctld", path=os.environ["PATH"] + ":/usr/sbin:/sbin") is None:
        pytest.skip(f"SLURM is not installed here; `make test-slurm` installs it as root, else: {INSTALL}")
    os.environ["LOCAL_SLURM_REQUEUE_DELAY"] = "5"
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    control = Cluster()
    control("start", "3")
    os.environ["SLURM_CONF"] = control("env").strip().partition("=")[2]
    yield control
    control("stop")
