"""Training a published model on, with and without its old text: writes benchmarks/results/continuing.json.

    python -m benchmarks.continuing

The road of docs/continue.md in miniature, by its own commands: a model of 0.35M parameters that transformers has
trained on prose goes on with source code alone, with a quarter of prose beside it, and with that and router biases of
zero instead of the published ones. Nothing else differs.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

from pydantic import Field, PositiveInt
from safetensors.torch import load_file, save_file

from launcher.command_line.arguments import Arguments, takes
from launcher.command_line.console import guarded
from testing.trained_elsewhere import LENGTH, as_recipe, old_text, own_text, publish

ROOT = Path(__file__).resolve().parent.parent
TEXTS = ("own", "old")
FIRST = 10  # steps whose balance is shown


class ContinuingArguments(Arguments):
    """Keys of the command."""

    steps: PositiveInt = Field(60, description="to train on, of 16 sequences")
    published_steps: PositiveInt = Field(120, description="that the published model was trained for")
    output: Path = Field(ROOT / "benchmarks/results/continuing.json", description="file to write")


def command(place: Path, name: str, *words: str) -> str:
    """Run a command as a user does; return what it prints."""
    line = [sys.executable, ROOT / "launcher" / f"{name}.py", *words]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    return subprocess.run(line, cwd=place, check=True, capture_output=True, text=True, env=environment).stdout


def evaluated(place: Path, run: str) -> dict[str, float]:
    """Return the bits per byte of a run on the held-out documents of each text."""
    return {t: json.loads(command(place, "evaluate", f"run={run}", f"data={t}_shards"))["bits_per_byte"] for t in TEXTS}


def without_biases(published: Path, target: Path) -> None:
    """Write the published folder again with router biases of zero."""
    target.mkdir()
    for file in published.iterdir():
        target.joinpath(file.name).write_bytes(file.read_bytes())
    tensors = load_file(published / "model.safetensors")
    zero = {
        name: values * 0 if name.endswith("e_score_correction_bias") else values for name, values in tensors.items()
    }
    save_file(zero, target / "model.safetensors", metadata={"format": "pt"})


def train(place: Path, name: str, start: str, shards: str, steps: int) -> dict[str, Any]:
    """Train on from an imported run; return its texts' bits per byte and the balance of its first steps."""
    words = [f"run.name={name}", f"run.start_from={start}", f"data.path={shards}", *as_recipe(steps)]
    command(place, "pretrain", "recipe=moonlight_16b", "parallel=single", *words)
    lines = [json.loads(line) for line in (place / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    balance = [line["max_violation"] for line in lines]
    return {
        **evaluated(place, f"runs/{name}"),
        "first_balance": mean(balance[:FIRST]),
        "balance": mean(balance[-FIRST:]),
    }


@takes(ContinuingArguments, __doc__)
def main(given: ContinuingArguments) -> int:
    """Train, evaluate, write; return the exit code."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        publish(place / "published", old_text(place / "old"), steps=given.published_steps)
        own_text(place / "own")
        without_biases(place / "published", place / "unbiased")
        for name in ("published", "unbiased"):
            command(place, "import_hf", f"input={name}", f"output=runs/{name}", "recipe=moonlight_16b")
        shared = ("tokenizer=published", "held_out=0.1")
        command(place, "prepare_data", "input=own,old", "weights=0.75,0.25", "output=both_shards", *shared)
        for text in TEXTS:
            command(place, "prepare_data", f"input={text}", f"output={text}_shards", *shared)
        found = {
            "published": evaluated(place, "runs/published"),
            "own text alone": train(place, "alone", "runs/published", "own_shards", given.steps),
            "a quarter of the old": train(place, "replay", "runs/published", "both_shards", given.steps),
            "biases of zero": train(place, "zero", "runs/unbiased", "both_shards", given.steps),
        }
    settings = {"steps": given.steps, "published_steps": given.published_steps, "sequence_length": LENGTH}
    given.output.write_text(json.dumps({"settings": settings, "found": found}, indent=1) + "\n")
    print(given.output.read_text())
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
