"""Continue a text: python launcher/generate.py run=RUN_DIRECTORY prompt=TEXT tokens=N temperature=T

The model is loaded into this one process from the run's newest valid checkpoint, whatever layout wrote it.
speculate=true drafts with the MTP modules and gives the greedy text in fewer passes of the model.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from dsv3_megatron.run.terminal import print_exactly
from launcher.command_line.arguments import Arguments, takes
from launcher.command_line.compose import load_resolved
from launcher.command_line.console import guarded
from launcher.pretrain import prepare_process
from parallel.errors import DataError, RecipeError
from parallel.world import World


class GenerateArguments(Arguments):
    """The keys of this command."""

    run: str = Field(description="run directory to load the model from")
    weights: Literal["trained", "ema"] = Field("trained", description="ema: their average (optim.ema_decay)")
    prompt: str = Field(min_length=1, description="text to go on from")
    tokens: PositiveInt = Field(100, description="tokens to add at most")
    temperature: NonNegativeFloat = Field(0.8, description="0 = always the likeliest token")
    top_p: float = Field(1.0, gt=0, le=1, description="sample from the likeliest tokens of so much probability")
    seed: NonNegativeInt = Field(0, description="of the sampling")
    step: NonNegativeInt | None = Field(None, description="checkpoint to take; null = the newest valid one")
    speculate: bool = Field(False, description="draft with the MTP modules: the greedy text in fewer passes")


@takes(GenerateArguments, __doc__)
def main(given: GenerateArguments) -> int:
    """Print the prompt and its continuation; return the exit code."""
    if given.speculate and given.temperature > 0:
        raise RecipeError(
            f"speculate = true drafts greedy text, but temperature = {given.temperature}; set temperature=0"
        )
    recipe = load_resolved(Path(given.run) / "recipe.yaml")
    prepare_process(recipe, World(0, 1, 0))
    # torch and megatron-core, which read what was prepared
    from dsv3_megatron.inference.generate import continue_tokens
    from dsv3_megatron.inference.speculate import Speculation, speculate_tokens
    from dsv3_megatron.inference.trained_model import trained_model

    with trained_model(recipe, given.run, given.step, given.weights, with_data=False) as model:
        for note in model.notes:
            print(note, file=sys.stderr)
        tokenizer = model.tokenizer
        if tokenizer is None:
            raise DataError(
                f"run = {given.run} was trained on {recipe.data.source} data, which is no text; use data=stdlib"
            )
        prompt = [int(t) for t in tokenizer.encode(given.prompt)]
        counts = Speculation()
        if given.speculate:
            go_on = partial(speculate_tokens, counts=counts)
        else:
            go_on = partial(continue_tokens, temperature=given.temperature, seed=given.seed, top_p=given.top_p)
        window = recipe.data.sequence_length
        made = list(go_on(model.parts, prompt, count=given.tokens, window=window, end=tokenizer.end))
        print_exactly(tokenizer.decode([*prompt, *made]))
        if given.speculate:
            rate = f"{counts.accepted}/{counts.drafted} drafts accepted"
            print(f"{len(made)} tokens in {counts.passes} passes of the model, {rate}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
