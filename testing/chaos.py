"""Kill -9 of random ranks at random moments, then bit-exact equality with a run that nobody disturbed.

    python -m testing.chaos kills=100 [seed=1]

Four ranks (PP 2 x EP 2) train; one of them is killed while it starts, in a step, or while a checkpoint is written; the
others must end by themselves; the run is started again, with asynchronous and synchronous saves in turn. After every
kill all complete checkpoints must be valid and the next life must begin at the newest of them.
"""

from __future__ import annotations

import faulthandler
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsv3_megatron.checkpoint.manifest import checkpoints, newest_valid, step_of
from testing.fork_servers import forked_from
from testing.ports import free_port
from testing.ranks import PRELOAD, context
from testing.training.tiny import SMALL

WORLD = 4
LAYOUT = ("parallel.pipeline=2", "parallel.expert=2", "checkpoint.every_steps=2", "checkpoint.keep=2")
NODES = 2  # that the ranks are on, as far as their names say
ENDS_WITHIN_SECONDS = 60  # of survivors after a kill; far above what they need, the machine may be busy
LIFE_SECONDS = 600
MOMENTS = ("save", "step", "start", "save", "step")


@dataclass
class Outcome:
    """What the kills did."""

    kills: Counter = field(default_factory=Counter)  # by moment
    ended_seconds: list[float] = field(default_factory=list)
    lost_beyond_checkpoint: int = 0
    restarts: int = 0


