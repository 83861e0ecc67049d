"""Weights for everybody: python launcher/export_hf.py run=RUN_DIRECTORY output=FOLDER [dtype=fp32|bf16|fp8]

Writes the newest valid checkpoint as Hugging Face files of its class (model.model_type): sharded safetensors, index,
config.json, tokenizer and recipe, which transformers, vLLM and SGLang load. The MTP module is the layer after the last.
Memory is a shard a process. The same command again goes on where it was stopped.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BeforeValidator, Field, PositiveInt

from dsv3_megatron.checkpoint.hugging_face.config import config_from_settings
from dsv3_megatron.checkpoint.hugging_face.headers import INDEX
from dsv3_megatron.data.tokenizer import Tokenizer
from dsv3_megatron.data.tokenizer_files.names import CONFIG
from dsv3_megatron.data.tokenizer_identity import check_trained_with, described, tokenizer_of_run
from dsv3_megatron.recipe import Recipe
from dsv3_megatron.run.directory import RunDirectory
from dsv3_megatron.run.files import write_atomically, write_json
from dsv3_megatron.run.made import new_file
from dsv3_megatron.run.written import WrittenFiles
from launcher.command_line.arguments import Arguments, ReadableBy, takes
from launcher.command_line.compose import load_resolved, resolved_yaml
from launcher.command_line.console import ProgressLine, guarded
from parallel.errors import CheckpointError, UserError
from parallel.units import parse_bytes, show_bytes

if TYPE_CHECKING:
    from dsv3_megatron.checkpoint.hugging_face.export import Scales

RECIPE, MARK = "recipe.yaml", ".exported.json"
WRITTEN = (INDEX, RECIPE, "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


class ExportArguments(Arguments):
    """The keys of this command."""

    run: str = Field(description="run directory to take the weights from")
    output: str = Field(description="folder to write")
    dtype: Literal["fp32", "bf16", "fp8"] = Field("bf16", description="fp8 = 128x128 blocks with weight_scale_inv")
    scales: Literal["float", "power_of_two"] | None = Field(
        None, description="of fp8; power_of_two = scale_fmt ue8m0; null = as the weights came, else float"
    )
    weights: Literal["trained", "ema"] = Field("trained", description="ema: their average (optim.ema_decay)")
    step: int | None = Field(None, description="checkpoint to take; null = the newest valid one")
    shard: Annotated[PositiveInt, BeforeValidator(parse_bytes)] = Field(5 * 2**30, description="bytes of a file")
    processes: PositiveInt | None = Field(None, description="files written at once; null = one a core, 8 at most")
    readable_by: ReadableBy = "owner"


@takes(ExportArguments, __doc__)
def main(given: ExportArguments) -> int:
    """Write the folder; return the exit code."""
    if given.scales and given.dtype != "fp8":
        raise CheckpointError(f"scales = {given.scales} has no effect with dtype = {given.dtype}; leave one out")
    recipe = load_resolved(Path(given.run) / RECIPE)
    config_from_settings(recipe.model, given.dtype, begin=None, end=None)  # a model of no class is refused first
    refuse_other_files(Path(given.output), recipe)
    output = writable_folder(Path(given.output))
    # torch: a second, which a refused command need not wait for
    from dsv3_megatron.checkpoint.find import choose_checkpoint
    from dsv3_megatron.checkpoint.hugging_face.export import EMA, export, shards_of
    from dsv3_megatron.checkpoint.manifest import WEIGHTS, read_content

    checkpoint = choose_checkpoint(
        given.run, given.step, holding=(WEIGHTS, "ema") if given.weights == "ema" else (WEIGHTS,)
    )
    for warning in checkpoint.warnings:
        print(warning, file=sys.stderr)
    scales = scales_of(given)
    shards = shards_of(
        recipe.model,
        checkpoint.path,
        output,
        dtype=given.dtype,
        shard_bytes=given.shard,
        prefix=EMA if given.weights == "ema" else "",
        scales=scales,
    )
    tokenizer = tokenizer_to_export(recipe, Path(given.run))
    content = read_content(checkpoint.path)
    check_trained_with(checkpoint.path, content.get("tokenizer"), tokenizer, allowed=False)
    trained_with = {"tokenizer": described(tokenizer), "data": content.get("data")}
    files = WrittenFiles(output, MARK)
    earlier = candidates(output)
    files.begin({*WRITTEN, *earlier, *(name for shard in shards for name in (shard.name, f".{shard.name}.done"))})
    (output / INDEX).unlink(missing_ok=True)  # what is there is incomplete from here on
    write_atomically(output / RECIPE, resolved_yaml(recipe))  # says whose files these are
    tokens = {} if tokenizer is None else write_tokenizer(tokenizer, recipe, output)
    write_config(recipe, output, given.dtype, tokens, power_of_two=scales.power_of_two)
    shown = ProgressLine("exporting")
    processes = given.processes or min(8, os.cpu_count() or 1)
    size = export(shards, output, processes=processes, progress=shown.files, trained_with=trained_with, earlier=earlier)
    files.end({*WRITTEN, *(shard.name for shard in shards)})
    shown.close()
    print(f"{checkpoint.path} -> {output}: {show_bytes(size)} of {given.dtype} weights, verified")
    if not tokens:
        print(f"no tokenizer: the run was trained on {recipe.data.source} data, which is no text")
    return 0


def refuse_other_files(output: Path, recipe: Recipe) -> None:
    """Raise CheckpointError where a folder holds files, of the kinds that an export writes or replaces, that no export
    of this run has written.

    An export's recipe.yaml, which is written before anything else, says whose files they are.
    """
    if not output.is_dir():
        return
    if (output / "checkpoints").exists():
        raise CheckpointError(f"output = {output} is the directory of a run; name a new folder")
    files = candidates(output)
    if files and not is_of_run(output / RECIPE, recipe):
        raise CheckpointError(
            f"output = {output} holds {files[0]} of another model; name a new folder, or remove what is in it"
        )
    if other := WrittenFiles(output, MARK).other(files):
        raise CheckpointError(
            f"output = {output} holds {other}, which no export of this run has written; name a new folder, or remove it"
        )


def candidates(output: Path) -> list[str]:
    """Return the files of a folder that an export would write or replace, or that hold a model."""
    files = [name for name in WRITTEN if os.path.lexists(output / name)]
    patterns = ("*.safetensors", "*.bin", ".*.done")
    return files + sorted(path.name for pattern in patterns for path in output.glob(pattern))


def is_of_run(path: Path, recipe: Recipe) -> bool:
    """Return whether a stored recipe is of the same run and shapes, whatever else of it has changed."""
    from dsv3_megatron.checkpoint.hugging_face.names import our_shapes  # torch, as above

    try:
        earlier = load_resolved(path)
    except UserError:
        return False
    same_run = (earlier.run.directory, earlier.run.name) == (recipe.run.directory, recipe.run.name)
    return same_run and our_shapes(earlier.model) == our_shapes(recipe.model)


def scales_of(given: ExportArguments) -> Scales:
    """Return how scales are chosen: as asked for, as the weights came, else all of the format's range."""
    from dsv3_megatron.checkpoint.hugging_face.export import Scales  # torch, as above
    from dsv3_megatron.checkpoint.hugging_face.published_scales import has_power_of_two_scales

    path = RunDirectory(given.run).published_scales
    came = has_power_of_two_scales(path) if given.dtype == "fp8" else None
    power_of_two = bool(came) if given.scales is None else given.scales == "power_of_two"
    return Scales(power_of_two, path if came == power_of_two else None)


