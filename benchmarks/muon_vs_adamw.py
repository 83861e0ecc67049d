"""Does Muon train better than AdamW? The same model, text, tokens and order of samples; each at its own best rate.

    python -m benchmarks.muon_vs_adamw [recipe=dsv3_tiny] [share=1] [rates=...] [seeds=1234,1,2] [OVERRIDES]

Fair because each side gets a sweep of learning rates a factor of two apart, widened until its best is not at an edge,
and only then three seeds at that rate. Everything else is the recipe's: warm-up and decay, weight decay, clipping,
batch. Compared is the loss on held-out text after equal tokens, and after equal time: seconds a step are measured
apart, in turns (benchmarks/optimizer_cost.py), and the side whose step takes longer is read before its end, between two
evaluations - a little to its disadvantage, since its rate has not come all the way down there.

Trainings are whole runs of launcher/pretrain.py, one after the other. A finished one is not run again and one that was
cut resumes, so that the command can be repeated. Further words are overrides of the recipe. On a GPU:

    python -m benchmarks.muon_vs_adamw recipe=dsv3_150m data.path=shards precision=bf16 optim.micro_batch=16
"""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any, Literal

from pydantic import BaseModel, Field, PositiveInt

from benchmarks.optimizer_cost import cost
from benchmarks.optimizer_runs import OPTIMIZERS, ROOT, Training, Trainings, peak, sweep
from benchmarks.optimizer_table import plot, table
from benchmarks.page_tables import filled
from benchmarks.work import machine
from launcher.command_line.arguments import parse_arguments, split_words
from launcher.command_line.compose import compose
from launcher.command_line.console import guarded
from parallel.errors import RecipeError


class Arguments(BaseModel):
    """What the benchmark takes; other words are overrides of the recipe."""

    recipe: str = Field("dsv3_tiny", description="what to train")
    share: float = Field(
        1.0, gt=0, le=1, description="of the recipe's tokens; its learning-rate curve is shortened alike"
    )
    sweep_share: float | None = Field(
        None,
        gt=0,
        le=1,
        description="of the recipe's tokens in the trainings that look for the best rates; null = share",
    )
    rates: str | None = Field(
        None,
        description="peak rates of both sweeps to begin with, separated by commas; null = the recipe's, half, twice",
    )
    seeds: str = Field("1234,1,2", description="of the trainings at the best rates; the sweep's is the first")
    only: Literal["costs", "losses", "report"] | None = Field(
        None, description="costs: seconds alone; losses: trainings alone; report: table and drawing of what is there"
    )
    threads: str = Field("1", description="threads a process, separated by commas, to measure seconds with on a CPU")
    repeats: PositiveInt = Field(10, description="turns of each side, to measure seconds")
    steps: PositiveInt = Field(1, description="steps of a turn")
    device: Literal["cpu", "cuda"] | None = Field(
        None, description="where seconds are measured; null = cuda if there is one"
    )
    directory: str = Field("runs/muon_vs_adamw", description="where the trainings are")
    output: str = "benchmarks/results/muon_vs_adamw.json"
    plot: str = "docs/img/muon_vs_adamw.svg"
    page: str = Field("docs/optimizers.md", description="whose tables to write; none = nobody's")


def losses(sweeping: Trainings, comparing: Trainings, rates: list[float], seeds: list[int]) -> dict[str, Any]:
    """Return both sweeps, with the first seed, and the trainings with all seeds at the best rates."""

    def result(trainings: Trainings, optimizer: str, rate: float, seed: int) -> dict[str, Any]:
        found = trainings.result(Training(optimizer, rate, seed))
        loss, tokens = found["held_out_loss"], found["tokens"]
        print(
            f"{optimizer:<6} rate {rate:<8.3g} seed {seed:<6} {tokens:,} tokens: held-out loss {loss:.4f}", flush=True
        )
        return found

    swept: dict[str, dict[float, dict[str, Any]]] = {name: {} for name in OPTIMIZERS}
    for name, found in swept.items():

        def loss(rate: float, name: str = name, found: dict[float, dict[str, Any]] = found) -> float:
            found[rate] = result(sweeping, name, rate, seeds[0])
            return found[rate]["held_out_loss"]

        sweep(loss, rates)
    best = {name: min(found, key=lambda rate: found[rate]["held_out_loss"]) for name, found in swept.items()}
    seeded: dict[str, list[dict[str, Any]]] = {name: [] for name in OPTIMIZERS}
    for seed in seeds:
        for name in OPTIMIZERS:
            seeded[name].append(result(comparing, name, best[name], seed))
    return {
        "sweep": {name: [found[rate] for rate in sorted(found)] for name, found in swept.items()},
        "best_rate": best,
        "seeds": seeded,
    }


