"""Where a node keeps what its memory holds of a run: a folder for each state, in it one for each rank's share.

    /dev/shm/dsv3-UID/RUN/HOST/step_00000120-LIFE/rank_00003/

The folders are their owner's alone. Whose share a node holds does not depend on who runs there now: after a start on
other nodes, or in another order, a share is found wherever it lies.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from dsv3_megatron.run.files import write_json
from parallel.errors import RecipeError

OWNER = "owner.json"  # of a run's folder: which run directory it is of
_STATE = re.compile(r"step_(\d{8,15})-([0-9a-f]{8})")
_SHARE = re.compile(r"rank_(\d{5,9})")


class State(NamedTuple):
    """A state of the run in memory: after which step, in which of the run's lives."""

    step: int
    life: str

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"step_{self.step:08d}-{self.life}"


def top_folder(root: Path) -> Path:
    """Return the folder of this user's runs."""
    return root / f"dsv3-{os.getuid()}"


class MemoryFolder:
    """The memory of one run on one host."""

    def __init__(self, root: Path, run: str, host: str):
        """``root``: as the recipe has it (``checkpoint.memory_path``). ``run``: the id of the run."""
        self.root, self.run = root, run
        self.path = top_folder(root) / run / host

    def create(self, directory: Path) -> None:
        """Make the folder. Called by one rank of a host. ``directory``: of the run.

        Raises RecipeError: it cannot be made, or somebody else has made it: what is read from there is trusted to be
        this user's.
        """
        try:
            if not self.root.is_dir():
                raise RecipeError(f"checkpoint.memory_path = {self.root} is no folder; name one that every node has")
            for folder in (top_folder(self.root), self.path.parent, self.path):
                _make_private(folder)
            write_json(self.path / OWNER, {"directory": str(directory.resolve())})
        except OSError as error:
            raise RecipeError(
                f"checkpoint.memory_path = {self.root} cannot be written ({error.strerror}); name another folder"
            ) from None

    def share(self, state: State, rank: int) -> Path:
        """Return the folder of a rank's share of a state."""
        return self.path / state.name / f"rank_{rank:05d}"

    def shares(self) -> Iterator[tuple[State, int, Path]]:
        """Yield the shares that are held here: state, rank and folder."""
        for folder in sorted(self.path.glob("step_*")):
            if (found := _STATE.fullmatch(folder.name)) is None:
                continue
            for share in sorted(folder.glob("rank_*")):
                if rank := _SHARE.fullmatch(share.name):
                    yield State(int(found[1]), found[2]), int(rank[1]), share

    def all_but(self, kept: State | None) -> list[Path]:
        """Return the folders of all states but one."""
        return [folder for folder in self.path.glob("step_*") if kept is None or folder.name != kept.name]

    def remove(self) -> None:
        """Remove what this host holds of the run. Called by one rank of a host."""
        shutil.rmtree(self.path, ignore_errors=True)
        for folder in (self.path.parent, top_folder(self.root)):
            try:
                folder.rmdir()
            except OSError:  # another node that is played on this machine, another run
                return


def remove_folders(folders: Iterable[Path]) -> None:
    """Remove the folders of states, as far as the system lets."""
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _make_private(folder: Path) -> None:
    """Make a folder for its owner alone, where there is none. Raises RecipeError: what is there is not like that."""
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = os.lstat(folder)
    if not stat.S_ISDIR(found.st_mode):
        raise RecipeError(f"{folder} is no folder; remove it, or name another checkpoint.memory_path")
    if found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise RecipeError(
            f"{folder} is not a folder of yours alone (owner {found.st_uid}, mode {found.st_mode & 0o777:o}); have it "
            "removed, or name another checkpoint.memory_path"
        )
