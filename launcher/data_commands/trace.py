"""Which documents a step of a run has read, by name: python launcher/data.py trace run=RUN_DIRECTORY step=N

    python launcher/data.py trace run=runs/mine step=12000              the documents of a step
    python launcher/data.py trace run=runs/mine tokens=1.2T text=true   of the step that goes on from there, with text
    python launcher/data.py trace run=runs/mine sequence=98304          of one sequence, by its sample number
    python launcher/data.py trace recipe=mine data.path=shards step=1   before there is a run: what it would read

Prints a JSON object for each stretch of a document, in the order in which the step reads them: step, sample, source,
file and row of the input, shard and document in it, offset and length in tokens, at (place in the sequence),
rearranged (fill-in-the-middle), excluded. Such lines are what data.exclude=FILE takes. With run= the recipe is the one
that the step was done with, and data.path=FOLDER says where its shards are now; other keys are overrides of a recipe,
for which there is no run.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveInt, model_validator

from launcher.command_line.arguments import Arguments, takes_recipe
from launcher.command_line.compose import compose, load_resolved
from launcher.command_line.console import guarded
from parallel.errors import RecipeError
from parallel.units import parse_count

_COMMANDS_A_TERMINAL = re.compile(r"[\x7f-\x9f\u2028\u2029]")  # JSON escapes those below itself


class TraceArguments(Arguments):
    """Keys of the command."""

    run: Path | None = Field(None, description="run directory; null = a run of the recipe that the other keys make")
    step: PositiveInt | None = Field(None, description="step whose documents to name, from 1")
    tokens: Annotated[NonNegativeInt, BeforeValidator(parse_count)] | None = Field(
        None, description="the step that begins after so many tokens or fewer and ends after more, such as 1.2T"
    )
    sequence: Annotated[NonNegativeInt, Field(lt=1 << 48)] | None = Field(
        None, description="number of one sample, from 0"
    )
    text: bool = Field(False, description="print the text of each stretch too")

    @model_validator(mode="after")
    def _one_place(self) -> TraceArguments:
        given = [name for name in ("step", "tokens", "sequence") if getattr(self, name) is not None]
        if len(given) != 1:
            said = f"{' and '.join(given)} name several places" if given else "no place is named"
            raise ValueError(f"{said}; give one of step=N, tokens=T and sequence=N")
        return self


@takes_recipe(TraceArguments, __doc__)
def main(given: TraceArguments, overrides: list[str]) -> int:
    """Print the documents; return the exit code."""
    moved = [word for word in overrides if word.startswith("data.path=")]
    if given.run is not None and (others := [word for word in overrides if word not in moved]):
        raise RecipeError(f"{others[0]} has no effect beside run=, whose recipe tells all; leave one of them out")
    recipe = compose(overrides) if given.run is None else load_resolved(given.run / "recipe.yaml")
    recipe.data.check_source()
    # torch, which a refused recipe need not wait for
    from dsv3_megatron.data.exclude import Exclusion, read_exclusion
    from dsv3_megatron.run.directory import RunDirectory
    from dsv3_megatron.tracing.documents import Tracer
    from dsv3_megatron.tracing.history import History, StepRead, foreseen
    from dsv3_megatron.train.progress import Progress

    def in_run(run: Path) -> StepRead:
        history = History(RunDirectory(run), recipe)
        if given.step is not None:
            return history.step(given.step)
        return history.tokens(given.tokens) if given.tokens is not None else history.sample(given.sequence or 0)

    def before_any_run() -> StepRead:
        exclusion = read_exclusion(recipe.data.exclude) if recipe.data.exclude else Exclusion()
        if given.sequence is not None:
            return StepRead(None, recipe, exclusion, [given.sequence])
        return foreseen(recipe, exclusion, Progress(), given.step, given.tokens)

    read = in_run(given.run) if given.run is not None else before_any_run()
    for note in read.notes:
        print(f"note: {note}", file=sys.stderr)
    settings = read.recipe.data
    if given.run is not None and moved:
        settings = settings.model_copy(update={"path": moved[-1].partition("=")[2]})
    seed, vocab_size = read.recipe.run.seed, read.recipe.model.vocab_size
    tracer = Tracer(settings, vocab_size=vocab_size, seed=seed, text=read.text)
    for number in read.numbers:
        for piece in tracer.sample(number, with_text=given.text):
            print(json_line({"step": read.step, "sample": number, **piece}))
    return 0


def json_line(values: dict[str, Any]) -> str:
    """Return an object as a line of JSON in which text stays text, but commands nothing to a terminal."""
    line = json.dumps(values, ensure_ascii=False)
    return _COMMANDS_A_TERMINAL.sub(lambda found: f"\\u{ord(found[0]):04x}", line)


if __name__ == "__main__":
    sys.exit(guarded(main))
