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

E4M3 = torch.float8_e4m3fn
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


def fp8(
    made: Published,
    block: tuple[int, int] = (128, 128),
    kind: str = "block",
    name: str = "weight_scale_inv",
    scale_dtype: torch.dtype = torch.float32,
    *,
    power_of_two: bool = True,
) -> dict[str, Tensor]:
    """Make the matrices that are published in FP8 so, with random numbers of every size; return what all stand for.

    Args:
        kind: what shares a scale: block, row or matrix.
        name: of the scales.
        scale_dtype: they are stored in; uint8 = the exponents as bytes.
    """
    torch.manual_seed(1)
    expected = dict(made.tensors)
    for tensor in published_tensors(made.model):
        if not tensor.is_quantised or tensor.name not in made.tensors:
            continue
        rows, columns = tensor.shape
        tile = {"block": block, "row": (1, columns), "matrix": (rows, columns)}[kind]
        grid = (-(-rows // tile[0]), -(-columns // tile[1]))
        scales = 2.0 ** torch.randint(-8, 2, grid) * (1 if power_of_two else torch.rand(grid) + 1)
        scales = scales.to(torch.float8_e8m0fnu if scale_dtype is torch.uint8 else scale_dtype)
        largest = int(torch.randint(60, 127, ()))  # no rule gives such scales: the top of the range is not used
        bits = torch.randint(0, largest, (rows, columns)) + 128 * torch.randint(0, 2, (rows, columns))
        data = bits.to(torch.uint8).view(E4M3)
        each = scales.float().repeat_interleave(tile[0], 0).repeat_interleave(tile[1], 1)[:rows, :columns]
        expected[tensor.name] = data.float() * each
        stored = scales.view(torch.uint8) if scale_dtype is torch.uint8 else scales
        made.tensors[tensor.name] = data
        made.tensors[f"{tensor.name.removesuffix('.weight')}.{name}"] = stored if kind == "block" else stored.squeeze()
    made.config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
    if kind == "block":
        made.config["quantization_config"]["weight_block_size"] = list(block)
    return expected


def imported(directory: Path, model: ModelSettings) -> dict[str, Tensor]:
    """Return what an import holds, under the published names; without the copies that MTP layers have."""
    checkpoint, _ = newest_valid(directory / "checkpoints")
    assert checkpoint is not None
    regions = Regions(checkpoint)
    tensors = [tensor for tensor in published_tensors(model) if not tensor.copy_of]
    return {t.name: regions.read(t.key, t.start, t.extent).reshape(t.shape) for t in tensors}
