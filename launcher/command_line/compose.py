"""Hydra composition -> Recipe. Every mistake becomes one line that names the field, the value and the fix.

Nothing here imports torch: a typing mistake is answered in a second or two, before any process group exists.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from dsv3_megatron.recipe import Recipe
from dsv3_megatron.run.reasons import first_line
from dsv3_megatron.run.recipe_text.interpolations import check_interpolations, escaped
from dsv3_megatron.run.recipe_text.stored import read_stored_recipe
from launcher.command_line.overrides import quoted
from launcher.command_line.recipe_files import (
    GROUPS,
    RECIPES,
    files_of,
    install_file_source,
    options,
    own_folders,
    read_recipe_file,
)
from launcher.command_line.schema import dotted, nearest, unknown_key
from parallel.errors import RecipeError

SEARCHPATH = "hydra.searchpath"  # Hydra's own key: further folders of recipe files
DEFAULT_RECIPE = "dsv3_tiny"
_DEPTH = 32  # of what is typed


def compose(overrides: Sequence[str]) -> Recipe:
    """Return the recipe that ``key=value`` overrides describe, checked.

    Raises: RecipeError, LayoutError: one line naming the field, the value and the fix.
    """
    return build(compose_config(overrides))


def compose_config(overrides: Sequence[str]) -> DictConfig:
    """Return what Hydra makes of the overrides, before types are checked. ``recipe=FILE.yaml`` begins with a resolved
    recipe, such as a run directory's."""
    overrides = [override.strip() for override in overrides]
    stored = [o for o in overrides if o.startswith("recipe=") and o.endswith((".yaml", ".yml"))]
    if stored:
        return _from_file(Path(stored[-1].partition("=")[2]), [o for o in overrides if o not in stored])
    folders = own_folders(_searchpath(overrides))
    for file in files_of(folders):
        read_recipe_file(file)  # a file that this recipe does not take may be the next one's
    overrides = [_checked(override, folders) for override in overrides]
    if folders:
        overrides = _with_searchpath(overrides, folders)
    GlobalHydra.instance().clear()
    install_file_source()
    try:
        with warnings.catch_warnings(), initialize_config_dir(str(RECIPES), version_base="1.3"):
            warnings.simplefilter("ignore")
            return _harmless(hydra_compose("pretrain", overrides=overrides))
    except MissingConfigException as error:
        raise _missing_config(error, overrides) from None
    except Exception as error:  # Hydra raises kinds of its own, ValueError and TypeError alike for what was typed
        raise _hydra_error(error) from None


def _searchpath(overrides: Sequence[str]) -> list[str]:
    """Return the places that the user gave as ``hydra.searchpath``."""
    places: list[str] = []
    for override in overrides:
        if override.partition("=")[0].lstrip("+") == SEARCHPATH:
            value = parsed_override(override).value()
            places = [str(place).strip("'\"") for place in (value if isinstance(value, list) else [value])]
    return places


def _with_searchpath(overrides: Sequence[str], folders: Sequence[Path]) -> list[str]:
    """Return overrides that let Hydra find the files of ``folders`` and the packages of the user's search path."""
    packages = [place for place in _searchpath(overrides) if not place.startswith("file://")]
    places = ",".join(quoted(place) for place in (*(f"file://{folder}" for folder in folders), *packages))
    others = [override for override in overrides if override.partition("=")[0].lstrip("+") != SEARCHPATH]
    return [*others, f"{SEARCHPATH}=[{places}]"]


def _from_file(path: Path, overrides: list[str]) -> DictConfig:
    """Return a resolved recipe with overrides: groups take the place of sections, then keys are set."""
    config = OmegaConf.create(escaped(load_resolved(path).model_dump(mode="json")))
    of_hydra = [o for o in overrides if o.partition("=")[0].lstrip("+") in (*GROUPS, SEARCHPATH)]
    keys = [_checked(o) for o in overrides if o not in of_hydra]
    groups = [o.partition("=")[0] for o in of_hydra]
    if groups:
        chosen = compose_config(of_hydra)
        for group in (g for g in groups if g in GROUPS):
            config[group] = escaped(OmegaConf.to_container(chosen[group], resolve=True))
    given = {}
    for override in OverridesParser.create().parse_overrides(keys):
        given[override.get_key_element().lstrip("+~")] = None if override.is_delete() else override.value()
    if "run.name" in given:
        given.setdefault("run.directory", f"runs/{given['run.name']}")
    for key, value in given.items():
        OmegaConf.update(config, key, value, force_add=True)
    return _harmless(config)


def _look_at(key: str, content: object) -> None:
    try:
        check_interpolations(content, key)
    except ValueError as error:
        raise RecipeError(str(error)) from None


def _harmless(config: DictConfig) -> DictConfig:
    """Return the configuration, or refuse it where it refers to what may be secret."""
    _look_at("", OmegaConf.to_container(config, resolve=False))
    return config


def build(config: DictConfig | ListConfig | dict[str, Any]) -> Recipe:
    """Return the typed, checked recipe of a composed configuration."""
    try:
        plain = OmegaConf.to_container(config, resolve=True) if OmegaConf.is_config(config) else config
    except OmegaConfBaseException as error:
        raise _hydra_error(error) from None
    try:
        recipe = Recipe.model_validate(plain)
    except ValidationError as error:
        raise _validation_error(error) from None
    recipe.check()
    return recipe


