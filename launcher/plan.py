"""Know that a run fits, and how fast it will be, before it is submitted; no GPU: python launcher/plan.py recipe=R

    python launcher/plan.py recipe=dsv3_671b cluster=h800_2048       parameters, memory by rank, traffic, step time
    python launcher/plan.py recipe=dsv3_671b --fast                  memory by formulae: seconds instead of a minute
    python launcher/plan.py recipe=dsv3_671b search=true             ranked layouts of the same GPUs; best as a recipe
    python launcher/plan.py recipe=dsv3_671b show=precision          which tensor of every module is in which format
    python launcher/plan.py recipe=dsv3_671b show=regime             what changes over the run, and a plot (svg=FILE)
    python launcher/plan.py recipe=dsv3_671b show=regime at=12.15T  the values in force then

The plan is printed as a table and written to plan.json (output=FILE to choose); report=FILE.html adds a page with the
timeline and memory bars. Exit code 3 when it does not fit. Its own keys:

    world=N            plan for N ranks instead of the whole cluster
    report=FILE.html   timeline of one step and memory by rank, self-contained
    calibrate=FILE     stage times measured on a real GPU instead of the roofline's (docs/planning.md)
    search=true        try hundreds of layouts; top=N rows (20), save=NAME writes recipes/recipe/NAME.yaml
    assume=overlap     as if interleaved and 1F1B hid exchanges behind another microbatch's kernels, as in other
                       frameworks; here DualPipe and DualPipeV alone do
    advice=false       skip the search for overrides that would help

With show=VIEW the keys are show, format (text or json), output (a file), at and svg. All others are overrides of the
recipe.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout runs without being installed

from launcher.console import guarded
from launcher.views.plan import plan_run
from launcher.views.precision import show_precision
from launcher.views.regime import show_regime
from parallel.errors import RecipeError

View = Callable[[Sequence[str], dict[str, str]], str]
VIEWS: dict[str, View] = {"precision": show_precision, "regime": show_regime}
_OF_VIEWS = ("show", "format", "output", "at", "svg")
_OWN = (*_OF_VIEWS, "world", "report", "calibrate", "search", "top", "save", "advice", "assume")


def main(arguments: Sequence[str]) -> int:
    """Print one view; return the exit code."""
    if {"--help", "-h"} & set(arguments):
        print(__doc__)
        return 0
    options, overrides = {}, []
    if "--fast" in arguments:
        options["fast"] = "true"
    for argument in (a for a in arguments if a != "--fast"):
        key, equals, value = argument.partition("=")
        if equals and key in _OWN:
            options[key] = value
        else:
            overrides.append(argument)
    view = options.get("show")
    if view is None:
        return plan_run(overrides, options)
    if view not in VIEWS:
        raise RecipeError(
            f"show = {view} is no view; leave it out for the plan, or write show={' or show='.join(VIEWS)}"
        )
    if options.get("format", "text") not in ("text", "json"):
        raise RecipeError(f"format = {options['format']} is not known; write format=text or format=json")
    text = VIEWS[view](overrides, options)
    if "output" not in options:
        print(text)
        return 0
    try:
        Path(options["output"]).write_text(text + "\n")
    except OSError as error:
        raise RecipeError(f"output = {options['output']} cannot be written ({error.strerror})") from None
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
