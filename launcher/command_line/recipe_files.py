"""Where recipe files are: those shipped, and those of the user's own folders."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins import file_config_source
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigLoadError, ConfigResult
from omegaconf import OmegaConf

from dsv3_megatron.run.handed import is_inner, read_bytes, read_text, real_path
from dsv3_megatron.run.recipe_text.interpolations import check_interpolations
from dsv3_megatron.run.recipe_text.yaml_text import YAML_BYTES, read_yaml
from parallel.errors import RecipeError

PACKAGE = Path(__file__).resolve().parent.parent  # launcher/
ROOT = PACKAGE.parent  # of a checkout; else the folder that packages are installed into
IS_CHECKOUT = not (PACKAGE / "recipes").is_dir()
DATA = ROOT if IS_CHECKOUT else PACKAGE  # where recipes/ and dashboards/ lie
RECIPES = DATA / "recipes"
GROUPS = ("recipe", "model", "parallel", "precision", "optim", "data", "cluster", "logging")


def own_folders(searchpath: Sequence[str] = ()) -> list[Path]:
    """Return the folders of recipe files beside the shipped ones: ``./recipes``, and the files of Hydra's searchpath.

    Raises: RecipeError: one of their files has the name of a shipped one and says something else, or a place of
    ``hydra.searchpath`` is no folder.
    """
    here = Path.cwd() / "recipes"
    folders = [here] if any((here / group).is_dir() for group in GROUPS) else []
    for place in searchpath:
        if not place.startswith("file://"):  # a package (pkg://), which Hydra finds by itself
            continue
        folder = Path(place.removeprefix("file://"))
        if not folder.is_dir():
            raise RecipeError(
                f"hydra.searchpath = {place} is no folder; write hydra.searchpath=[file:///FOLDER], whose folders are "
                f"{', '.join(GROUPS)}"
            )
        folders.append(folder)
    folders = [folder for folder in folders if real_path(folder) != RECIPES]
    for file in files_of(folders):
        shipped = RECIPES / file.parent.name / file.name
        if shipped.is_file() and not _is_copy(file, shipped):
            raise RecipeError(f"{file} has the name of a shipped file ({shipped}) and differs; rename it")
    return folders


def _is_copy(file: Path, shipped: Path) -> bool:
    try:
        return read_bytes(file, YAML_BYTES) == shipped.read_bytes()
    except (OSError, ValueError):
        return False


def files_of(folders: Sequence[Path]) -> Iterator[Path]:
    """Yield the recipe files of folders, group by group."""
    for folder in folders:
        for group in GROUPS:
            yield from sorted((folder / group).glob("*.yaml"))


def read_recipe_file(file: Path) -> Any:
    """Return what a recipe file holds, as plain values that refer to keys of the recipe and to nothing secret.

    Raises: RecipeError: one line that names the file, and where there is one the line.
    """
    try:
        content = read_yaml(file)
    except OSError as error:
        raise RecipeError(f"{file} cannot be read ({error.strerror}); name a file that can") from None
    except ValueError as error:
        raise RecipeError(str(error)) from None
    try:
        check_interpolations(content)
    except ValueError as error:
        raise RecipeError(f"{file}: {error}") from None
    return content


class FileConfigSource(file_config_source.FileConfigSource):
    """Where Hydra finds recipe files: in folders, but each is read by :func:`read_recipe_file`."""

    def load_config(self, config_path: str) -> ConfigResult:
        """Return a file's content and what its header says of it, as Hydra takes them."""
        name = self._normalize_file_name(config_path)
        if not is_inner(name):
            raise RecipeError(f"defaults name {name[:80]}, outside of {self.path}; name files of its folders")
        file = Path(self.path) / name
        if not file.exists():
            raise ConfigLoadError(f"Config not found : {file}")
        content = read_recipe_file(file)
        if not isinstance(content, dict | None):
            raise RecipeError(f"{file} holds no keys; write key: value")
        header = self._get_header_dict(read_text(file, YAML_BYTES)[:512])
        config, place = OmegaConf.create(content or {}), f"{self.scheme()}://{self.path}"
        return ConfigResult(provider=self.provider, path=place, config=config, header=header)


def install_file_source() -> None:
    """Have Hydra read files by :class:`FileConfigSource`, now that it has registered its own."""
    Plugins.instance()
    SourcesRegistry.instance().types[FileConfigSource.scheme()] = FileConfigSource


def options(group: str, folders: Sequence[Path] | None = None) -> list[str]:
    """Return the names that a group offers: the files of its folder among the shipped and the user's own."""
    places = [RECIPES, *(own_folders() if folders is None else folders)]
    return sorted({path.stem for place in places for path in (place / group).glob("*.yaml")})
