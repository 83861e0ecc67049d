"""Know that a run fits, and how fast it will be, before it is submitted; no GPU: python launcher/plan.py recipe=R

    python launcher/plan.py recipe=dsv3_671b cluster=h800_2048       parameters, memory by rank, traffic, step time
    python launcher/plan.py recipe=dsv3_671b --fast                  memory by formulae: seconds instead of a minute
    python launcher/plan.py recipe=dsv3_671b search=true             ranked layouts of the same GPUs; best as a recipe
    python launcher/plan.py recipe=dsv3_671b show=precision          which tensor of every module is in which format
    python launcher/plan.py recipe=dsv3_671b show=optimizer          what updates which parameter, and the states kept
    python launcher/plan.py recipe=dsv3_671b show=regime             what changes over the run, and a plot (svg=FILE)
    python launcher/plan.py recipe=dsv3_671b show=regime at=12.15T  the values in force then

The plan is printed as a table and written to plan.json (output=FILE to choose); report=FILE.html adds a page with the
timeline and memory bars. Exit code 3 when it does not fit. The keys below are its own, all others are overrides of the
recipe; a key that would have no effect beside another is refused.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveInt, model_validator

from dsv3_megatron.planning.memory.formulae import estimate_stages
from dsv3_megatron.planning.plan import Plan, make_plan
from dsv3_megatron.planning.time.calibrate import times_from_file
from dsv3_megatron.preflight.layout import check_layout, world_of
from dsv3_megatron.recipe import Recipe
from launcher.command_line.arguments import Arguments, takes_recipe
from launcher.command_line.compose import compose
from launcher.command_line.console import guarded
from launcher.command_line.output import print_or_write, write_output
from launcher.views.optimizer import show_optimizer
from launcher.views.plan import text_of
from launcher.views.plan_report import html_of
from launcher.views.precision import show_precision
from launcher.views.regime import show_regime
from launcher.views.search import search_run
from parallel.layout import MOST_RANKS
from parallel.units import parse_count

_PLAN = {"world", "fast", "output", "report", "calibrate", "assume", "advice"}
_EFFECTIVE = {  # what is asked for -> the keys that have an effect there
    "search=true": {"search", "world", "top", "save"},
    "show=precision": {"show", "format", "output"},
    "show=optimizer": {"show", "format", "output"},
    "show=regime": {"show", "format", "output", "at", "svg"},
    "the plan": _PLAN,
}


class PlanArguments(Arguments):
    """Keys of the command."""

    world: PositiveInt | None = Field(None, le=MOST_RANKS, description="plan for N ranks instead of the whole cluster")
    fast: bool = Field(False, description="memory by formulae, in seconds")
    output: Path | None = Field(None, description="file to write; null = plan.json, and stdout with show=")
    report: Path | None = Field(None, description="HTML page to write: timeline of one step, memory by rank")
    calibrate: Path | None = Field(
        None, description="stage times measured on a real GPU instead of the roofline's (docs/planning.md)"
    )
    assume: Literal["overlap"] | None = Field(
        None,
        description="overlap: as if interleaved and 1F1B hid exchanges behind another microbatch's kernels, as in "
        "other frameworks; here DualPipe and DualPipeV alone do",
    )
    advice: bool = Field(True, description="search for overrides that would help")
    search: bool = Field(False, description="try hundreds of layouts, by formulae")
    top: PositiveInt = Field(20, le=10_000, description="rows of the search's table")
    save: str | None = Field(
        None, pattern=r"^\w[\w.-]*$", description="recipe to write as: recipes/recipe/NAME.yaml; null = a file here"
    )
    show: Literal["precision", "optimizer", "regime"] | None = Field(None, description="another view than the plan")
    format: Literal["text", "json"] = Field("text", description="of what show= shows")
    at: Annotated[NonNegativeInt, BeforeValidator(parse_count)] | None = Field(
        None, description="show=regime: the values in force after so many tokens, such as 12.15T"
    )
    svg: Path | None = Field(None, description="show=regime: file of the plot; null = NAME_regime.svg")

    @model_validator(mode="after")
    def _each_has_an_effect(self) -> PlanArguments:
        asked = "search=true" if self.search else f"show={self.show}" if self.show else "the plan"
        given = {name for name in self.model_fields_set if getattr(self, name) != type(self).model_fields[name].default}
        if idle := sorted(given - _EFFECTIVE[asked]):
            belongs = [name for name, keys in _EFFECTIVE.items() if idle[0] in keys]
            raise ValueError(
                f"{idle[0]} has no effect beside {asked}; leave it out, it belongs to {' and '.join(belongs)}"
            )
        if self.svg is not None and (self.at is not None or self.format == "json"):
            raise ValueError("svg has no effect beside at and format=json, which draw no plot; leave one of them out")
        return self


@takes_recipe(PlanArguments, __doc__)
def main(given: PlanArguments, overrides: list[str]) -> int:
    """Print one view; return the exit code."""
    recipe = compose(overrides)
    if given.show == "precision":
        print_or_write(show_precision(recipe, as_json=given.format == "json"), given.output)
        return 0
    if given.show == "optimizer":
        print_or_write(show_optimizer(recipe, as_json=given.format == "json"), given.output)
        return 0
    if given.show == "regime":
        text = show_regime(recipe, as_json=given.format == "json", at=given.at, svg=given.svg)
        print_or_write(text, given.output)
        return 0
    warnings.filterwarnings("ignore")
    if given.search:  # the recipe's own layout need not be possible there
        return search_run(recipe, given.world, overrides, top=given.top, save=given.save)
    return show_plan(plan_of(recipe, given), given)


def plan_of(recipe: Recipe, given: PlanArguments) -> Plan:
    """Return the plan that was asked for."""
    world = world_of(recipe, given.world)
    check_layout(recipe, world)
    return make_plan(
        recipe,
        world,
        measure=estimate_stages if given.fast else None,
        times=times_from_file(given.calibrate, recipe) if given.calibrate else None,
        overlap=given.assume == "overlap",
    )


def show_plan(plan: Plan, given: PlanArguments) -> int:
    """Print a plan and write its files; return 0, or 3 when it does not fit."""
    if given.assume:
        print("assume=overlap: planned as if every backward of the steady phase ran beside a forward")
    print("\n".join(text_of(plan, advise=given.advice)))
    write_output(given.output or Path("plan.json"), json.dumps(plan.as_json(), indent=1) + "\n", "output")
    if given.report is not None:
        write_output(given.report, html_of(plan), "report")
    return 0 if plan.fits else 3


if __name__ == "__main__":
    sys.exit(guarded(main))
