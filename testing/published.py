"""Folders of published weights, made of one tiny random model: what a test of reading them starts from and changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dsv3_megatron.checkpoint.hugging_face.config import config_from_settings
from dsv3_megatron.checkpoint.hugging_face.headers import INDEX
from dsv3_megatron.checkpoint.hugging_face.names import published_tensors
from dsv3_megatron.checkpoint.hugging_face.regions import Regions
from dsv3_megatron.checkpoint.manifest import newest_valid
from dsv3_megatron.model.settings import ModelSettings

TINY = ModelSettings(
    vocab_size=40,
    hidden_size=24,
    intermediate_size=40,
    moe_intermediate_size=16,
    num_hidden_layers=2,
    first_k_dense_replace=1,
    num_attention_heads=2,
    q_lora_rank=12,
    kv_lora_rank=10,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=6,
    n_routed_experts=4,
    n_group=1,
    topk_group=1,
    num_experts_per_tok=2,
    num_nextn_predict_layers=1,
)


@dataclass
class Published:
    """A folder to be: its tensors, the file of each, its configuration, and what its index says if not that."""

    model: ModelSettings
    tensors: dict[str, Tensor]
    config: dict[str, Any]
    files: dict[str, str] = field(default_factory=dict)  # those of others are by their turn
    index: Callable[[dict[str, str]], object] = lambda weight_map: {"weight_map": weight_map}

    def write(self, folder: Path, *, shards: int = 3) -> Path:
        """Write it, in so many files; return the folder."""
        folder.mkdir(parents=True)
        names = [f"model-{n + 1:05d}-of-{shards:05d}.safetensors" for n in range(shards)]
        where = {
            name: self.files.get(name, names[n * shards // len(self.tensors)]) for n, name in enumerate(self.tensors)
        }
        for file in set(where.values()):
            held = {n: t.clone().contiguous() for n, t in self.tensors.items() if where[n] == file}
            save_file(held, folder / file)
        if shards > 1:
            (folder / INDEX).write_text(json.dumps(self.index(where)))
        else:
            (folder / names[0]).rename(folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(self.config))
        return folder

    def rename(self, change: Callable[[str], str]) -> None:
        """Give tensors other names."""
        self.tensors = {change(name): values for name, values in self.tensors.items()}

    def drop(self, *ends: str) -> None:
        """Leave out tensors whose names end so."""
        self.tensors = {name: values for name, values in self.tensors.items() if not name.endswith(ends)}


def published(model: ModelSettings = TINY, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Published:
    """Return a random model's tensors under their published names; router biases float32."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, Tensor] = {}
    for tensor in published_tensors(model):
        if tensor.copy_of:
            continue
        values = torch.randn(tensor.shape, generator=generator)
        found[tensor.name] = values if tensor.is_float32 else values.to(dtype)
    for tensor in published_tensors(model):
        if tensor.copy_of:
            found[tensor.name] = found[tensor.copy_of]
    stored = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "bf16"}[dtype]
    return Published(model, found, config_from_settings(model, stored, begin=None, end=None))


def imported(directory: Path, model: ModelSettings) -> dict[str, Tensor]:
    """Return what an import holds, under the published names; without the copies that MTP layers have."""
    checkpoint, _ = newest_valid(directory / "checkpoints")
    assert checkpoint is not None
    regions = Regions(checkpoint)
    tensors = [tensor for tensor in published_tensors(model) if not tensor.copy_of]
    return {t.name: regions.read(t.key, t.start, t.extent).reshape(t.shape) for t in tensors}