def resolved_yaml(recipe: Recipe) -> str:
    """Return the recipe as YAML that :func:`load_resolved` reads back."""
    return OmegaConf.to_yaml(OmegaConf.create(escaped(recipe.model_dump(mode="json"))))


def load_resolved(path: Path) -> Recipe:
    """Return the recipe stored in a run directory.

    Raises: RecipeError: there is none, or it does not validate.
    """
    if not path.exists():
        raise RecipeError(
            f"{path} does not exist; name the directory of a run that was started by launcher/pretrain.py"
        )
    try:
        content = read_stored_recipe(path)
    except OSError as error:
        raise RecipeError(f"{path} cannot be read ({error.strerror}); restore it or start a new run") from None
    except ValueError as error:
        raise RecipeError(f"{error}; restore it or start a new run") from None
    return build(content)


def _checked(override: str, folders: Sequence[Path] = ()) -> str:
    """Return the override as Hydra takes it, or refuse what Hydra would answer with a page.

    A key that the recipe has but no file mentions gets Hydra's ``++``: users need not know which keys files set.
    ``folders``: of recipe files, beside the shipped ones.
    """
    if "=" not in override and not override.startswith("~"):
        raise RecipeError(f"{override!r} is not an override; write key=value, such as run.steps=100")
    parsed_override(override)
    key, _, value = override.partition("=")
    key = key.lstrip("+~").split("@")[0]
    if key in GROUPS:
        _look_at(key, value)
        offered = options(key, folders)
        if value and not re.search(r"[,{\[$(*]", value) and value not in offered:
            hint = f"{nearest(value, offered)}there are: {', '.join(offered)}"
            raise RecipeError(f"{key} = {value} is not one of recipes/{key}/; {hint}")
        return override
    if key == SEARCHPATH:
        return override
    if key.startswith("hydra"):
        raise RecipeError(f"{key} has no effect here: of Hydra's own keys {SEARCHPATH} alone is read; leave it out")
    if said := unknown_key(Recipe, key.split(".")):
        raise RecipeError(f"{key} is not a key of a recipe; {said}")
    return override if override.startswith("~") else "++" + override.lstrip("+")


def parsed_override(override: str) -> Override:
    """Return what Hydra reads in one word. Raises RecipeError: it cannot be read."""
    deepest = max(accumulate((letter in "[{(") - (letter in "]})") for letter in override), default=0)
    if deepest > _DEPTH:  # Hydra's parser calls itself for each
        key = override.partition("=")[0][:80]
        raise RecipeError(f"{key} holds lists and mappings more than {_DEPTH} deep in each other; write a flatter one")
    try:
        return OverridesParser.create().parse_override(override)
    except (HydraException, ValueError) as error:  # of a number with thousands of digits
        raise RecipeError(f"{override[:200]} cannot be read ({first_line(error)}); quote or close its value") from None


def _missing_config(error: MissingConfigException, overrides: Sequence[str]) -> RecipeError:
    return RecipeError(f"{error.missing_cfg_file} is not a file of recipes/ ({' '.join(overrides)}); see recipes/")


def _hydra_error(error: Exception) -> RecipeError:
    """Return Hydra's or OmegaConf's complaint as one line; one of ours that came through them as it is."""
    ours: BaseException | None = error
    while ours is not None:
        if isinstance(ours, RecipeError):
            return ours
        ours = ours.__cause__ or ours.__context__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    cause = error.__cause__
    if cause is not None and str(cause).strip() and not isinstance(cause, RecipeError):
        lines.append(first_line(cause))
    key = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("full_key:")), None)
    what = " ".join(
        line for line in lines if not line.startswith(("full_key:", "object_type=", "See http", "To append"))
    )
    return RecipeError(f"{key + ': ' if key else ''}{what}; write key=value with a key of the recipe (see --help)")


def _validation_error(error: ValidationError) -> RecipeError:
    """Return the first of pydantic's complaints as one line: key, value, why, how many more."""
    details = error.errors()
    # A union (a number or phases) complains once per alternative: the deepest place is the one the user wrote.
    deepest = max(details, key=lambda d: len(d["loc"])) if details[0]["loc"][:1] == ("optim",) else details[0]
    # A misspelt key explains another that is missing.
    first = next((d for d in details if d["type"] == "extra_forbidden"), deepest)
    # A union's alternative shows as a pseudo-step such as 'tuple[Phase, ...]' in the place of the complaint.
    names = [p for p in first["loc"] if isinstance(p, int) or (re.fullmatch(r"\w+", p) and p not in ("float", "int"))]
    key, value = dotted(names), first["input"]
    if first["type"] == "extra_forbidden":
        return RecipeError(f"{key} is not a key of a recipe; {unknown_key(Recipe, names) or 'remove it'}")
    shown = "null" if value is None else str(value) if not isinstance(value, dict) else "{...}"
    why = first["msg"].removeprefix("Value error, ")
    why = why[:1].lower() + why[1:]
    extra = " (it was not given)" if first["type"] == "missing" else ""
    return RecipeError(f"{key}{extra} = {shown[:80]!s}: {why}; see docs/recipes.md for what it may be")
