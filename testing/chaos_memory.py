"""Kill -9 of ranks whose states are in memory alone, and of nodes with their memory; copies are damaged; then bit-exact
equality with a run that nobody disturbed.

    python -m testing.chaos_memory kills=100 [seed=1]

Four ranks on two "nodes" keep their state in memory after every second step, and on disk after every twentieth. After a
kill, what the fault says is lost or damaged. The next life must begin at the last state that was told to be kept, or,
where both copies of a share are gone, at what is left: an older state or the disk, never at anything damaged.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from dsv3_megatron.checkpoint.manifest import checkpoints, newest_valid, step_of
from testing.chaos import (
    LIFE_SECONDS,
    NODES,
    Outcome,
    compare_metrics,
    finish,
    kill_one,
    last_step,
    resumed_steps,
    start,
    wait_for,
)

EVERY, ON_DISK_EVERY = 2, 20
# After the kill of a rank: nothing more; a node is gone with its memory; a byte of a copy is flipped; both at once, so
# that the shares of the node that is gone are left in no memory, or only damaged.
FAULTS = ("rank", "node", "damaged copy", "rank", "node and the copies of its shares")


def lose(fault: str, memory: Path, choice: random.Random) -> None:
    """Let memory be as after a fault."""
    node = f"node{choice.randrange(NODES)}"
    if fault.startswith("node"):
        for folder in memory.glob(f"dsv3-*/*/{node}"):
            shutil.rmtree(folder)
    if fault == "damaged copy":
        _flip(choice.choice([*memory.glob("dsv3-*/*/*/step_*/rank_*/*.distcp")] or [None]), choice)
    if fault == "node and the copies of its shares":
        for file in memory.glob("dsv3-*/*/*/step_*/rank_*/__*_0.distcp"):
            _flip(file, choice)


def _flip(file: Path | None, choice: random.Random) -> None:
    if file is None or not (data := bytearray(file.read_bytes())):
        return
    data[choice.randrange(len(data))] ^= 1 << choice.randrange(8)
    file.write_bytes(data)


def kept(directory: Path) -> int:
    """Return the last step that was told to be kept in memory, by the newest life that has told any; 0 before."""
    path = directory / "events.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return next((line["step"] for line in reversed(lines) if line["event"] == "saved_in_memory"), 0)


def torment(kills: int, seed: int, place: Path, tell: Any = lambda text: None) -> Outcome:
    """Kill so many times, then compare with the undisturbed run. Raises AssertionError where anything differs."""
    from testing.training.checkpoints import assert_same_tensors  # as in testing.chaos: torch, after the ranks' server

    choice, outcome = random.Random(seed), Outcome()
    plain, hurt, memory = place / "plain", place / "hurt", place / "memory"
    for directory in (plain, hurt, memory):
        directory.mkdir(parents=True)
    steps = f"run.steps={4 * kills + 6}"
    finish([steps, f"run.directory={plain}"], plain)
    tell("undisturbed run done")
    words = [steps, f"run.directory={hurt}", f"checkpoint.every_steps={ON_DISK_EVERY}"]
    words += [f"checkpoint.memory_every_steps={EVERY}", f"checkpoint.memory_path={memory}"]
    expected = 0  # at least, of the next life's first state
    while sum(outcome.kills.values()) < kills:
        before = resumed_steps(hurt)
        ranks = start(words, hurt / "stderr")
        outcome.restarts += 1
        fault = FAULTS[sum(outcome.kills.values()) % len(FAULTS)]
        moment = choice.choice(("step", "step", "start"))
        alive = wait_for(moment, hurt, choice, ranks)
        if alive:
            kill_one(ranks, choice, moment, outcome, hurt / "stderr")
        else:
            for rank in ranks:
                rank.join(timeout=LIFE_SECONDS)
        if expected:
            began = [*resumed_steps(hurt)[len(before) :], expected][0]  # killed before it has resumed: the next will
            assert began >= expected, f"{expected - began} steps lost: a life began at {began}, not {expected}"
        if not alive:
            assert (hurt / "finished").exists(), (hurt / "stderr.0").read_text()[-2000:]
            break
        on_disk, _ = newest_valid(hurt / "checkpoints")
        lose(fault, memory, choice)
        expected = max(kept(hurt) if "copies" not in fault else 0, step_of(on_disk) if on_disk else 0)
        tell(f"{sum(outcome.kills.values())} kills, step {last_step(hurt)}, {fault} lost, expected {expected}")
    finish(words, hurt)
    mine, theirs = checkpoints(hurt / "checkpoints")[0], checkpoints(plain / "checkpoints")[0]
    assert mine.name == theirs.name
    assert_same_tensors(mine, theirs)
    compare_metrics(hurt, plain)
    assert not list(memory.glob("dsv3-*")), "the run is over, and its memory is not given back"
    return outcome


def main(arguments: list[str]) -> int:
    """Return 0 where nothing was lost."""
    given = dict(argument.split("=") for argument in arguments)
    with tempfile.TemporaryDirectory() as place:
        outcome = torment(
            int(given.get("kills", 100)), int(given.get("seed", 1)), Path(place), lambda text: print(text, flush=True)
        )
    print(f"{sum(outcome.kills.values())} kills; no step lost that memory or disk still held whole, weights identical")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
