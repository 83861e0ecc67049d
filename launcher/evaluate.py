"""Held-out loss of a run, and what it achieves in tasks: python launcher/evaluate.py run=RUN_DIRECTORY [data=SHARDS]

Prints loss in nats per token, of all sources and of each, for text bits per byte, and for every MTP depth how often its
token is the model's own choice. Loads the newest valid checkpoint into one process. data= names other text than the
run's own: a folder that prepare_data.py wrote with the same tokenizer, whose held-out documents are taken. tasks= names
files of multiple-choice tasks (docs/evaluation.md).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveInt

from dsv3_megatron.data.settings import DataSettings
from dsv3_megatron.data.tasks.settings import EvaluateSettings
from dsv3_megatron.recipe import Recipe
from launcher.command_line.arguments import Arguments, takes
from launcher.command_line.compose import load_resolved
from launcher.command_line.console import guarded
from launcher.pretrain import prepare_process
from parallel.world import World


def _files(words: object) -> object:
    """Return the names of ``[A,B]`` or ``A,B``."""
    if not isinstance(words, str):
        return words
    return tuple(name.strip() for name in words.removeprefix("[").removesuffix("]").split(",") if name.strip())


class EvaluateArguments(Arguments):
    """The keys of this command."""

    run: str = Field(description="run directory to load the model from")
    data: str | None = Field(None, description="token shards whose held-out text to take; null = the run's own")
    weights: Literal["trained", "ema"] = Field("trained", description="ema: their average (optim.ema_decay)")
    step: NonNegativeInt | None = Field(None, description="checkpoint to take; null = the newest valid one")
    tasks: Annotated[tuple[str, ...], BeforeValidator(_files)] | None = Field(
        None, description="files of tasks: [A.jsonl,B.jsonl]; null = the run's own (evaluate.tasks)"
    )
    examples: PositiveInt | None = Field(None, description="of each task, the first so many; null = all")


@takes(EvaluateArguments, __doc__)
def main(given: EvaluateArguments) -> int:
    """Print the held-out losses, and what tasks came to, as one JSON object; return the exit code."""
    recipe = on_data(load_resolved(Path(given.run) / "recipe.yaml"), given.data)
    recipe.data.check_source()
    wanted = recipe.evaluate if given.tasks is None else EvaluateSettings(tasks=given.tasks)
    wanted = wanted.model_copy(update={"every_steps": 0, "examples": given.examples or wanted.examples})
    wanted.check()
    prepare_process(recipe, World(0, 1, 0))
    # torch and megatron-core, which read what was prepared
    from dsv3_megatron.data.source.samples import evaluation_batches
    from dsv3_megatron.data.tasks.requests import read_tasks
    from dsv3_megatron.inference.speculate import acceptance_rates
    from dsv3_megatron.inference.trained_model import trained_model
    from dsv3_megatron.train.callbacks.evaluation import losses
    from dsv3_megatron.train.callbacks.tasks import results_of

    other = given.data is not None
    with trained_model(recipe, given.run, given.step, given.weights, other_data=other) as model:
        for note in model.notes:
            print(note, file=sys.stderr)
        tasks = read_tasks(wanted, model.tokenizer, recipe.data.sequence_length)
        held_out, micro = model.data.held_out, recipe.optim.micro_batch
        values = {"step": model.progress["step"], **losses(model.parts, held_out, model.data.held_out_bytes())}
        if tasks:
            values["tasks"] = {result.task: result.values() for result in results_of(model.parts, tasks) or ()}
        if depths := recipe.model.num_nextn_predict_layers:
            batches = evaluation_batches(held_out, count=held_out.count, micro_batch=micro, dp_rank=0, dp=1)
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