def live(rank: int, port: int, overrides: list[str], errors: str) -> None:
    """One rank's life."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    os.environ["SLURMD_NODENAME"] = f"node{rank * NODES // WORLD}"
    os.dup2(os.open(f"{errors}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    faulthandler.register(signal.SIGUSR2, all_threads=True)  # asked where it stands
    from launcher.pretrain import main_of_rank

    os.environ["OMP_NUM_THREADS"] = "1"
    sys.argv = ["pretrain.py", *SMALL, *LAYOUT, "logging.console_every_steps=1000000", *overrides]
    main_of_rank()


def start(overrides: list[str], errors: Path) -> list[Any]:
    """Start all ranks."""
    port = free_port()
    ranks = [context.Process(target=live, args=(r, port, overrides, str(errors))) for r in range(WORLD)]
    with forked_from(PRELOAD):  # or every life would begin with seconds of imports
        for rank in ranks:
            rank.start()
    return ranks


def last_step(directory: Path) -> int:
    """Return the newest step in metrics.jsonl, 0 before the first."""
    try:
        lines = (directory / "metrics.jsonl").read_text().splitlines()
        return json.loads(lines[-1])["step"] if lines else 0
    except (OSError, ValueError):  # not there yet, or half a line
        return 0


def wait_for(moment: str, directory: Path, choice: random.Random, ranks: list[Any]) -> bool:
    """Wait for the moment to kill at; return False if the run ended before."""
    begin, deadline = last_step(directory), time.monotonic() + LIFE_SECONDS
    if moment == "start":
        time.sleep(choice.uniform(0.0, 2.0))
        return all(rank.is_alive() for rank in ranks)
    wanted = begin + choice.randint(1, 3)
    while time.monotonic() < deadline and all(rank.is_alive() for rank in ranks):
        saving = any((directory / "checkpoints").glob(".*.partial"))
        if moment == "step" and last_step(directory) >= wanted:
            time.sleep(choice.uniform(0.0, 0.2))
            return True
        if moment == "save" and saving and last_step(directory) > begin:
            time.sleep(choice.choice((0.0, 0.0, 0.01, 0.03)))
            return True
        time.sleep(0.001 if moment == "save" else 0.01)  # a save of these ranks takes a tenth of a second or more
    return False


def kill_one(ranks: list[Any], choice: random.Random, moment: str, outcome: Outcome, errors: Path) -> None:
    """Kill -9 one rank, and see the others end."""
    os.kill(ranks[choice.randrange(WORLD)].pid, signal.SIGKILL)
    killed = time.monotonic()
    outcome.kills[moment] += 1
    for rank in ranks:
        rank.join(timeout=max(0.1, killed + ENDS_WITHIN_SECONDS - time.monotonic()))
    left = [rank for rank in ranks if rank.is_alive()]
    for rank in left if moment != "start" else ():
        os.kill(rank.pid, signal.SIGUSR2)
        rank.join(timeout=2)
    for rank in left:  # while they meet, survivors wait for whoever does not come; torchrun's agent ends them
        rank.kill()
        rank.join()
    if left and moment != "start":
        stands = "\n".join(path.read_text()[-3000:] for path in sorted(errors.parent.glob(f"{errors.name}.*")))
        raise AssertionError(f"{len(left)} ranks did not end within {ENDS_WITHIN_SECONDS} s of a kill\n{stands}")
    if not left:
        outcome.ended_seconds.append(time.monotonic() - killed)


def finish(overrides: list[str], directory: Path) -> None:
    """Run to the end."""
    ranks = start(overrides, directory / "stderr.last")
    for rank in ranks:
        rank.join(timeout=LIFE_SECONDS)
    codes = [rank.exitcode for rank in ranks]
    for rank in ranks:
        rank.kill()
    assert codes == [0] * WORLD, (codes, (directory / "stderr.last.0").read_text()[-2000:])


def resumed_steps(directory: Path) -> list[int]:
    """Return the steps that the lives so far began at."""
    path = directory / "events.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [line["step"] for line in lines if line["event"] == "resumed"]


def torment(kills: int, seed: int, place: Path, tell: Any = lambda text: None) -> Outcome:
    """Kill so many times, then compare with the undisturbed run. Raises AssertionError where anything differs."""
    from testing.training.checkpoints import assert_same_tensors

    choice, outcome = random.Random(seed), Outcome()
    plain, hurt = place / "plain", place / "hurt"
    for directory in (plain, hurt):
        directory.mkdir(parents=True)
    steps = f"run.steps={3 * kills + 4}"
    finish([steps, f"run.directory={plain}"], plain)
    tell("undisturbed run done")
    while sum(outcome.kills.values()) < kills:
        expected, wrong = newest_valid(hurt / "checkpoints")
        assert not wrong, wrong
        before = resumed_steps(hurt)
        words = [steps, f"run.directory={hurt}", f"checkpoint.asynchronous={outcome.restarts % 2 == 0}"]
        ranks = start(words, hurt / "stderr")
        outcome.restarts += 1
        moment = MOMENTS[sum(outcome.kills.values()) % len(MOMENTS)]
        if wait_for(moment, hurt, choice, ranks):
            kill_one(ranks, choice, moment, outcome, hurt / "stderr")
        else:
            for rank in ranks:
                rank.join(timeout=LIFE_SECONDS)
            assert (hurt / "finished").exists(), (hurt / "stderr.0").read_text()[-2000:]
            break  # the run is through: later kills would hit nothing
        began = resumed_steps(hurt)[len(before) :]
        if began and expected is not None:
            outcome.lost_beyond_checkpoint += step_of(expected) - began[0]
        tell(f"{sum(outcome.kills.values())} kills, step {last_step(hurt)}")
    finish([steps, f"run.directory={hurt}"], hurt)
    mine, theirs = checkpoints(hurt / "checkpoints")[0], checkpoints(plain / "checkpoints")[0]
    assert mine.name == theirs.name
    assert_same_tensors(mine, theirs)
    compare_metrics(hurt, plain)
    return outcome


def compare_metrics(mine: Path, theirs: Path) -> None:
    """Every step is there once, with the same losses."""
    fields = ("step", "tokens", "lm_loss", "mtp_loss", "balance_loss", "grad_norm", "max_violation", "skipped")
    lines = [[json.loads(x) for x in (d / "metrics.jsonl").read_text().splitlines()] for d in (mine, theirs)]
    assert [[line[f] for f in fields] for line in lines[0]] == [[line[f] for f in fields] for line in lines[1]]


def main(arguments: list[str]) -> int:
    """Return 0 where nothing was lost."""
    given = dict(argument.split("=") for argument in arguments)
    kills, seed = int(given.get("kills", 100)), int(given.get("seed", 1))
    with tempfile.TemporaryDirectory() as place:
        outcome = torment(kills, seed, Path(place), lambda text: print(text, flush=True))
    slowest = max(outcome.ended_seconds, default=0.0)
    print(f"{sum(outcome.kills.values())} kills: {dict(outcome.kills)}; survivors ended within {slowest:.1f} s")
    print(f"{outcome.lost_beyond_checkpoint} steps lost beyond the last checkpoint, final weights identical")
    return 0 if outcome.lost_beyond_checkpoint == 0 else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
