"""Weights for everybody: python launcher/export_hf.py run=RUN_DIRECTORY output=FOLDER [dtype=fp32|bf16|fp8]

Writes the newest valid checkpoint as Hugging Face deepseek_v3: sharded safetensors with their index, config.json,
tokenizer and recipe, which transformers, vLLM and SGLang load. The MTP module is the layer after the last. Memory is a
shard a process. The same command again goes on where it was stopped.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PositiveInt

from dsv3_megatron.checkpoint.hugging_face.config import config_from_settings
from dsv3_megatron.data.tokenizer import BEGIN, END, PAD
from dsv3_megatron.recipe import Recipe
from launcher.command_line.arguments import Arguments, takes
from launcher.command_line.compose import load_resolved
from launcher.command_line.console import ProgressLine, guarded
from parallel.errors import CheckpointError
from parallel.units import parse_bytes, show_bytes

RECIPE = "recipe.yaml"


class ExportArguments(Arguments):
    """The keys of this command."""

    run: str = Field(description="run directory to take the weights from")
    output: str = Field(description="folder to write")
    dtype: Literal["fp32", "bf16", "fp8"] = Field("bf16", description="fp8 = 128x128 blocks with weight_scale_inv")
    weights: Literal["trained", "ema"] = Field("trained", description="ema: their average (optim.ema_decay)")
    step: int | None = Field(None, description="checkpoint to take; null = the newest valid one")
    shard: Annotated[PositiveInt, BeforeValidator(parse_bytes)] = Field(5 * 2**30, description="bytes of a file")
    processes: PositiveInt | None = Field(None, description="files written at once; null = one a core, 8 at most")


@takes(ExportArguments, __doc__)
def main(given: ExportArguments) -> int:
    """Write the folder; return the exit code."""
    recipe = load_resolved(Path(given.run) / RECIPE)
    output = writable_folder(Path(given.output))
    # torch: a second, which a refused command need not wait for
    from dsv3_megatron.checkpoint.find import choose_checkpoint
    from dsv3_megatron.checkpoint.hugging_face.export import EMA, export
    from dsv3_megatron.checkpoint.manifest import WEIGHTS

    checkpoint = choose_checkpoint(
        given.run, given.step, holding=(WEIGHTS, "ema") if given.weights == "ema" else (WEIGHTS,)
    )
    for wrong in checkpoint.wrong:
        print(f"warning: {wrong}", file=sys.stderr)
    shown = ProgressLine("exporting")
    size = export(
        recipe.model,
        checkpoint.path,
        output,
        dtype=given.dtype,
        shard_bytes=given.shard,
        processes=given.processes or min(8, os.cpu_count() or 1),
        prefix=EMA if given.weights == "ema" else "",
        progress=shown.files,
    )
    shown.close()
    tokens = write_tokenizer(recipe, Path(given.run), output)
    write_config(recipe, output, given.dtype, tokens)
    (output / RECIPE).write_text((Path(given.run) / RECIPE).read_text())
    print(f"{checkpoint.path} -> {output}: {show_bytes(size)} of {given.dtype} weights, verified")
    if not tokens:
        print(f"no tokenizer: the run was trained on {recipe.data.source} data, which is no text")
    return 0


def writable_folder(folder: Path) -> Path:
    """Return a folder that exists. Raises CheckpointError when it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise CheckpointError(f"output = {folder} cannot be written ({error.strerror}); name another folder") from None
    return folder


def write_tokenizer(recipe: Recipe, run: Path, output: Path) -> dict[str, Any]:
    """Write tokenizer.json and what transformers needs beside it; return its special tokens, {} if there is none."""
    from dsv3_megatron.data.source.build import build  # torch, as above

    tokenizer = build(recipe.data, vocab_size=recipe.model.vocab_size, seed=recipe.run.seed).tokenizer
    if tokenizer is None:
        return {}
    tokenizer.save(output / "tokenizer.json")
    special = {
        "bos_token": (BEGIN, tokenizer.begin),
        "eos_token": (END, tokenizer.end),
        "pad_token": (PAD, tokenizer.pad),
    }
    special = {name: pair for name, pair in special.items() if pair[1] is not None}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": recipe.data.sequence_length,
        **{name: token for name, (token, _) in special.items()},
    }
    (output / "tokenizer_config.json").write_text(json.dumps(config, indent=1, ensure_ascii=False) + "\n")
    return {name: number for name, (_, number) in special.items()}


def write_config(recipe: Recipe, output: Path, dtype: str, tokens: dict[str, Any]) -> None:
    """Write config.json and generation_config.json."""
    begin, end = tokens.get("bos_token"), tokens.get("eos_token")
    config = config_from_settings(recipe.model, dtype, begin=begin, end=end)
    (output / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    generation = {"do_sample": False, "bos_token_id": begin, "eos_token_id": end}
    (output / "generation_config.json").write_text(json.dumps(generation, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(guarded(main))
