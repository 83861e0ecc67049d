"""DeepSeek-V3's routing and MTP beside the article's variant, trained on the same tokens.

    python -m benchmarks.routing_and_mtp [steps=200] [directory=runs/routing_and_mtp] [output=FILE.json] [plot=FILE.svg]

Trains recipe=dsv3_tiny and recipe=dsv3_article_tiny on the Python standard library's source, the same samples in the
same order, then reads their metrics and measures on held-out text how often the MTP modules' drafts would be accepted:
draft k at position i is what depth k predicts for token i + k + 1 when all tokens before it are given, and it counts
as accepted where the main model, given the same tokens, would have chosen that token too. Chained acceptance asks the
same of every shallower depth.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
from pydantic import BaseModel, Field, PositiveInt

from benchmarks.routing_table import plot, table
from launcher.command_line.arguments import parse_arguments
from launcher.command_line.compose import load_resolved
from launcher.command_line.console import guarded

VARIANTS = {"published": "dsv3_tiny", "article": "dsv3_article_tiny"}
LAST = 20  # steps over which the end of a run is averaged


class Arguments(BaseModel):
    """What the benchmark takes."""

    steps: PositiveInt = 200
    directory: str = "runs/routing_and_mtp"
    output: str = "benchmarks/results/routing_and_mtp.json"
    plot: str = Field("docs/img/routing_and_mtp.svg")


def train(recipe: str, directory: Path, steps: int) -> list[dict[str, Any]]:
    """Train one variant (or go on from where it stands) and return its metrics."""
    command = [sys.executable, "launcher/pretrain.py", f"recipe={recipe}", f"run.directory={directory}"]
    command += [f"run.steps={steps}", "logging.wandb=disabled", "logging.console_every_steps=20"]
    subprocess.run(command, cwd=ROOT, check=True)
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def acceptance(directory: Path) -> tuple[list[float], list[float]]:
    """Return by MTP depth how often drafts agree with the main model: alone, and with all shallower ones."""
    import torch

    from dsv3_megatron.data.source.samples import make_batch
    from dsv3_megatron.inference.trained_model import trained_model

    with trained_model(load_resolved(directory / "recipe.yaml"), directory) as trained, torch.no_grad():
        model, depths = trained.parts.whole_model.eval(), trained.parts.recipe.model.num_nextn_predict_layers
        states = []
        handle = model.mtp.register_forward_hook(lambda module, inputs, output: states.append(output))
        agreed, chained, counted = torch.zeros(depths), torch.zeros(depths), torch.zeros(depths)
        for number in range(trained.data.held_out.count):
            batch = make_batch([trained.data.held_out.sample(number)])
            model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
            main, *drafts = (model.output_layer(s)[0].argmax(-1)[:, 0] for s in states.pop().chunk(1 + depths))
            together = torch.ones(len(main), dtype=torch.bool)
            for depth, draft in enumerate(drafts, 1):
                same = torch.zeros_like(together)
                same[:-depth] = draft[:-depth] == main[depth:]
                together &= same
                agreed[depth - 1] += same.sum()
                chained[depth - 1] += together.sum()
                counted[depth - 1] += len(main) - depth
        handle.remove()
    return (agreed / counted).tolist(), (chained / counted).tolist()


def measure(name: str, recipe: str, given: Arguments) -> dict[str, Any]:
    """Return what one variant did."""
    directory = Path(given.directory) / name
    lines = train(recipe, directory, given.steps)
    summary = json.loads((directory / "summary.json").read_text())
    alone, chained = acceptance(directory)
    end = lines[-LAST:]

    def at_the_end(key: str) -> float:
        return sum(line[key] or 0 for line in end) / len(end)

    recipe_used = load_resolved(directory / "recipe.yaml")
    model, data = recipe_used.model, recipe_used.data
    layers = model.num_moe_layers + model.num_nextn_predict_layers
    choices = end[-1]["global_batch"] * data.sequence_length * layers * model.num_experts_per_tok
    return {
        "recipe": recipe,
        "steps": given.steps,
        "tokens": lines[-1]["tokens"],
        "held_out_loss": summary["after"]["held_out_loss"],
        "bits_per_byte": summary["after"]["bits_per_byte"],
        "lm_loss": at_the_end("lm_loss"),
        "mtp_loss": at_the_end("mtp_loss"),
        "max_violation": at_the_end("max_violation"),
        "max_violation_running": lines[-1]["max_violation_running"],
        "rerouted": at_the_end("rerouted_choices") / choices,
        "dropped": at_the_end("dropped_choices") / choices,
        "acceptance": alone,
        "acceptance_chained": chained,
        "curves": {k: [line[k] for line in lines] for k in ("lm_loss", "max_violation", "max_violation_running")},
    }


def main(arguments: list[str]) -> int:
    """Train, measure, write and print."""
    given = parse_arguments(Arguments, arguments)
    found = {name: measure(name, recipe, given) for name, recipe in VARIANTS.items()}
    Path(given.output).write_text(json.dumps(found, indent=1))
    plot(found, given.plot)
    print(table(found, LAST))
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
