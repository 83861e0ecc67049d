"""Weights from elsewhere: python launcher/import_hf.py input=FOLDER output=FOLDER [recipe=NAME] [dtype=fp32|bf16]

Reads Hugging Face safetensors of the DeepSeek-V3 family (FP32, BF16, FP16, or FP8 with scales) and writes a run
directory: recipe.yaml and checkpoints/step_00000000, which evaluate.py, generate.py and pretrain.py take. A config.json
alone gives the recipe alone. Memory is a tensor a process. The same command again goes on where it was stopped.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, PositiveInt

from dsv3_megatron.checkpoint.hugging_face.config import settings_from_config, text_model, told_by_config
from dsv3_megatron.checkpoint.hugging_face.headers import holds_weights, read_trained_with
from dsv3_megatron.checkpoint.manifest import checkpoints, folder_name, read_content
from dsv3_megatron.data.tokenizer import Tokenizer
from dsv3_megatron.data.tokenizer_files.names import CONFIG
from dsv3_megatron.data.tokenizer_files.read import FILES, TOKENIZER
from dsv3_megatron.data.tokenizer_identity import check_rows, described, other_tokenizer
from dsv3_megatron.model.settings import ModelSettings
from dsv3_megatron.recipe import Recipe
from dsv3_megatron.run.directory import RunDirectory
from dsv3_megatron.run.files import write_atomically
from dsv3_megatron.run.handed import inside, is_nested_deeper, read_json_file
from dsv3_megatron.run.written import WrittenFiles
from launcher.command_line.arguments import Arguments, ReadableBy, takes
from launcher.command_line.compose import build, compose, load_resolved, resolved_yaml
from launcher.command_line.console import ProgressLine, guarded
from launcher.command_line.recipe_files import options
from launcher.command_line.typed import command
from launcher.export_hf import writable_folder
from parallel.errors import CheckpointError, RecipeError
from parallel.units import show_bytes

if TYPE_CHECKING:
    from dsv3_megatron.checkpoint.hugging_face.sources import Sources

# What a recipe.yaml beside weights may say: numbers of the training. Whoever made the folder decides no command, place,
# layout or report of this machine's.
TAKEN = {
    "optim": None,  # whole
    "run": ("seed", "steps", "tokens"),
    "data": ("source", "sequence_length", "held_out", "held_out_sequences", "weights", "mixture", "at_source_end",
             "start_token", "isolate_documents", "fim_rate"),
}  # fmt: skip
FIRST, MARK = folder_name(0), ".imported.json"
PARTIAL = f".{FIRST}.import"
WRITTEN = ("recipe.yaml", TOKENIZER, CONFIG, "published_scales.safetensors", f"checkpoints/{FIRST}/manifest.json")
CONFIG_BYTES, CONFIG_LEVELS = 1 << 22, 20  # of a configuration; published ones have a hundredth
CONTINUING = ("recipe=moonlight_16b", "parallel=single", "optim.micro_batch=1")


class ImportArguments(Arguments):
    """The keys of this command."""

    input: str = Field(description="folder with config.json and safetensors, or a config.json alone")
    output: str = Field(description="run directory to write")
    recipe: str | None = Field(
        None, description="recipe that says the rest; null = the export's own, else a shipped one of the shape"
    )
    dtype: Literal["fp32", "bf16"] | None = Field(None, description="of the weights; null = as they are, FP8 as BF16")
    allow_other: bool = Field(False, description="take a tokenizer that the weights were not trained with")
    processes: PositiveInt | None = Field(None, description="files read at once; null = one a core, 8 at most")
    readable_by: ReadableBy = "owner"


@takes(ImportArguments, __doc__)
def main(given: ImportArguments) -> int:
    """Write the run directory; return the exit code."""
    folder, config = read_config(Path(given.input))
    model = settings_from_config(config)
    for line in told_by_config(config):
        print(line)
    weights = sources_of(model, Path(given.input), config)
    model = weights.model if weights else model
    refuse_other_files(Path(given.output))
    directory = RunDirectory(writable_folder(Path(given.output)))
    recipe = recipe_of(model, folder, given, precision_of(config, given.dtype, weights))
    tokenizer = tokenizer_of(folder, model)
    if difference := other_tokenizer(read_trained_with(folder, "tokenizer"), tokenizer):
        if not given.allow_other:
            raise CheckpointError(
                f"input = {folder}: its weights were trained with {difference}; restore the tokenizer of the export, "
                "or set allow_other=true"
            )
        print(f"its weights were trained with {difference}: allow_other = true")
    files = WrittenFiles(directory.path, MARK)
    files.begin(WRITTEN)
    if weights:
        size = import_weights(weights, directory, recipe, given, tokenizer)
        print(f"{folder} -> {directory.path}: {show_bytes(size)} of weights, checksummed")
    write_atomically(directory.recipe, resolved_yaml(recipe))
    if tokenizer is not None:
        tokenizer.save(directory.path / TOKENIZER)
    files.end(WRITTEN)
    print(f"recipe: {directory.recipe}; train from it: {command('train')} recipe={directory.recipe}")
    return 0


def refuse_other_files(output: Path) -> None:
    """Raise CheckpointError where the output holds what no import has written: a run, a model, or anything else."""
    if (output / "config.json").exists():
        raise CheckpointError(f"output = {output} holds a published model, and no run; name a new folder")
    folder = RunDirectory(output).checkpoints
    if later := [path for path in checkpoints(folder) if path.name != FIRST]:
        raise CheckpointError(f"output = {output} holds {later[0].name} of another run; name a new folder")
    if not output.is_dir():
        return
    there = sorted(path.name for path in output.iterdir() if not path.name.startswith(".") and path != folder)
    if os.path.lexists(folder):
        is_folder = folder.is_dir() and not folder.is_symlink()
        held = sorted(os.listdir(folder)) if is_folder else [""]
        known = (
            is_folder
            and (output / MARK).is_file()
            and not any((folder / name).is_symlink() for name in (FIRST, PARTIAL))
        )
        there += [f"{folder.name}/{name}" for name in held if name not in (FIRST, PARTIAL) or not known]
        there += [name for name in WRITTEN if "/" in name]
    if other := WrittenFiles(output, MARK).other(there):
        raise CheckpointError(
            f"output = {output} holds {other}, which no import has written; name a new folder, or remove it"
        )


def read_config(given: Path) -> tuple[Path, dict[str, Any]]:
    """Return the folder and its config.json. Raises CheckpointError when there is none."""
    try:
        path = inside(given, "config.json") if given.is_dir() else given
        config = read_json_file(path, CONFIG_BYTES)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"input = {given}: its config.json cannot be read ({error}); name a Hugging Face folder"
        ) from None
    if not isinstance(config, dict) or is_nested_deeper(config, CONFIG_LEVELS):
        raise CheckpointError(f"input = {given}: {path} is no configuration; name a Hugging Face folder")
    return path.parent, config


def tokenizer_of(folder: Path, model: ModelSettings) -> Tokenizer | None:
    """Return the tokenizer of a Hugging Face folder, and say what a person should know of it; None if there is none.

    Raises: DataError: it cannot be used, or has ids that the model does not.
    """
    if not any((folder / name).is_file() for name in FILES):
        print(f"no tokenizer: {folder} holds none of {', '.join(FILES)}")
        return None
    tokenizer = Tokenizer.load(folder)
    check_rows(tokenizer, model.vocab_size, folder)
    unused = model.vocab_size - tokenizer.vocab_size
    rows = f"; {unused:,} of the model's {model.vocab_size:,} rows have no token" if unused else ""
    for line in (*tokenizer.notes, f"tokenizer {tokenizer.name}: {tokenizer.names.told()}{rows}"):
        print(line)
    return tokenizer


def sources_of(model: ModelSettings, given: Path, config: dict[str, Any]) -> Sources | None:
    """Return where the weights lie, after telling what is to be told of them; None, and that told, where none are."""
    if not (given.is_dir() and holds_weights(given)):
        print(f"no weights in {given}: the recipe alone is written, and training from it begins at random")
        return None
    # torch: seconds, which a refused command need not wait for
    from dsv3_megatron.checkpoint.hugging_face.published_scales import check_scales
    from dsv3_megatron.checkpoint.hugging_face.sources import find_sources

    found = find_sources(model, given, config)
    for line in (*found.told, check_scales(found)):
        if line:
            print(line)
    return found


def precision_of(config: dict[str, Any], dtype: str | None, weights: Sources | None) -> str:
    """Return the precision group that fits the weights; a configuration alone says what they would be."""
    if dtype:
        return dtype
    if weights:
        return "fp32" if weights.is_float32 else "bf16"
    places = (text_model(config), config)  # under text_config one of the two may say it
    stored = next((p[key] for p in places for key in ("torch_dtype", "dtype") if p.get(key)), "bfloat16")
    quantised = any(p.get("quantization_config") for p in places)
    return "fp32" if stored == "float32" and not quantised else "bf16"


def recipe_of(model: ModelSettings, folder: Path, given: ImportArguments, precision: str) -> Recipe:
    """Return a recipe for the model: the rest from the export's own recipe, from the one named, or a shipped one."""
    output = Path(given.output)
    if given.recipe is None and (folder / "recipe.yaml").is_file():
        base = with_numbers_of(folder / "recipe.yaml")
    else:
        words = [f"recipe={given.recipe}"] if given.recipe else words_for(model)
        base = compose(words).model_dump(mode="json")
    base["model"] = model.model_dump(mode="json")
    base["precision"] = compose([f"precision={precision}"]).precision.model_dump(mode="json")
    if base["data"]["sequence_length"] > (most := model.max_position_embeddings):
        print(f"data.sequence_length = {most}: the positions that the model is made for")
        base["data"]["sequence_length"] = most
    base["run"] |= {"name": output.name, "directory": str(output), "start_from": None}
    try:
        return build(base)
    except RecipeError as error:
        raise CheckpointError(f"input = {given.input} does not go with the recipe: {error.args[0]}") from None


