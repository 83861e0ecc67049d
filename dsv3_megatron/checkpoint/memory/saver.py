"""Saving into memory: every rank its share, beside training, and a copy of it to a rank on another node.

One state at a time. It counts once every rank has its share whole and its keeper the copy; only then is the state
before it removed, so that at any moment one whole state lies in two places. When all ranks are done is agreed through
flags that the caller reduces over all ranks once a step (:meth:`MemorySaver.flags`), as for checkpoints on disk.

What cannot be kept - no memory is left, a copy has not come as it was sent - fails the save and never the run: what was
kept of the new state is removed on all ranks, the state before it stays, and the next one is tried when it is due.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from dsv3_megatron.checkpoint.memory.folder import MemoryFolder, State, remove_folders
from dsv3_megatron.checkpoint.memory.host import free_bytes
from dsv3_megatron.checkpoint.memory.lives import Lives, new_life
from dsv3_megatron.checkpoint.memory.places import Places, memory_group
from dsv3_megatron.checkpoint.memory.restore import InMemory, states_in_memory
from dsv3_megatron.checkpoint.memory.share import cut_of, read_here, write
from dsv3_megatron.checkpoint.memory.transfer import exchange
from dsv3_megatron.checkpoint.optimizer_states import updates_of
from dsv3_megatron.checkpoint.save import Task, Tell
from dsv3_megatron.checkpoint.shares import shares_of
from dsv3_megatron.checkpoint.state import states_to_save
from dsv3_megatron.checkpoint.write import ShareFile, Staging
from dsv3_megatron.pipeline.parts import Parts
from dsv3_megatron.pipeline.saved import Entry
from dsv3_megatron.run.reasons import first_line, reason_of
from parallel.agree import agreed, from_first, gathered
from parallel.units import show_bytes

_MANIFEST_BYTES = 1 << 20  # and recipe of a share, about


class MemoryFlags(NamedTuple):
    """What a rank says of its save into memory; over all ranks, the largest counts."""

    busy: int = 0


@dataclass
class _Kept:
    """What a rank has done of a save."""

    bytes: int = 0
    sent_bytes: int = 0
    seconds: float = 0.0
    stall_seconds: float = 0.0
    failure: str | None = None
    is_cut_off: bool = False  # a connection was lost


@dataclass
class _Save:
    """The save under way."""

    state: State
    task: Task
    started: float
    stall_seconds: float = 0.0


class MemorySaver:
    """Keeps a run's state in memory. Every method but ``due`` and ``flags`` is called by all ranks together."""

    def __init__(
        self,
        folder: MemoryFolder,
        places: Places,
        lives: Lives,
        lives_path: Path,
        parts: Parts,
        recipe: str,
        tell: Tell,
        text: dict[str, Any],
    ):
        """Keep states in ``folder``.

        Args:
            lives: of the run so far, on rank 0.
            lives_path: the file that says them.
            recipe: the resolved recipe, kept with every share.
            tell: gets an event's name and values, on rank 0: ``saved_in_memory``, ``memory_save_failed``.
            text: tokenizer and data, as manifests describe them.
        """
        self.folder, self.places, self.every_steps = folder, places, parts.recipe.checkpoint.memory_every_steps
        self.complete: State | None = None  # the last that is whole in all places
        self._parts, self._recipe, self._tell, self._text = parts, recipe, tell, text
        self._shares = shares_of(parts.chunks, parts.optimizer, parts.groups)
        self._staging = Staging()
        self._save: _Save | None = None
        self._removal: Task | None = None
        self._lives, self._lives_path, self._life = lives, lives_path, ""
        self._failed = False  # the last save has; told once

    def states(self, tell: Callable[[str], None]) -> tuple[list[InMemory], list[str]]:
        """Return the states that can be taken from memory, newest first, and what a person should know of others
        (:func:`restore.states_in_memory`)."""
        return states_in_memory(self.folder, self.places, self._lives, self._states_here(), tell)

    def begin(self, begun_with: State | None) -> None:
        """Begin a life of the run, with a state in memory or (None) with something else: from here on no other state
        that is in memory counts, and none is kept.

        Raises OSError, on rank 0, elsewhere RankFault: the run directory cannot be written.
        """
        self._life, self.complete = from_first(new_life), begun_with
        is_first = dist.get_rank() == 0
        if self.places.is_leader:
            remove_folders([*self.folder.all_but(begun_with), *self._surplus(begun_with)])
        with agreed(looked=is_first):  # and no rank keeps anything before that is done
            if is_first:
                self._lives = Lives(self.folder.run, self._life, begun_with)
                self._lives.write(self._lives_path)

    def due(self, step: int) -> bool:
        """Return whether the step just done is to be kept. While a save is under way none is: the next one is."""
        return self._save is None and step % self.every_steps == 0

    def save(self, progress: dict[str, Any]) -> None:
        """Keep the state as it is now: begin, with a copy that nothing changes any more."""
        start = time.perf_counter()
        state = State(progress["step"], self._life)
        states = self._states_here()
        files = self._staging.files_of(states, dist.get_rank(), copy=True)
        cut, updates = cut_of(states), updates_of(self._parts.optimizer)
        task = Task(lambda: self._keep(state, files, dict(progress), cut, updates))
        self._save = _Save(state, task, start, time.perf_counter() - start)

    def finish(self) -> None:
        """Wait until the save under way, if any, is over."""
        while self._save is not None:
            self._save.task.join()
            flags = torch.tensor(self.flags(), device=self._parts.device)
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
            self.advance(MemoryFlags(*flags.tolist()))

    def flags(self) -> MemoryFlags:
        """Return what this rank has to say of its save."""
        return MemoryFlags(int(self._save is not None and self._save.task.is_alive()))

    def advance(self, agreed_flags: MemoryFlags) -> None:
        """End the save under way if all ranks are done. ``agreed_flags``: the largest of all ranks' flags."""
        save = self._save
        if save is None or agreed_flags.busy:
            return
        self._save = None
        mine: _Kept = save.task.result or _Kept(failure=save.task.failure)
        mine.stall_seconds, mine.seconds = save.stall_seconds, time.perf_counter() - save.started
        sums = torch.tensor([int(mine.failure is not None), int(mine.is_cut_off), mine.bytes, mine.sent_bytes])
        dist.all_reduce(sums)
        failures, cut_off, total, sent = sums.tolist()
        if cut_off:
            self._connect_again()
        if failures:
            self._fail(save, mine.failure)
            return
        self.complete, self._failed = save.state, False
        self._remove_all_but_complete()
        if dist.get_rank() == 0:
            values = {"step": save.state.step, "stall_seconds": mine.stall_seconds, "seconds": mine.seconds}
            self._tell("saved_in_memory", {**values, "bytes": total, "bytes_sent": sent})

    def forget(self) -> None:
        """Forget what is kept: the run has gone back to something older. A save under way is waited for first."""
        self.finish()
        self._wait_for_removal()
        self.begin(None)

    def free(self) -> None:
        """Give back all memory: the run needs it no longer."""
        self.finish()
        self._wait_for_removal()
        if self.places.is_leader:
            self.folder.remove()

    def _surplus(self, state: State | None) -> list[Path]:
        """Return what this host holds of a state beyond its ranks' shares and as many copies: more than there is room
        for beside the next state, where ranks have come to other nodes than before."""
        here = self.places.ranks_here
        copies = [path for held, rank, path in self.folder.shares() if held == state and rank not in here]
        return copies[len(here) :]

    def _states_here(self) -> dict[str, list[Entry]]:
        return read_here(states_to_save(self._parts, self._shares))

    # -- one save ------------------------------------------------------------------------------------------------------

    def _keep(self, state: State, files: list[ShareFile], progress: dict[str, Any], cut: str, updates: int) -> _Kept:
        """Write this rank's share, send it, and take the one whose copy this rank keeps. In a thread."""
        kept, share, places = _Kept(), None, self.places
        self._wait_for_removal()
        try:
            self._check_room(files)
            facts = {
                "layout": asdict(self._parts.layout),
                "extra": sorted(self._parts.extra_states),
                "optimizer": True,
                "freeze": list(self._parts.recipe.model.freeze),
                "updates": updates,
                **self._text,
            }
            memory = {
                "run": self.folder.run,
                "life": state.life,
                "rank": dist.get_rank(),
                "world": dist.get_world_size(),
            }
            target = self.folder.share(state, dist.get_rank())
            share = write(target, files, self._recipe, progress, facts, {**memory, "cut": cut})
            kept.bytes = sum(facts["bytes"] for facts in share.files.values())
        except Exception as error:  # whatever it is, two other ranks wait to hear that nothing comes
            kept.failure = reason_of(error)
        if places.kept is None:
            return kept
        target = self.folder.share(state, places.kept)
        try:
            done = exchange(places.group, share, places.keeper, target, places.kept)
        except RuntimeError as error:  # gloo's for all that happens to a connection
            kept.failure, kept.is_cut_off = kept.failure or first_line(error), True
            return kept
        kept.sent_bytes = done.sent_bytes
        if done.received is not None and (done.received.state, done.received.rank) != (state, places.kept):
            done.not_received = f"rank {places.kept} has sent another share"
        kept.failure = kept.failure or done.failure
        return kept

    def _connect_again(self) -> None:
        """Make new connections: where one was lost, or waited for in vain, it stays so."""
        lost = self.places.group
        self.places = replace(self.places, group=memory_group())
        dist.destroy_process_group(lost)

    def _check_room(self, files: list[ShareFile]) -> None:
        """Raise OSError where this host has no room for what its ranks write now: a share each, and a copy each."""
        copies = 1 if self.places.kept is None else 2
        share = sum(tensor.nbytes for file in files for tensor in file.tensors) + _MANIFEST_BYTES
        needed, free = copies * len(self.places.ranks_here) * share, free_bytes(self.folder.path)
        if needed > free:
            raise OSError(None, f"{show_bytes(needed)} are needed on {self.places.host}, {show_bytes(free)} are free")

    def _remove_all_but_complete(self) -> None:
        """Remove, beside training, what is there now; no rank begins another save before the step that follows."""
        if self.places.is_leader:
            folders = self.folder.all_but(self.complete)
            self._removal = Task(lambda: remove_folders(folders))

    def _wait_for_removal(self) -> None:
        if self._removal is not None:
            self._removal.join()
            self._removal = None

    def _fail(self, save: _Save, failure: str | None) -> None:
        """Remove what there is of a state that is not whole everywhere; tell why, unless the one before failed too."""
        self._remove_all_but_complete()
        was_failing, self._failed = self._failed, True
        if was_failing:
            return
        said = None if failure is None else f"rank {dist.get_rank()} on {self.places.host}: {failure}"
        told = [reason for reason in gathered(said) if reason]
        if dist.get_rank() == 0:
            kept = None if self.complete is None else self.complete.step
            self._tell(
                "memory_save_failed", {"step": save.state.step, "reason": told[0], "ranks": len(told), "kept": kept}
            )


def describe_memory_save(name: str, values: dict[str, Any]) -> str:
    """Return an event of a save into memory as a sentence for a person."""
    if name == "saved_in_memory":
        copies = f", {show_bytes(values['bytes_sent'])} of it sent to other nodes" if values["bytes_sent"] else ""
        return (
            f"kept step {values['step']} in memory ({show_bytes(values['bytes'])}{copies}) in {values['seconds']:.1f}s"
            f", training stood {values['stall_seconds']:.2f}s"
        )
    kept = "none is kept" if values["kept"] is None else f"step {values['kept']} is kept"
    return (
        f"warning: step {values['step']} could not be kept in memory ({values['reason']}); {kept}, training goes on, "
        "checkpoints on disk are saved as before"
    )
