"""Held-out loss of a run: python launcher/evaluate.py run=RUN_DIRECTORY [data=SHARDS]

Prints loss in nats per token, for text bits per byte, and for every MTP depth how often its token is the model's own
choice. Loads the newest valid checkpoint into one process. data= names other text than the
run's own: a folder that prepare_data.py wrote with the same tokenizer, whose held-out documents are taken.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeInt

from dsv3_megatron.data.settings import DataSettings
from dsv3_megatron.recipe import Recipe
from launcher.command_line.arguments import Arguments, takes
from launcher.command_line.compose import load_resolved
from launcher.command_line.console import guarded
from launcher.pretrain import prepare_process
from parallel.world import World


class EvaluateArguments(Arguments):
    """The keys of this command."""

    run: str = Field(description="run directory to load the model from")
    data: str | None = Field(None, description="token shards whose held-out text to take; null = the run's own")
    weights: Literal["trained", "ema"] = Field("trained", description="ema: their average (optim.ema_decay)")
    step: NonNegativeInt | None = Field(None, description="checkpoint to take; null = the newest valid one")


@takes(EvaluateArguments, __doc__)
def main(given: EvaluateArguments) -> int:
    """Print the held-out loss as one JSON object; return the exit code."""
    recipe = on_data(load_resolved(Path(given.run) / "recipe.yaml"), given.data)
    recipe.data.check_source()
    prepare_process(recipe, World(0, 1, 0))
    # torch and megatron-core, which read what was prepared
    from dsv3_megatron.data.source.samples import evaluation_batches
    from dsv3_megatron.inference.speculate import acceptance_rates
    from dsv3_megatron.inference.trained_model import trained_model
    from dsv3_megatron.train.step import evaluate_batches

    other = given.data is not None
    with trained_model(recipe, given.run, given.step, given.weights, other_data=other) as model:
        for note in model.notes:
            print(note, file=sys.stderr)
        micro, count = recipe.optim.micro_batch, model.data.held_out_count
        batches = evaluation_batches(model.data.held_out, count=count, micro_batch=micro, dp_rank=0, dp=1)
        values = {"step": model.progress["step"], "held_out_loss": evaluate_batches(model.parts, batches)}
        if bytes_per_token := model.data.bytes_per_token():
            values["bits_per_byte"] = values["held_out_loss"] / math.log(2) / bytes_per_token
        if depths := recipe.model.num_nextn_predict_layers:
            values["mtp_acceptance"] = acceptance_rates(model.parts.whole_model, batches, depths)
    print(json.dumps(values))
    return 0


def on_data(recipe: Recipe, folder: str | None) -> Recipe:
    """Return a recipe that reads the token shards of a folder, as they are, in sequences of the same length."""
    if folder is None:
        return recipe
    old = recipe.data
    data = DataSettings(source="indexed", path=folder, cache=old.cache, sequence_length=old.sequence_length)
    return recipe.model_copy(update={"data": data})


if __name__ == "__main__":
    sys.exit(guarded(main))
