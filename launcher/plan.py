"""Know a recipe before it runs; no GPU: python launcher/plan.py recipe=R show=VIEW [key=value ...]

    python launcher/plan.py recipe=dsv3_671b show=precision     which tensor of every module is in which format
    python launcher/plan.py recipe=dsv3_tiny show=precision precision=fp8 format=json
    python launcher/plan.py recipe=dsv3_671b show=regime        what changes over the run, and a plot (svg=FILE)
    python launcher/plan.py recipe=dsv3_671b show=regime at=12.15T format=json      the values in force then

Keys of its own are show, at, svg, format (text or json) and output (a file); all others are overrides of the recipe.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout runs without being installed

from launcher.console import guarded
from launcher.views.precision import show_precision
from launcher.views.regime import show_regime
from parallel.errors import RecipeError

View = Callable[[Sequence[str], dict[str, str]], str]
VIEWS: dict[str, View] = {"precision": show_precision, "regime": show_regime}
_OWN = ("show", "format", "output", "at", "svg")


def main(arguments: Sequence[str]) -> int:
    """Print one view; return the exit code."""
    if {"--help", "-h"} & set(arguments):
        print(__doc__)
        return 0
    options, overrides = {}, []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if equals and key in _OWN:
            options[key] = value
        else:
            overrides.append(argument)
    view = options.get("show")
    if view not in VIEWS:
        raise RecipeError(f"show = {view} is no view; write show={' or show='.join(VIEWS)}")
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
