"""Is the long context used after the context extension, and not before? Facts asked for over a growing distance.

Trains recipe=dsv3_tiny at 256 tokens on data=recall (facts, noise, questions), then recipe=dsv3_tiny_2k from its
weights at 2,048 tokens, and asks all three - the first, the first with YaRN switched on and not trained, the second -
the same questions in sequences of 2,048 tokens. Fair because only attention over the whole distance can answer: a
model that does not reach the fact is right once in VALUES times. Goes on from what is in the directory.

    python -m benchmarks.recall [steps=1500] [extension_steps=100] [sequences=16] [directory=runs/recall]
"""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
from pydantic import BaseModel, PositiveInt

from launcher.command_line.arguments import parse_arguments
from launcher.command_line.compose import load_resolved
from launcher.command_line.console import guarded

SHORT, LONG = 256, 2048
EDGES = (0, 256, 512, 1024, 2048)  # of the distance from a question to its fact, tokens
COMMON = ["data=recall", "model.vocab_size=128", "logging.wandb=disabled", "logging.console_every_steps=20"]


class Arguments(BaseModel):
    """What the benchmark takes."""

    steps: PositiveInt = 1500
    extension_steps: PositiveInt = 100
    sequences: PositiveInt = 16
    directory: str = "runs/recall"
    output: str = "benchmarks/results/recall.json"


def train(recipe: str, directory: Path, steps: int, *more: str) -> None:
    """Train, or go on from where the directory stands."""
    words = [f"recipe={recipe}", f"run.directory={directory}", f"run.steps={steps}", *COMMON, *more]
    subprocess.run([sys.executable, "launcher/pretrain.py", *words], cwd=ROOT, check=True)


def accuracy(recipe: Any, directory: Path, sequences: int) -> list[float]:
    """Return the share of right answers by distance, in sequences of LONG tokens, of the weights of a run."""
    import numpy as np
    import torch

    from dsv3_megatron.data.source.samples import Recall
    from dsv3_megatron.inference.trained_model import trained_model
    from dsv3_megatron.model.stage import forward_logits

    # The model is built for the sequence length of its recipe; RoPE goes on as far as it is asked to.
    longer = recipe.model_copy(update={"data": recipe.data.model_copy(update={"sequence_length": LONG})})
    source = Recall(recipe.model.vocab_size, LONG, recipe.run.seed + 2)  # no stream of the training
    distances, right = [], []
    with trained_model(longer, str(directory)) as trained, torch.no_grad():
        for number in range(sequences):
            sample = source.sample(number)
            logits = forward_logits(trained.parts.whole_model, torch.from_numpy(sample.tokens)[None])
            asked = np.flatnonzero(sample.weights)
            facts = {token: place for place, token in enumerate(sample.tokens[: LONG // 8])}
            distances += [place - facts[sample.labels[place]] for place in asked]
            right += (logits.view(LONG, -1).argmax(-1).numpy() == sample.labels)[asked].tolist()
    found = np.array(distances), np.array(right)
    return [float(found[1][(a <= found[0]) & (found[0] < b)].mean()) for a, b in pairwise(EDGES)]


def main(arguments: list[str]) -> int:
    """Train, measure and print a table."""
    given = parse_arguments(Arguments, arguments)
    before, after = Path(given.directory) / "before", Path(given.directory) / "after"
    rate = "[{until: 50 steps, shape: linear, to: 2.0e-3}, {until: 100000 steps, shape: constant}]"
    train("dsv3_tiny", before, given.steps, "optim.micro_batch=16", f"optim.learning_rate={rate}")
    train("dsv3_tiny_2k", after, given.extension_steps, f"run.start_from={before}")
    short, long = (load_resolved(folder / "recipe.yaml") for folder in (before, after))
    found = {
        "before": accuracy(short, before, given.sequences),
        "YaRN on, not trained": accuracy(short.model_copy(update={"model": long.model}), before, given.sequences),
        "after": accuracy(long, after, given.sequences),
    }
    summary = {"command": "python -m benchmarks.recall", **given.model_dump(), "distances": EDGES, "accuracy": found}
    Path(given.output).write_text(json.dumps(summary, indent=1) + "\n")
    print("| share of right answers at a distance of | " + " | ".join(found) + " |\n|---|---|---|---|")
    for number, (a, b) in enumerate(pairwise(EDGES)):
        print(f"| {a}-{b} tokens | " + " | ".join(f"{values[number]:.1%}" for values in found.values()) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
