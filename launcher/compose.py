"""Hydra composition -> Recipe. Every mistake becomes one line that names the field, the value and the mend.

Nothing here imports torch: a typing mistake is answered in a second or two, before any process group exists.
"""

from __future__ import annotations

import difflib
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from dsv3_megatron.recipe import Recipe
from parallel.errors import RecipeError

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
GROUPS = ("recipe", "model", "parallel", "precision", "optim", "data", "cluster", "logging")
DEFAULT_RECIPE = "dsv3_tiny"


def compose(overrides: Sequence[str]) -> Recipe:
    """Return the recipe that ``key=value`` overrides describe, checked.

    Raises: RecipeError, LayoutError: one line naming the field, the value and the mend.
    """
    return build(compose_config(overrides))


def compose_config(overrides: Sequence[str]) -> DictConfig:
    """Return what Hydra makes of the overrides, before types are checked. ``recipe=FILE.yaml`` begins with a resolved
    recipe, such as a run directory's."""
    overrides = [override.strip() for override in overrides]
    stored = [o for o in overrides if o.startswith("recipe=") and o.endswith((".yaml", ".yml"))]
    if stored:
        return _from_file(Path(stored[-1].partition("=")[2]), [o for o in overrides if o not in stored])
    overrides = [_checked(override) for override in overrides]
    GlobalHydra.instance().clear()
    try:
        with warnings.catch_warnings(), initialize_config_dir(str(RECIPES), version_base="1.3"):
            warnings.simplefilter("ignore")
            return hydra_compose("pretrain", overrides=overrides)
    except MissingConfigException as error:
        raise _missing_config(error, overrides) from None
    except Exception as error:  # Hydra raises kinds of its own, ValueError and TypeError alike for what was typed
        raise _hydra_error(error) from None


def _from_file(path: Path, overrides: list[str]) -> DictConfig:
    """Return a resolved recipe with overrides: groups take the place of sections, then keys are set."""
    config = OmegaConf.create(load_resolved(path).model_dump(mode="json"))
    keys = [_checked(o) for o in overrides if o.partition("=")[0] not in GROUPS]
    groups = [o.partition("=")[0] for o in overrides if o.partition("=")[0] in GROUPS]
    if groups:
        chosen = compose_config([o for o in overrides if o.partition("=")[0] in GROUPS])
        for group in groups:
            config[group] = OmegaConf.to_container(chosen[group], resolve=True)
    given = {}
    for override in OverridesParser.create().parse_overrides(keys):
        given[override.get_key_element().lstrip("+~")] = None if override.is_delete() else override.value()
    if "run.name" in given:
        given.setdefault("run.directory", f"runs/{given['run.name']}")
    for key, value in given.items():
        OmegaConf.update(config, key, value, force_add=True)
    return config


def build(config: DictConfig | dict[str, Any]) -> Recipe:
    """Return the typed, checked recipe of a composed configuration."""
    try:
        plain = OmegaConf.to_container(config, resolve=True) if isinstance(config, DictConfig) else config
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
    return OmegaConf.to_yaml(OmegaConf.create(recipe.model_dump(mode="json")))


def load_resolved(path: Path) -> Recipe:
    """Return the recipe stored in a run directory.

    Raises: RecipeError: there is none, or it does not validate.
    """
    if not path.is_file():
        raise RecipeError(
            f"{path} does not exist; name the directory of a run that was started by launcher/pretrain.py"
        )
    try:
        return build(OmegaConf.load(path))
    except (OmegaConfBaseException, ValueError) as error:
        raise RecipeError(f"{path} cannot be read ({_first_line(error)}); restore it or start a new run") from None


def options(group: str) -> list[str]:
    """Return the names a recipe group offers: the files of its folder."""
    return sorted(path.stem for path in (RECIPES / group).glob("*.yaml"))


def _checked(override: str) -> str:
    """Return the override as Hydra takes it, or refuse what Hydra would answer with a page.

    A key that the recipe has but no file mentions gets Hydra's ``++``: users need not know which keys files set.
    """
    if "=" not in override and not override.startswith("~"):
        raise RecipeError(f"{override!r} is not an override; write key=value, such as run.steps=100")
    try:
        OverridesParser.create().parse_override(override)
    except HydraException as error:
        raise RecipeError(f"{override} cannot be read ({_first_line(error)}); quote or close its value") from None
    key, _, value = override.partition("=")
    key = key.lstrip("+~").split("@")[0]
    if key in GROUPS:
        if value and not re.search(r"[,{\[$(*]", value) and value not in options(key):
            raise RecipeError(f"{key} = {value} is not one of recipes/{key}/; {_nearest(value, options(key))}")
        return override
    if key.startswith("hydra"):
        return override
    _check_key(key)
    return override if override.startswith("~") else "++" + override.lstrip("+")