def with_numbers_of(path: Path) -> dict[str, Any]:
    """Return a recipe that is shipped, with what a recipe.yaml beside weights may say of a training; say what it may
    not, and is left out."""
    theirs = load_resolved(path).model_dump(mode="json")
    base = compose([*CONTINUING, "backend=auto"]).model_dump(mode="json")
    left_out = []
    for section, values in theirs.items():
        taken = TAKEN.get(section, ())
        if taken is None:
            base[section] = values
        elif section not in ("recipe", "model", "precision") and not isinstance(values, dict):
            left_out += [section] if values != base[section] else []
        elif section not in ("recipe", "model", "precision"):
            base[section] |= {key: values[key] for key in taken}
            other = [key for key, value in values.items() if value != base[section][key]]
            left_out += [f"{section}.{key}" for key in other] if taken else [section] * bool(other)
    if left_out:
        print(f"{path}: model and numbers of the training are taken; not {', '.join(left_out)}")
    return base


def words_for(model: ModelSettings) -> list[str]:
    """Return the words of a shipped recipe whose model has the same widths and depth; else of one that trains a
    published model on, on one GPU: no rate for training from nothing is right for weights that are trained."""
    same = ("hidden_size", "num_hidden_layers", "n_routed_experts", "vocab_size")
    for name in options("recipe"):
        shape = compose([f"recipe={name}"]).model
        if all(getattr(shape, key) == getattr(model, key) for key in same):
            return [f"recipe={name}"]
    print(f"no shipped recipe has this shape: {', '.join(CONTINUING)} say the rest; look at it before training")
    return list(CONTINUING)


def import_weights(
    weights: Sources, directory: RunDirectory, recipe: Recipe, given: ImportArguments, tokenizer: Tokenizer | None
) -> int:
    """Write checkpoints/step_00000000; return its bytes."""
    from dsv3_megatron.checkpoint.hugging_face.import_ import import_weights  # as above
    from dsv3_megatron.checkpoint.hugging_face.published_scales import keep_scales

    shown = ProgressLine("importing")
    path = import_weights(
        weights,
        directory.checkpoints,
        recipe=resolved_yaml(recipe),
        dtype=given.dtype,
        processes=given.processes or min(8, os.cpu_count() or 1),
        progress=shown.files,
        tokenizer=described(tokenizer),
        trained_on=read_trained_with(weights.folder, "data"),
    )
    shown.close()
    keep_scales(weights, directory.published_scales)
    return sum(facts["bytes"] for facts in read_content(path)["files"].values())


if __name__ == "__main__":
    sys.exit(guarded(main))
