"""dsv3 train: in this process, or on ranks that torchrun starts once the recipe is known to be right."""

from __future__ import annotations

import os
import runpy
import sys
import uuid
from collections.abc import Sequence

from dsv3_megatron.data.tasks.read import check_tasks
from dsv3_megatron.preflight.world import check_world
from launcher.command_line.arguments import HELP
from launcher.command_line.compose import compose
from launcher.command_line.hydra_flags import FLAGS
from launcher.command_line.recipe_files import PACKAGE
from parallel.errors import RecipeError
from parallel.world import NOT_SHARED, World

PRETRAIN = PACKAGE / "pretrain.py"
MEETING = {"standalone", "rdzv-backend", "rdzv-endpoint", "rdzv-id", "rdzv-conf", "master-addr", "master-port",
           "node-rank", "local-addr"}  # torchrun's options of how ranks meet  # fmt: skip


def train(words: Sequence[str]) -> int:
    """Train; return the exit code, or with options of torchrun become torchrun.

    Raises: UserError: what is wrong with the recipe, before any rank is started.
    """
    options, rest = split_torchrun(words)
    if not options or HELP & set(rest):
        sys.argv = [str(PRETRAIN), *rest]
        # As the script that it is: it listens to signals from its first line on, and ends as a rank does.
        runpy.run_module("launcher.pretrain", run_name="__main__", alter_sys=True)
        return 0
    if flags := [word for word in rest if word.startswith("-")]:
        raise RecipeError(f"{flags[0]} has no effect beside {options[0]}; leave one of the two out")
    recipe = compose(rest)
    if size := world_size(options):
        check_world(recipe, World(rank=0, size=size, local_rank=0))
    recipe.data.check_source()
    check_tasks(recipe.evaluate)
    sys.stdout.flush()
    if meeting := at_home(options):
        os.environ[NOT_SHARED] = "1"  # else the agent opens a store for the ranks, on all addresses
    command = [sys.executable, "-m", "torch.distributed.run", *meeting, *options, str(PRETRAIN), *rest]
    os.execv(sys.executable, command)


def at_home(options: Sequence[str]) -> list[str]:
    """Return options by which torchrun listens to nothing, where all ranks are to be on this host and the user says
    nothing of how they meet: its agent keeps what it knows in a file that has no name, and the ranks meet at a loopback
    address. By default it listens on all addresses of the host, and whoever reaches its port can run programs as the
    user (torch 2.13; docs/security.md)."""
    names = {_name(option) for option in options if option.startswith("-")}
    if names & MEETING or _values(options, nnodes="1")["nnodes"] not in ("1", "1:1"):
        return []
    meeting = [f"--rdzv-endpoint={_nameless_file()}", f"--rdzv-id={uuid.uuid4()}"]
    return ["--rdzv-backend=c10d", "--rdzv-conf=store_type=file", *meeting, "--local-addr=127.0.0.1"]


def _nameless_file() -> str:
    """Return the path of a new, empty file that this process alone can open, and what it becomes by exec; it is gone
    with the process, however that ends."""
    number = os.memfd_create("rendezvous", 0)
    os.set_inheritable(number, True)
    return f"/proc/self/fd/{number}"


def split_torchrun(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return (torchrun's options with their values, all others: overrides and Hydra's flags).

    A value may be a word of its own, if it holds no ``=``: ``--nnodes 2``, but ``--rdzv-conf=timeout=60``.
    """
    options: list[str] = []
    rest: list[str] = []
    takes_value = False
    for word in words:
        if word.startswith("-") and word.partition("=")[0] not in FLAGS:
            options.append(word)
            takes_value = "=" not in word
        elif takes_value and not word.startswith("-") and "=" not in word:
            options.append(word)
            takes_value = False
        else:
            rest.append(word)
            takes_value = False
    return options, rest


def world_size(options: Sequence[str]) -> int | None:
    """Return how many ranks torchrun's options ask for; None where they leave it to the machine (auto, 1:4)."""
    values = _values(options, **{"nproc-per-node": "1", "nnodes": "1"})
    sizes = list(values.values())
    return int(sizes[0]) * int(sizes[1]) if all(size.isdecimal() for size in sizes) else None


def _values(options: Sequence[str], **defaults: str) -> dict[str, str]:
    """Return the values of torchrun's options of these names."""
    words = iter(options)
    for word in words:
        _, equals, value = word.partition("=")
        if (name := _name(word)) in defaults:
            defaults[name] = value if equals else next(words, "")
    return defaults


def _name(option: str) -> str:
    return option.partition("=")[0].lstrip("-").replace("_", "-")
