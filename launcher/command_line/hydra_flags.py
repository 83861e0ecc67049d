"""The flags Hydra users know: --help, --cfg job, --multirun."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from omegaconf import OmegaConf

from dsv3_megatron.recipe import Recipe
from launcher.command_line.compose import compose, compose_config
from launcher.command_line.help import command_help
from launcher.command_line.multirun import run_many
from parallel.errors import RecipeError

FLAGS = ("--help", "-h", "--cfg", "-c", "--multirun", "-m", "--resolve", "--package", "-p")
_SECTIONS = ", ".join(Recipe.model_fields)
_LONG = {"-h": "--help", "-c": "--cfg", "-m": "--multirun", "-p": "--package"}


def run_command(main: Callable[[Recipe], int | None], arguments: Sequence[str], description: str | None) -> int:
    """Run ``main`` on the recipe that the command line describes, as Hydra users expect; return the exit code.

    ``--cfg job`` prints the configuration, ``--multirun`` runs every combination of ``a=1,2``, ``--help`` teaches.
    Raises: RecipeError: an unknown flag, or one that has no effect beside the others; what the recipe's mistakes are.
    """
    overrides, flags, package = _split(arguments)
    if "--help" in flags:
        print(command_help(description or "", with_recipe=True))
        return 0
    if ineffective := flags & {"--resolve", "--package"} if "--cfg" not in flags else set():
        raise RecipeError(f"{min(ineffective)} has no effect without --cfg job; add that, or leave it out")
    if {"--cfg", "--multirun"} <= flags:
        raise RecipeError("--multirun has no effect beside --cfg, which prints one recipe; leave one of the two out")
    if "--cfg" in flags:
        return _print_config(overrides, "--resolve" in flags, package)
    if "--multirun" in flags:
        return run_many(main, overrides)
    return main(compose(overrides)) or 0


def _split(arguments: Sequence[str]) -> tuple[list[str], set[str], str | None]:
    overrides, flags, package = [], set(), None
    rest = iter(arguments)
    for argument in rest:
        if not argument.startswith("-"):
            overrides.append(argument)
            continue
        name, _, value = argument.partition("=")
        name = _LONG.get(name, name)
        if name not in FLAGS:
            raise RecipeError(
                f"{argument} is not a flag of this command; there are: --help, --cfg job, --multirun, --resolve"
            )
        if name == "--cfg":
            value = value or next(rest, "")
            if value != "job":
                raise RecipeError(f"--cfg = {value or 'nothing'}; write --cfg job, which prints the composed recipe")
        if name == "--package":
            package = value or next(rest, "")
            if not package:
                raise RecipeError("--package = nothing; write --package SECTION, such as --package optim")
        flags.add(name)
    return overrides, flags, package


def _print_config(overrides: Sequence[str], resolve: bool, package: str | None) -> int:
    config = compose_config(overrides)
    if package:
        config = OmegaConf.select(config, package)
        if config is None:
            raise RecipeError(f"--package = {package} is not a section of the recipe; there are: {_SECTIONS}")
    print(OmegaConf.to_yaml(config, resolve=resolve), end="")
    return 0
