"""Lives of a run whose ranks are killed: what benchmarks/goodput.py starts, ends and times.

Two ranks of a small model train on this machine. A step sleeps until it has taken ``pace`` seconds, so that other work
on the machine moves its time little. When one rank is killed the other is ended too, as torchrun's agent does it, and
the run is started again, by ranks that are forked with all modules imported.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from dsv3_megatron.checkpoint.manifest import checkpoints, step_of
from dsv3_megatron.planning.goodput.model import Save
from testing.fork_servers import forked_from
from testing.ports import free_port
from testing.ranks import PRELOAD, context
from testing.training.tiny import SMALL

WORLD = 2
WORDS = ("parallel.expert=2", "run.steps=1000000", "checkpoint.keep=2", "checkpoint.asynchronous=true")
AGENT_SECONDS = 0.1  # in which torchrun's agent looks after its ranks
WARM = 3  # steps of a life whose time counts as its start: the first ones take memory


@dataclass
class Life:
    """A life of the run; moments by the monotonic clock, which all processes share.

    Attributes:
        before: when the rank of the life before was killed; of a first life, when it was started.
        is_first: whether none was killed before it, in this round.
        beats: when each of its steps began.
        killed: when a rank of it was.
        resumed: the steps that it began with.
        saved: when the checkpoint of a step was there.
    """

    before: float
    is_first: bool = False
    beats: list[float] = field(default_factory=list)
    killed: float = 0.0
    resumed: int = 0
    saved: dict[int, float] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """From one kill to the next."""
        return self.killed - self.before

    @property
    def save_seconds(self) -> list[float]:
        """From the next step's beginning until a checkpoint was there, of every save. The ranks themselves know only
        two steps later that they are done with one."""
        later = {step: step - self.resumed for step in self.saved}
        return [self.saved[step] - self.beats[at] for step, at in later.items() if 0 < at < len(self.beats)]

    def start_seconds(self, step_seconds: float) -> float | None:
        """Return the time from the kill before to its first step at full speed; None where it did not get there."""
        return self.beats[WARM] - self.before - WARM * step_seconds if len(self.beats) > WARM else None


@dataclass(frozen=True)
class Times:
    """What lives took."""

    step_seconds: float
    stall_seconds: float
    save_seconds: float
    recovery_seconds: float

    @property
    def save(self) -> Save:
        """What the model asks of a kind of save."""
        return Save(self.stall_seconds, max(self.save_seconds, self.stall_seconds), self.recovery_seconds)


def rank_of_life(rank: int, port: int, overrides: list[str], errors: str, beats: str, pace: float) -> None:
    """One rank's life."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    os.environ["OMP_NUM_THREADS"] = "1"
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(f"{errors}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), 2)
    from dsv3_megatron.train import trainer
    from launcher.pretrain import main_of_rank

    inner = trainer.train_step

    def paced(*given: Any, **named: Any) -> Any:
        begin = time.monotonic()
        if rank == 0:
            with open(beats, "a") as file:
                file.write(f"{begin}\n")
        result = inner(*given, **named)
        time.sleep(max(0.0, begin + pace - time.monotonic()))
        return result

    trainer.train_step = paced
    sys.argv = ["pretrain.py", *SMALL, *WORDS, "logging.console_every_steps=1000000", *overrides]
    main_of_rank()


class Lives:
    """Starts a run in a directory and kills it, again and again."""

    def __init__(self, directory: Path, every_steps: int, pace: float, seed: int):
        directory.mkdir(parents=True, exist_ok=True)
        self.directory, self.every_steps, self.pace = directory, every_steps, pace
        self.lives: list[Life] = []
        self.killed: float | None = None  # when the last rank was; None: this round has just begun
        self._choice = random.Random(seed)

    def live(self, until: Callable[[Life], bool]) -> None:
        """Start the ranks, wait until it is time, and kill one. Raises RuntimeError: one ended by itself."""
        beats, errors = self.directory / "beats", self.directory / "stderr"
        beats.unlink(missing_ok=True)
        life = Life(time.monotonic() if self.killed is None else self.killed, is_first=self.killed is None)
        life.resumed = self.kept_steps
        words = [f"run.directory={self.directory}", f"checkpoint.every_steps={self.every_steps}"]
        port = free_port()
        given = [(rank, port, words, str(errors), str(beats), self.pace) for rank in range(WORLD)]
        ranks = [context.Process(target=rank_of_life, args=each) for each in given]
        with forked_from(PRELOAD):
            for rank in ranks:
                rank.start()
        try:
            while not until(life):
                time.sleep(0.01)
                life.beats = moments(beats)
                if (step := self.kept_steps) > life.resumed:
                    life.saved.setdefault(step, time.monotonic())
                if not all(rank.is_alive() for rank in ranks):
                    raise RuntimeError(f"a rank ended by itself: {Path(f'{errors}.0').read_text()[-2000:]}")
            os.kill(ranks[self._choice.randrange(WORLD)].pid, signal.SIGKILL)
            life.killed = self.killed = time.monotonic()
            time.sleep(AGENT_SECONDS)
        finally:
            for rank in ranks:
                rank.kill()
                rank.join()
        life.beats = moments(beats)
        self.lives.append(life)

    def begin_round(self) -> None:
        """Let the next life be a first one: what was before it does not count."""
        self.killed = None

    @property
    def seconds(self) -> float:
        """The time of all lives, and of what lay between them in a round."""
        return sum(life.seconds for life in self.lives)

    @property
    def kept_steps(self) -> int:
        """Steps that the newest checkpoint holds."""
        found = checkpoints(self.directory / "checkpoints")
        return step_of(found[0]) if found else 0

    def times(self) -> Times:
        """Return what steps, saves and starts took, on average."""
        lines = [json.loads(line) for line in (self.directory / "events.jsonl").read_text().splitlines()]
        saved = [line for line in lines if line["event"] == "saved"]
        return times_of(self.lives, mean(line["stall_seconds"] for line in saved), self.every_steps)


def times_of(lives: list[Life], stall: float, every_steps: int) -> Times:
    """Return the times of lives in which a save stalled training for ``stall`` every so many steps."""
    periods = [b - a for life in lives for a, b in zip(life.beats[WARM:], life.beats[WARM + 1 :])]
    step = mean(periods) - stall / every_steps
    starts = [start for life in lives if not life.is_first and (start := life.start_seconds(step)) is not None]
    beside = mean(seconds for life in lives for seconds in life.save_seconds)
    return Times(step, stall, stall + max(0.0, beside), mean(starts))


def moments(path: Path) -> list[float]:
    """Return the whole lines of a file of moments."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        return []
    return [float(line) for line in text[: text.rfind("\n") + 1].split()]