def writable_folder(folder: Path) -> Path:
    """Return a folder that exists. Raises CheckpointError when it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{os.getpid()}"
        new_file(probe).close()
        probe.unlink()
    except OSError as error:
        raise CheckpointError(f"output = {folder} cannot be written ({error.strerror}); name another folder") from None
    return folder


def tokenizer_to_export(recipe: Recipe, run: Path) -> Tokenizer | None:
    """Return the tokenizer that the run directory keeps, else that of its data; None if it was trained on no text."""
    if (own := tokenizer_of_run(run, recipe.model.vocab_size)) is not None:
        return own
    from dsv3_megatron.data.source.build import build  # torch, as above

    return build(recipe.data, vocab_size=recipe.model.vocab_size, seed=recipe.run.seed).tokenizer


def write_tokenizer(tokenizer: Tokenizer, recipe: Recipe, output: Path) -> dict[str, int]:
    """Write tokenizer.json and what transformers needs beside it; return the ids of its special tokens by key."""
    files = tokenizer.files()
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": recipe.data.sequence_length,
        **{key: value for key, value in tokenizer.names.as_config().items() if value is not None},
    }
    files[CONFIG] = json.dumps(config, indent=1, ensure_ascii=False) + "\n"
    for name, text in files.items():
        write_atomically(output / name, text)
    ids = {"bos_token": tokenizer.begin, "eos_token": tokenizer.end, "pad_token": tokenizer.pad}
    return {key: number for key, number in ids.items() if number is not None}


def write_config(recipe: Recipe, output: Path, dtype: str, tokens: dict[str, int], *, power_of_two: bool) -> None:
    """Write config.json and generation_config.json. ``power_of_two``: what the scales of fp8 are."""
    begin, end = tokens.get("bos_token"), tokens.get("eos_token")
    config = config_from_settings(recipe.model, dtype, begin=begin, end=end)
    if power_of_two:
        config["quantization_config"] = {**config["quantization_config"], "scale_fmt": "ue8m0"}
    write_json(output / "config.json", config)
    generation = {"do_sample": False, "bos_token_id": begin, "eos_token_id": end}
    write_json(output / "generation_config.json", generation)


if __name__ == "__main__":
    sys.exit(guarded(main))
