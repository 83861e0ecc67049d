"""Saving a run: one checkpoint at a time, written beside its place by every rank, then renamed by rank 0.

A save has two phases, each a thread where training may go on beside it. *Writing*: every rank writes its tensors and
takes their checksums. *Committing*, once all ranks are done: rank 0 writes what describes the whole and the manifest,
renames the folder, and only then removes older checkpoints. When ranks may go to the next phase is agreed through flags
that the caller reduces over all ranks, once a step (:meth:`Saver.flags`, :meth:`Saver.advance`).

What the disk refuses fails the save, never the run: the last complete checkpoint stays, and the save is tried again
after 1, 2, 4, ... steps.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from dsv3_megatron.checkpoint.index import Index, Places
from dsv3_megatron.checkpoint.manifest import (
    MANIFEST,
    RECIPE,
    FileFacts,
    checkpoints,
    folder_name,
    manifest_text,
    step_of,
    sync_folder,
)
from dsv3_megatron.checkpoint.optimizer_states import updates_of
from dsv3_megatron.checkpoint.piece_files import write_file
from dsv3_megatron.checkpoint.settings import CheckpointSettings
from dsv3_megatron.checkpoint.shares import shares_of
from dsv3_megatron.checkpoint.state import states_to_save
from dsv3_megatron.checkpoint.write import Staging, Written, write_description, write_share
from dsv3_megatron.pipeline.parts import Parts
from dsv3_megatron.run.files import write_atomically
from parallel.agree import gathered
from parallel.errors import CheckpointError
from parallel.units import show_bytes

LATEST = "latest"  # names the newest checkpoint, for people and scripts; resuming does not read it
FINAL_ATTEMPTS = 3
Tell = Callable[[str, dict[str, Any]], None]


class Flags(NamedTuple):
    """What a rank says of its save; over all ranks, the largest counts."""

    writing: int = 0
    committing: int = 0
    failed: int = 0
    late: int = 0  # rank 0's clock says that a save is due (checkpoint.every_minutes)


class Task(threading.Thread):
    """Work beside training, on files or messages, and what came of it."""

    def __init__(self, work: Callable[[], Any]):
        super().__init__(name="checkpoint", daemon=True)  # dies with the process: half a checkpoint is none
        self._work = work
        self.result: Any = None
        self.failure: str | None = None
        self.start()

    def run(self) -> None:
        try:
            self.result = self._work()
        except BaseException as error:
            lines = str(error).strip().splitlines() or [""]
            self.failure = f"{type(error).__name__}: {lines[0]}"


@dataclass
class _Save:
    """The save under way."""

    step: int
    partial: Path
    progress: dict[str, Any]
    updates: int
    task: Task | None
    stop: threading.Event
    phase: str = "writing"
    started: float = 0.0
    stall_seconds: float = 0.0

    @property
    def result(self) -> Any:
        """What the work of this phase came to; None where this rank has none."""
        return self.task.result if self.task else None

    @property
    def failure(self) -> str | None:
        """Why it failed; None where it did not, or this rank has none."""
        return self.task.failure if self.task else None


class Saver:
    """Saves a run's checkpoints. Every method but the properties is called by all ranks together."""

    def __init__(
        self,
        folder: Path,
        settings: CheckpointSettings,
        parts: Parts,
        recipe: str,
        tell: Tell,
        *,
        tokenizer: dict[str, str] | None = None,
        data: dict[str, Any] | None = None,
    ):
        """Save into ``folder``.

        Args:
            recipe: the resolved recipe, stored with every checkpoint.
            tell: gets an event's name and values, on rank 0: ``saved``, ``save_failed``, ``save_given_up``.
            tokenizer: of the text, as the manifest describes it; None where there is none.
            data: the text, likewise.
        """
        self.folder, self.settings = folder, settings
        self.saved_step: int | None = None
        self.is_late = False  # a save is due by time, as agreed between the steps
        self._begun = time.monotonic()  # the last save, or the run
        self._parts, self._recipe, self._tell = parts, recipe, tell
        self._text = {"tokenizer": tokenizer, "data": data}
        self._save: _Save | None = None
        self._is_first = dist.get_rank() == 0
        token = [uuid.uuid4().hex[:8]]
        dist.broadcast_object_list(token, src=0)  # names the folders being written: no other life of the run's
        self._token, self._attempts = token[0], 0
        self._failures, self._retry_at = 0, None
        # What costs the same at every save is made at the first: which numbers are this rank's, host memory for them,
        # and on rank 0 where everything lies.
        self._shares = shares_of(parts.chunks, parts.optimizer, parts.groups)
        self._staging, self._index, self._places = Staging(), Index(), Places()
        self._is_described = False
        self._last_seconds: float | None = None  # that a save took, from its beginning to its end

    @property
    def busy(self) -> bool:
        """Whether a save is under way."""
        return self._save is not None

    def due(self, step: int) -> bool:
        """Return whether a checkpoint of the step just done is wanted: by the recipe, or after a failed save."""
        every = self.settings.every_steps
        return bool(every and step % every == 0) or (self._retry_at is not None and step >= self._retry_at)

    def save(self, progress: dict[str, Any]) -> None:
        """Save the state as it is now: begin where the recipe says ``asynchronous``, else to the end."""
        if self.busy:
            self.finish(progress["step"])  # at most one in flight
        self._begin(progress, copy=self.settings.asynchronous)
        if not self.settings.asynchronous:
            self.finish(progress["step"])

    def save_finally(self, progress: dict[str, Any], *, within_seconds: float | None = None) -> None:
        """Save the state at the end of a run, unless it is saved.

        ``within_seconds``: what is left where the run was asked to stop. A save of an earlier step that is still being
        written is then given up, unless two saves fit easily. Raises CheckpointError: not after several tries.
        """
        if within_seconds is not None:
            self._make_room(progress["step"], within_seconds)
        self.finish(progress["step"])
        for attempt in range(FINAL_ATTEMPTS):
            if self.saved_step == progress["step"]:
                return
            if attempt:
                time.sleep(2**attempt)
            self._begin(progress, copy=False)
            self.finish(progress["step"])
        if self.saved_step != progress["step"]:
            kept = f"the last one is {folder_name(self.saved_step)}" if self.saved_step is not None else "there is none"
            raise CheckpointError(
                f"{self.folder / folder_name(progress['step'])} could not be written in {FINAL_ATTEMPTS} tries; "
                f"{kept}; free space under {self.folder} and start the run again"
            )

    def finish(self, step: int) -> None:
        """Wait until the save under way, if any, has succeeded or failed."""
        while self._save is not None:
            start = time.perf_counter()
            if self._save.task is not None:
                self._save.task.join()
            flags = torch.tensor(self.flags(), device=self._parts.device)
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
            self._save.stall_seconds += time.perf_counter() - start
            self.advance(Flags(*flags.tolist()), step)

    def _make_room(self, step: int, seconds: float) -> None:
        """Give up the save under way where it and the last one may take longer than is left."""
        save = self._save
        if save is None or save.phase != "writing" or save.step == step:
            return
        fits = self._last_seconds is not None and 4 * self._last_seconds < seconds
        said = [not fits]  # by rank 0: each has measured a time of its own
        dist.broadcast_object_list(said, src=0)
        if said[0]:
            save.stop.set()

    def flags(self) -> Flags:
        """Return what this rank has to say of its save."""
        if self._save is None:
            interval = self.settings.interval_seconds
            return Flags(late=int(self._is_first and 0 < interval <= time.monotonic() - self._begun))
        if self._save.task is None:
            return Flags()
        alive, phase = self._save.task.is_alive(), self._save.phase
        return Flags(
            writing=int(alive and phase == "writing"),
            committing=int(alive and phase == "committing"),
            failed=int(not alive and self._save.failure is not None),
        )

    def advance(self, agreed: Flags, step: int) -> None:
        """Go to the next phase if all ranks are done with this one. ``agreed``: the largest of all ranks' flags.
        ``step``: the step just done."""
        self.is_late = bool(agreed.late)
        save = self._save
        if save is None or agreed.writing or agreed.committing:
            return
        if save.phase == "writing":
            start = time.perf_counter()
            written: Written = save.result or Written()
            shares = gathered((self._new_places(written.places), written.files, save.failure))
            for places, _, _ in shares:
                self._index.place(places)
            save.stall_seconds += time.perf_counter() - start
            if agreed.failed:
                self._fail(save, step, next((why for *_, why in shares if why), ""))
                return
            save.phase, save.task = "committing", None
            if self._is_first:
                save.task = Task(lambda: self._commit(save, [files for _, files, _ in shares]))
            return
        if agreed.failed:
            self._fail(save, step, save.failure or "")
            return
        self.saved_step, self._save = save.step, None
        self._last_seconds = time.perf_counter() - save.started
        self._failures, self._retry_at = 0, None
        if self._is_first:
            files = save.result
            self._tell(
                "saved",
                {
                    "step": save.step,
                    "path": str(self.folder / folder_name(save.step)),
                    "stall_seconds": save.stall_seconds,
                    "seconds": self._last_seconds,
                    "bytes": sum(facts["bytes"] for facts in files.values()),
                    "asynchronous": self.settings.asynchronous,
                },
            )

    # -- one save ------------------------------------------------------------------------------------------------------

    def _begin(self, progress: dict[str, Any], *, copy: bool) -> None:
        start, step = time.perf_counter(), progress["step"]
        self._begun, self.is_late = time.monotonic(), False
        self._attempts += 1
        partial = self.folder / f".{folder_name(step)}.{self._token}-{self._attempts}.partial"
        states = states_to_save(self._parts, self._shares)
        files = self._staging.files(states, dist.get_rank(), copy=copy)
        if not self._is_described:
            described = gathered({file.name: file.described for file in files})
            if self._is_first:
                self._index.describe({name: boxes for each in described for name, boxes in each.items()})
            self._is_described = True
        stop = threading.Event()
        task = Task(lambda: write_share(files, partial, stop))
        self._save = _Save(step, partial, dict(progress), updates_of(self._parts.optimizer), task, stop, started=start)
        self._save.stall_seconds = time.perf_counter() - start

    def _new_places(self, places: Places) -> Places:
        """Return where this rank's pieces lie, as far as rank 0 does not know it."""
        new = {name: place for name, place in places.items() if self._places.get(name) != place}
        self._places.update(new)
        return new

    def _commit(self, save: _Save, shares: list[FileFacts]) -> FileFacts:
        """Make a checkpoint of what all ranks have written, on rank 0; return its files."""
        files = {name: facts for share in shares for name, facts in share.items()}
        files |= write_description(self._index.stored(), save.partial)
        files[RECIPE] = write_file(save.partial / RECIPE, self._recipe.encode())
        facts = {
            "layout": asdict(self._parts.layout),
            "extra": sorted(self._parts.extra_states),
            "optimizer": True,
            "freeze": list(self._parts.recipe.model.freeze),
            "updates": save.updates,
            **self._text,
        }
        write_file(save.partial / MANIFEST, manifest_text(save.progress, files, facts).encode())
        sync_folder(save.partial)
        target = self.folder / folder_name(save.step)
        if target.exists():  # damaged, or of a life of the run that was rolled back
            os.replace(target, self.folder / f".{target.name}.{self._token}-{self._attempts}.replaced")
        os.replace(save.partial, target)
        sync_folder(self.folder)
        with suppress(OSError):  # the checkpoint stands; these can wait for the next one
            self._point_to(target)
            self._prune(save.step)
        return files

    def _point_to(self, target: Path) -> None:
        write_atomically(self.folder / LATEST, target.name + "\n")

    def _prune(self, step: int) -> None:
        """Remove what is old, and what failed saves and killed processes have left.

        Only checkpoints up to this step count: those of later steps are damaged, or the run would have gone on there.
        """
        every = self.settings.keep_every_steps
        for old in [path for path in checkpoints(self.folder) if step_of(path) <= step][self.settings.keep :]:
            if not (every and step_of(old) % every == 0):
                os.replace(old, self.folder / f".{old.name}.old")  # half removed it is no checkpoint either
        for left in self.folder.glob(".step_*"):
            shutil.rmtree(left, ignore_errors=True)

    def _fail(self, save: _Save, step: int, reason: str) -> None:
        self._save = None
        self._failures += 1
        self._retry_at = step + 2 ** min(self._failures - 1, 10)
        if not self._is_first:
            return
        shutil.rmtree(save.partial, ignore_errors=True)
        if save.stop.is_set():
            self._tell("save_given_up", {"step": save.step, "for_step": step})
            return
        values = {"step": save.step, "reason": reason, "failures": self._failures, "retry_step": self._retry_at}
        with suppress(OSError):
            values["free_bytes"] = shutil.disk_usage(self.folder).free
        self._tell("save_failed", values)


def describe_save(name: str, values: dict[str, Any]) -> str:
    """Return a save's event as a sentence for a person."""
    if name == "saved":
        return (
            f"saved {values['path']} ({show_bytes(values['bytes'])}) in {values['seconds']:.1f}s"
            f"{', training stood ' + format(values['stall_seconds'], '.2f') + 's' if values['asynchronous'] else ''}"
        )
    if name == "save_given_up":
        return (
            f"the checkpoint of step {values['step']} is given up for that of step {values['for_step']}: asked to stop"
        )
    free = f", {show_bytes(values['free_bytes'])} free" if "free_bytes" in values else ""
    return (
        f"warning: checkpoint of step {values['step']} could not be written ({values['reason']}{free}); training goes "
        f"on, older checkpoints are kept, next try at step {values['retry_step']}"
    )
