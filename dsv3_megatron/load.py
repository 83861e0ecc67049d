"""A trained model of a run directory, whole, in this one process, whatever layout wrote it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from dsv3_megatron.build import Parts, build_parts
from dsv3_megatron.checkpoint.choose import choose_checkpoint
from dsv3_megatron.checkpoint.load import Found, load_checkpoint
from dsv3_megatron.checkpoint.manifest import read_content
from dsv3_megatron.data.build import Data
from dsv3_megatron.data.build import build as build_data
from dsv3_megatron.data.tokenizer import Tokenizer
from dsv3_megatron.host import choose_device
from dsv3_megatron.recipe import Recipe
from dsv3_megatron.trainer import processes
from parallel.errors import CheckpointError
from parallel.settings import ParallelSettings
from parallel.world import World

Weights = Literal["trained", "ema"]


@dataclass(frozen=True)
class TrainedModel:
    """What a run has learned."""

    parts: Parts
    data: Data
    checkpoint: Path
    progress: dict[str, Any]


@contextmanager
def trained_model(
    recipe: Recipe, directory: str | Path, step: int | None = None, weights: Weights = "trained"
) -> Iterator[TrainedModel]:
    """Load the newest valid checkpoint of a run, or the one of ``step``, for as long as the block lasts.

    ``weights``: those trained, or their average over the last steps (optim.ema_decay).
    An imported run's own tokenizer takes the place of the data's. Raises: CheckpointError: there is none, it is
    damaged, or it holds no average.
    """
    path = choose_checkpoint(directory, step).path
    alone = recipe.model_copy(update={"parallel": ParallelSettings()})
    world = World(0, 1, 0)
    device = choose_device(recipe.run.device, world)
    data = build_data(recipe.data, vocab_size=recipe.model.vocab_size, seed=recipe.run.seed)
    if (own := Path(directory) / "tokenizer.json").is_file():
        data = replace(data, tokenizer=Tokenizer.load(own))
    with processes(world, device), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        parts = build_parts(alone, alone.layout(1), device)
        content = read_content(path)
        found = Found(path, content["progress"], tuple(content["extra"]), content["optimizer"])
        extra = ("ema",) if weights == "ema" else ()
        if extra and (parts.ema is None or "ema" not in found.extra):
            raise CheckpointError(f"weights = ema, but {path} holds no average; train with optim.ema_decay=0.999")
        load_checkpoint(found, parts, training=False, extra=extra)
        if extra:
            parts.ema.copy_into_weights()
        yield TrainedModel(parts, data, path, found.progress)
