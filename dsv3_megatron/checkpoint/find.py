"""Which checkpoint: the one that a command means, the one that a run resumes from, and whether its files are whole.

A command asks alone, and reads the files that it needs before it trusts them. The ranks of a run ask together: each
checks that its share of the files is there, and what they load is compared with its checksums as it is read; a
checkpoint that turns out damaged is left for the next older one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata

from dsv3_megatron.checkpoint.changes import changes, read_recipe, refusal, show
from dsv3_megatron.checkpoint.manifest import (
    RECIPE,
    USE_OLDER,
    DamageError,
    FileFacts,
    checkpoints,
    folder_name,
    needed,
    newest_valid,
    problems,
    read_content,
    read_manifest,
    size_problems,
    step_of,
)
from dsv3_megatron.recipe import Recipe
from dsv3_megatron.run.directory import RunDirectory
from parallel.agree import agreed, from_first
from parallel.errors import CheckpointError, RankFault
from parallel.world import host_name

T = TypeVar("T")


@dataclass(frozen=True)
class Chosen:
    """A checkpoint whose files were checked, and what is wrong with newer ones."""

    path: Path
    wrong: tuple[str, ...] = ()

    @property
    def warnings(self) -> tuple[str, ...]:
        """A line for each newer one that is damaged: what is wrong with it, and which one is used instead."""
        reasons = (wrong.removeprefix("checkpoint: ").removesuffix(f"; {USE_OLDER}") for wrong in self.wrong)
        return tuple(f"warning: {reason}; {self.path} is used instead" for reason in reasons)


def choose_checkpoint(run: str | Path, step: int | None, holding: Collection[str]) -> Chosen:
    """Return the newest checkpoint of a run directory that is valid, or the one of ``step``.

    Args:
        holding: what will be read (``manifest.WEIGHTS``, names of extra states): no other files are.
    Raises: CheckpointError: there is none, or the one named is damaged; the one named is never replaced by another.
    """
    folder = RunDirectory(run).checkpoints
    if step is not None:
        path = folder / folder_name(step)
        if not path.is_dir():
            there = ", ".join(str(int(p.name.split("_")[1])) for p in checkpoints(folder)) or "none"
            raise CheckpointError(f"step = {step}: {path} does not exist; there are: {there}")
        read_manifest(path, holding)
        return Chosen(path)
    newest, wrong = newest_valid(folder, holding)
    if newest is None:
        none = f"{folder} holds no checkpoint; train first, or name another run directory"
        raise CheckpointError(wrong[0].removeprefix("checkpoint: ") if wrong else none)
    return Chosen(newest, tuple(wrong))


@dataclass(frozen=True)
class Found:
    """A checkpoint, as its manifest describes it.

    Attributes:
        optimizer: whether it holds the state of a run, or (imported) weights alone.
        updates: how often the optimizer has updated the weights; None where format 1 keeps it elsewhere.
        freeze: what was not trained (``model.freeze``): it holds no optimizer state and no average of that.
        checked: whether its files carry checksums of their pieces; else they were read whole before they are trusted.
        tokenizer: of the text it was trained on: its sha256 and name; None where there was none, or it does not say.
        data: the text its samples are counted in (data/identity.py); None likewise.
        index: what is in this rank's files, where each rank has a folder of its own and reads no other.
    """

    path: Path
    progress: dict[str, Any]
    extra: tuple[str, ...] = ()
    optimizer: bool = True
    updates: int | None = None
    checked: bool = True
    tokenizer: dict[str, str] | None = None
    data: dict[str, Any] | None = None
    freeze: tuple[str, ...] = ()
    index: Metadata | None = None

    @classmethod
    def of(cls, path: Path, content: dict[str, Any], index: Metadata | None = None) -> Found:
        """Return the checkpoint at ``path``, of whose manifest this is the content."""
        return cls(
            path,
            content["progress"],
            tuple(content["extra"]),
            content["optimizer"],
            content.get("updates"),
            checked=content["format"] >= 2,
            tokenizer=content.get("tokenizer"),
            data=content.get("data"),
            freeze=tuple(content.get("freeze", ())),
            index=index,
        )

    @property
    def recipe(self) -> Path:
        """The resolved recipe it was trained with."""
        return self.path / RECIPE


class Elsewhere(Protocol):
    """A state of the run that lies elsewhere than in its directory: in memory. Every method is called by all ranks
    together.

    Attributes:
        step: after which the state was.
    """

    step: int

    def fetch(self) -> Found:
        """Return this rank's part of it. Raises: DamageError: on all ranks; it is not whole."""

    def give_up(self, reason: str) -> None:
        """It was not what was written: something else is taken."""