def _check_key(key: str) -> None:
    """Refuse a dotted key that no section of the recipe has, naming the nearest that exists."""
    section: Any = Recipe
    parts = key.split(".")
    for depth, part in enumerate(parts):
        fields = _fields_of(section)
        if fields is None:  # a list, a mapping or a plain value: pydantic judges what is below it
            return
        if part not in fields:
            raise RecipeError(f"{key} is not a key of a recipe; {_nearest_key(parts, depth, fields)}")
        section = fields[part].annotation


def _fields_of(annotation: Any) -> dict[str, Any] | None:
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate.model_fields
    return None


def all_keys(section: Any = Recipe, prefix: str = "") -> Iterator[str]:
    """Yield every dotted key a recipe has."""
    for name, field in (_fields_of(section) or {}).items():
        yield prefix + name
        yield from all_keys(field.annotation, f"{prefix}{name}.")


def _nearest_key(parts: list[str], depth: int, fields: dict[str, Any]) -> str:
    near = difflib.get_close_matches(parts[depth], fields, n=1, cutoff=0.6)
    if near:
        return f"did you mean {'.'.join([*parts[:depth], near[0]])}?"
    last = parts[-1]
    elsewhere = [key for key in all_keys() if key.split(".")[-1] == last]
    leaves = [key for key in all_keys() if "." in key]
    elsewhere = elsewhere or difflib.get_close_matches(".".join(parts), leaves, n=1, cutoff=0.75)
    if elsewhere:
        return f"did you mean {elsewhere[0]}?"
    return f"it can be one of: {', '.join(fields)}"


def _nearest(value: str, choices: Sequence[str]) -> str:
    near = difflib.get_close_matches(value, choices, n=1, cutoff=0.4)
    return (f"did you mean {near[0]}? " if near else "") + f"there are: {', '.join(choices)}"


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _missing_config(error: MissingConfigException, overrides: Sequence[str]) -> RecipeError:
    return RecipeError(f"{error.missing_cfg_file} is not a file of recipes/ ({' '.join(overrides)}); see recipes/")


def _hydra_error(error: Exception) -> RecipeError:
    """Return Hydra's or OmegaConf's complaint as one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    cause = error.__cause__
    if cause is not None and str(cause).strip() and not isinstance(cause, RecipeError):
        lines.append(_first_line(cause))
    key = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("full_key:")), None)
    what = " ".join(
        line for line in lines if not line.startswith(("full_key:", "object_type=", "See http", "To append"))
    )
    return RecipeError(f"{key + ': ' if key else ''}{what}; write key=value with a key of the recipe (see --help)")


def _validation_error(error: ValidationError) -> RecipeError:
    """Return the first of pydantic's complaints as one line: key, value, why, how many more."""
    details = error.errors()
    # A union (a number or phases) complains once per alternative: the deepest place is the one the user wrote.
    first = max(details, key=lambda d: len(d["loc"])) if details[0]["loc"][:1] == ("optim",) else details[0]
    # A union's alternative shows as a pseudo-step such as 'tuple[Phase, ...]' in the place of the complaint.
    names = [p for p in first["loc"] if isinstance(p, int) or (re.fullmatch(r"\w+", p) and p not in ("float", "int"))]
    key = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in names).lstrip(".")
    value = first["input"]
    if first["type"] == "extra_forbidden":
        parts = [str(p) for p in names]
        section: Any = Recipe
        for depth, part in enumerate(parts):
            fields = _fields_of(section)
            if fields is None:
                return RecipeError(f"{key} is not a key of a recipe; remove it")
            if part not in fields:
                return RecipeError(f"{key} is not a key of a recipe; {_nearest_key(parts, depth, fields)}")
            section = fields[part].annotation
    shown = "null" if value is None else str(value) if not isinstance(value, dict) else "{...}"
    why = first["msg"].removeprefix("Value error, ")
    why = why[:1].lower() + why[1:]
    extra = " (it was not given)" if first["type"] == "missing" else ""
    return RecipeError(f"{key}{extra} = {shown[:80]!s}: {why}; see docs/recipes.md for what it may be")


def run_command(main: Callable[[Recipe], int | None], argv: Sequence[str], description: str) -> int:
    """Run ``main`` on the recipe that the command line describes, as Hydra users expect; return the exit code.

    ``--cfg job`` prints the configuration, ``--multirun`` runs every combination of ``a=1,2``, ``--help`` teaches.
    """
    arguments = list(argv)
    flags = [a for a in arguments if a.startswith("-")]
    if not flags:
        return main(compose(arguments)) or 0
    from launcher.hydra_flags import run_flags

    return run_flags(main, arguments, description)


def ensure_importable() -> None:
    """Make the repository's packages importable when a command is run from a checkout that is not installed."""
    root = str(RECIPES.parent)
    if root not in sys.path:
        sys.path.insert(0, root)