def at_step(held_out: list[list[float]], step: float) -> float:
    """Return the held-out loss at a step between two evaluations, [step, tokens, loss] each."""
    before = max((e for e in held_out if e[0] <= step), key=lambda e: e[0])
    after = min((e for e in held_out if e[0] >= step), key=lambda e: e[0])
    along = (step - before[0]) / (after[0] - before[0]) if after[0] > before[0] else 0.0
    return before[2] + along * (after[2] - before[2])


def passes(held_out: list[list[float]], loss: float) -> float | None:
    """Return after how many tokens a run's held-out loss is first as low as ``loss``, between two evaluations; None if
    it never is."""
    for (_, tokens, high), (_, later, low) in pairwise(held_out):
        if low <= loss < high:
            return tokens + (high - loss) / (high - low) * (later - tokens)
    return None


def compared(seeds: dict[str, list[dict[str, Any]]], step_ratio: float) -> dict[str, Any]:
    """Return losses of both sides after equal tokens and after equal time, seed by seed and their means; and after how
    many tokens Muon is where AdamW ends, seed by seed.

    ``step_ratio``: Muon's seconds a step over AdamW's.
    """
    last = {"adamw": min(1.0, step_ratio), "muon": min(1.0, 1 / step_ratio)}
    after = {
        "equal_tokens": {n: [r["held_out_loss"] for r in runs] for n, runs in seeds.items()},
        "bits_per_byte": {n: [r["bits_per_byte"] for r in runs] for n, runs in seeds.items()},
        "equal_time": {n: [at_step(r["held_out"], r["steps"] * last[n]) for r in runs] for n, runs in seeds.items()},
    }
    known = {what: sides for what, sides in after.items() if None not in sides["muon"]}
    found: dict[str, Any] = {
        what: {**sides, "mean": {n: mean(v) for n, v in sides.items()}} for what, sides in known.items()
    }
    ends = zip(seeds["muon"], seeds["adamw"])
    found["tokens_to_adamws_last_loss"] = [passes(mine["held_out"], theirs["held_out_loss"]) for mine, theirs in ends]
    return found


def main(arguments: list[str]) -> int:
    """Train, measure, write, draw and print."""
    own, overrides = split_words(Arguments, arguments)
    given = parse_arguments(Arguments, own)
    words = (f"recipe={given.recipe}", *overrides)
    recipe = compose(list(words))
    found = _keep(given, {})
    if given.only in (None, "losses"):
        directory = ROOT / given.directory / given.recipe
        rates = _numbers("rates", given.rates) if given.rates else [peak(recipe) * factor for factor in (0.5, 1, 2)]
        seeds = [round(seed) for seed in _numbers("seeds", given.seeds)]
        sides = [Trainings(words, share, directory) for share in (given.sweep_share or given.share, given.share)]
        trained = {**_made(arguments), **losses(*sides, rates, seeds)}
        found = _keep(given, {"losses": {**found.get("losses", {}), f"{given.share:g}": trained}})
    if given.only in (None, "costs"):
        import torch

        device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
        each = [round(number) for number in _numbers("threads", given.threads)]
        costs = [cost(words, threads=n, repeats=given.repeats, steps=given.steps, device=device) for n in each]
        found = _keep(given, {"costs": {**_made(arguments), "by_threads": costs}})
    if "losses" in found and "costs" in found:
        ratio = found["costs"]["by_threads"][0]["step_ratio"]
        for trained in found["losses"].values():
            trained["compared"] = compared(trained["seeds"], ratio)
        found = _keep(given, {"losses": found["losses"]})
        plot(found, given.plot)
    if given.page != "none":
        page = Path(given.page)
        page.write_text(with_tables(page.read_text(), json.loads(Path(given.output).read_text())))
    print(table(found))
    return 0


def with_tables(page: str, results: dict[str, Any]) -> str:
    """Return docs/optimizers.md with the tables of every recipe's results."""
    return filled(page, {name: table(found) for name, found in results.items()})


def _keep(given: Arguments, more: dict[str, Any]) -> dict[str, Any]:
    """Add to what the result file knows of the recipe, which another process may have changed, and return that."""
    output = Path(given.output)
    everything = json.loads(output.read_text()) if output.exists() else {}
    found = everything.setdefault(given.recipe, {})
    found.update(more)
    if more:
        output.write_text(json.dumps(everything, indent=1) + "\n")
    return found


def _numbers(key: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise RecipeError(f"{key} = {text}: not numbers separated by commas; write {key}=1,2") from None


def _made(arguments: list[str]) -> dict[str, Any]:
    """Return what the figures were made with."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    command = " ".join(["python -m benchmarks.muon_vs_adamw", *arguments])
    return {"command": command, "commit": commit.stdout.strip(), "machine": machine()}


if __name__ == "__main__":
    sys.exit(guarded(main))