def load_newest(
    list_candidates: Callable[[], list[Path]], load: Callable[[Found], T], elsewhere: Sequence[Elsewhere] = ()
) -> tuple[Found | None, T | None, list[str]]:
    """Load the first candidate that is as it was written; return it, what ``load`` has returned, and what was wrong
    with those before it.

    All ranks call this together; rank 0 lists the candidates, newest first. ``load`` raises DamageError, on all ranks,
    where what it reads is damaged. ``elsewhere``: candidates that are taken where no other is as new.
    Raises: RankFault: a host does not see files that another one sees.
    """
    wrong: list[str] = []
    number = 0
    candidates: list[Path | int] = []
    with agreed(looked=dist.get_rank() == 0):
        if dist.get_rank() == 0:
            candidates = _newest_first(list_candidates(), elsewhere)
    while True:
        proposal, failure = _propose(candidates, number)
        if proposal is None and failure is None:
            return None, None, wrong
        if proposal is not None:
            try:
                found = elsewhere[proposal].fetch() if isinstance(proposal, int) else proposal
                return found, load(found), wrong
            except DamageError as damage:
                failure = str(damage)
        assert failure is not None
        if isinstance(proposal, int):
            elsewhere[proposal].give_up(failure)
        else:
            wrong.append(failure)
        number += 1


def _newest_first(paths: list[Path], elsewhere: Sequence[Elsewhere]) -> list[Path | int]:
    """Return the paths and the numbers of what is elsewhere, newest first, a path before what is as new."""
    steps = {path: step_of(path) if path.name.startswith("step_") else -1 for path in paths}
    both: list[Path | int] = [*paths, *range(len(elsewhere))]
    return sorted(both, key=lambda each: -(elsewhere[each].step if isinstance(each, int) else steps[each]))


def _propose(candidates: Sequence[Path | int], number: int) -> tuple[Found | int | None, str | None]:
    """Return the candidate of that number, or what is wrong with it; neither where there is none. All ranks alike.
    Of what is elsewhere its number there is all that is returned."""
    files: FileFacts = {}  # on rank 0

    def look() -> tuple[Path, dict[str, Any], str | None] | int | None:
        """Return path, what its manifest says beside its files, and what is wrong."""
        if number == len(candidates):
            return None
        path, content = candidates[number], dict[str, Any]()
        if isinstance(path, int):
            return path
        try:
            content = read_content(path)
            files.update(content.pop("files"))
            for problem in problems(path, files, needed(files, ())):
                raise DamageError(problem)  # in what every reader needs, of which this rank reads most
        except DamageError as error:
            return path, content, str(error)
        return path, content, None

    proposal = from_first(look)
    if proposal is None or isinstance(proposal, int):
        return proposal, None
    path, content, failure = proposal
    if failure is not None:
        return None, failure
    damage = _damage(path, content["format"], files)
    return (None, damage) if damage else (Found.of(path, content), None)


def _damage(path: Path, format_number: int, files: FileFacts) -> str | None:
    """Return the first thing that is wrong with the files, the same on all ranks, each of which looks at its share.

    ``files``: on rank 0. Those without checksums of their pieces are read whole here; others when they are loaded.
    Raises: RankFault: what one host misses another one sees.
    """
    mine = _share_of(files)
    look = size_problems if format_number >= 2 else problems
    rank, size = dist.get_rank(), dist.get_world_size()
    damage = next(iter(look(path, mine, mine)), None)
    first = torch.tensor(size if damage is None else rank)
    dist.all_reduce(first, op=dist.ReduceOp.MIN)
    if first == size:
        return None
    said: list[Any] = [damage, host_name(), mine]
    dist.broadcast_object_list(said, src=int(first))
    _ask_another(path, int(first), *said)
    return str(DamageError(said[0]))


