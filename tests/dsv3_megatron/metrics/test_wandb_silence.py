"""W&B offline is silent: a training machine's library calls nobody, and needs no network."""

import os
import shutil
import socket
import subprocess
import sys
import threading

import pytest

from launcher.command_line.recipe_files import ROOT

WRITE = """
import sys
from dsv3_megatron.metrics.wandb_writer import WandbRun
from dsv3_megatron.run.resilient import ResilientFiles
from launcher.command_line.compose import compose

recipe = compose(["recipe=dsv3_tiny", "run.directory=" + sys.argv[1]])
run = WandbRun(recipe, 0, 0, ResilientFiles(lambda *told: print(*told)), print)
run.event("evaluation", {"step": 1, "tokens": 10, "held_out_loss": 2.0})
run.close()
"""


class Proxy:
    """A server that all of a process's calls to other hosts go through; keeps what it was asked for, and refuses it."""

    def __init__(self):
        self.asked = []
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._server.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        while True:
            connection, _ = self._server.accept()
            with connection:
                self.asked.append(connection.recv(1000).partition(b"\r\n")[0].decode())

    def variables(self):
        names = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
        return {name: self.address for upper in names for name in (upper, upper.lower())}


def write(directory, *before, **variables):
    """Write a W&B run in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if not name.upper().endswith("_PROXY")}
    environment |= {"PYTHONPATH": str(ROOT), **variables}
    command = [*before, sys.executable, "-c", WRITE, str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    assert list((directory / "wandb").glob("offline-run-*/*.wandb"))


def test_offline_asks_no_host_for_anything(tmp_path):
    proxy = Proxy()
    directory = tmp_path / "run"
    directory.mkdir()
    write(directory, **proxy.variables())
    assert proxy.asked == []


@pytest.mark.full
def test_the_proxy_sees_what_the_library_does_by_default(tmp_path):
    """Once this fails, the library has become silent by itself, and the writer's setting can go."""
    proxy = Proxy()
    directory = tmp_path / "run"
    directory.mkdir()
    write(directory, **proxy.variables(), WANDB_ERROR_REPORTING="true")
    assert proxy.asked


@pytest.mark.full
def test_offline_needs_no_network(tmp_path):
    alone = ("unshare", "--user", "--map-root-user", "--net")
    if shutil.which("unshare") is None or subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("no network namespaces here")
    directory = tmp_path / "run"
    directory.mkdir()
    write(directory, *alone)