def _share_of(files: FileFacts) -> FileFacts:
    """Return the files that this rank looks at, of those that rank 0 knows: about as many bytes as every other."""
    by_size = sorted(files, key=lambda name: (-files[name]["bytes"], name))
    size = dist.get_world_size()
    shares = [{name: files[name] for name in by_size[rank::size]} for rank in range(size)]
    mine: list[FileFacts] = [{}]
    dist.scatter_object_list(mine, shares if dist.get_rank() == 0 else None, src=0)
    return mine[0]


def _ask_another(path: Path, first: int, damage: str, host: str, files: FileFacts) -> None:
    """Let another host's rank look at the files that rank ``first`` finds damaged. Raises: RankFault: it sees them."""
    ranks, hosts = dist.get_world_size(), int(os.environ.get("GROUP_WORLD_SIZE", "1"))
    if hosts == 1:
        return
    other = (first + ranks // hosts) % ranks
    sees: list[Any] = [None, None]
    if dist.get_rank() == other:
        sees = [next(iter(size_problems(path, files, files)), None), host_name()]
    dist.broadcast_object_list(sees, src=other)
    if sees[0] is None:
        raise RankFault(f"rank {first} on {host}: {damage}, but {sees[1]} sees it: look at the mount on {host}")


def candidates_of(folder: Path, named: str | None) -> list[Path]:
    """Return the checkpoints to try, newest first: those of a run, or, while it has none, the one named."""
    own = checkpoints(folder)
    return own or ([Path(named)] if named else [])


@dataclass(frozen=True)
class Start:
    """Where a run starts: from a checkpoint, or (None) from the first step."""

    found: Found | None
    changed: dict[str, tuple[Any, Any]] = field(default_factory=dict)  # key of the recipe -> (then, now)

    @property
    def change(self) -> str:
        """The changes as a person reads them."""
        return "; ".join(f"{key}: {show(old)} -> {show(new)}" for key, (old, new) in self.changed.items())


def load_chosen(
    recipe: Recipe,
    folder: Path,
    warn: Callable[[str], None],
    load: Callable[[Found], T],
    elsewhere: Sequence[Elsewhere] = (),
) -> tuple[Start, T | None]:
    """Load the newest checkpoint in ``folder`` or ``elsewhere`` that is valid, or the one the recipe names where there
    is none; return it and what ``load`` has returned. All ranks together.

    ``warn``: told of each damaged one, on rank 0.
    Raises: CheckpointError: all are damaged, or of another model, or ``run.resume`` says otherwise.
    """
    first = dist.get_rank() == 0
    changed: dict[str, tuple[Any, Any]] = {}

    def check_and_load(found: Found) -> T:
        changed.update(_checked_changes(found, recipe))
        return load(found)

    found, loaded, wrong = load_newest(lambda: candidates_of(folder, recipe.checkpoint.load), check_and_load, elsewhere)
    for message in wrong if first else ():
        warn(message)
    if found is None and wrong:
        damage = wrong[0].removeprefix("checkpoint: ").partition(";")[0]
        raise CheckpointError(
            f"{damage}, and no other checkpoint is valid; restore one, or remove the damaged ones ({len(wrong)}) to "
            "begin anew"
        )
    if found is None and recipe.run.resume == "required":
        raise CheckpointError(f"run.resume = required, but {folder} holds no valid checkpoint; set run.resume=auto")
    return Start(found, changed), loaded


def _checked_changes(found: Found, recipe: Recipe) -> dict[str, tuple[Any, Any]]:
    """Return what the recipe has changed since a checkpoint. Raises: CheckpointError: it may not, or not resume."""
    changed = from_first(lambda: changes(read_recipe(found.recipe), recipe.model_dump(mode="json")))
    if refused := refusal(changed):
        raise CheckpointError(f"{found.path} was trained with {refused}; use that value, or name another run.name")
    if recipe.run.resume == "never":
        raise CheckpointError(
            f"run.resume = never, but {found.path} exists; name another run.name, or set run.resume=auto to go on "
            "from it"
        )
    return changed
