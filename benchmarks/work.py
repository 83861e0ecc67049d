"""What the sides of the benchmarks do in a step: our trainer's step, transformers' model, a plain matrix product."""

from __future__ import annotations

import itertools
import os
import warnings
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")

# Without MTP, which transformers does not have. 16 sequences a step, in microbatches of 4.
TINY = (
    "recipe=dsv3_tiny",
    "data=synthetic",
    "model.num_nextn_predict_layers=0",
    "optim.micro_batch=4",
)
# 107M parameters, 26M of them active: hidden 512, 8 layers, 32 experts top-4, 4 sequences of 1,024 tokens a step.
SMALL_100M = (
    "recipe=dsv3_tiny",
    "data=synthetic",
    "model.num_nextn_predict_layers=0",
    "model.vocab_size=8192",
    "model.hidden_size=512",
    "model.intermediate_size=1536",
    "model.moe_intermediate_size=256",
    "model.num_hidden_layers=8",
    "model.num_attention_heads=8",
    "model.q_lora_rank=192",
    "model.kv_lora_rank=128",
    "model.qk_nope_head_dim=64",
    "model.qk_rope_head_dim=32",
    "model.v_head_dim=64",
    "model.n_routed_experts=32",
    "data.sequence_length=1024",
    "optim.micro_batch=1",
    "optim.global_batch=4",
)


def ours(words: tuple[str, ...], device: str = "cpu") -> Any:
    """The trainer's own step: schedule, ZeRO-1, clipping, bias update, everything but writing metrics.

    ``step()`` trains on the next batch, ``step(number)`` on that one; both return the StepResult.
    """
    from dsv3_megatron.precision.transformer_engine import prepare_environment
    from launcher.command_line.compose import compose
    from parallel.world import World

    recipe = compose(list(words))
    prepare_environment(recipe.precision)  # before anything imports TE
    from dsv3_megatron.megatron.host import choose_device

    world = World.from_environment()
    place = choose_device(device, world)
    from dsv3_megatron.data.source.samples import Synthetic, step_batches
    from dsv3_megatron.model.costs import training_flops_per_token
    from dsv3_megatron.train.build import build_parts
    from dsv3_megatron.train.step import StepValues, train_step
    from parallel.groups import start_processes

    start_processes(world, place)
    parts = build_parts(recipe, recipe.layout(world.size), place)
    optim, length = recipe.optim, recipe.data.sequence_length
    source = Synthetic(recipe.model.vocab_size, length, seed=1)
    values = StepValues(learning_rate=1e-3, mtp_weight=0.3, bias_speed=0.001, balance_weight=1e-4)
    numbers = itertools.count()

    def step(number: int | None = None) -> Any:
        share = {"global_batch": optim.global_batch, "micro_batch": optim.micro_batch}
        first = (next(numbers) if number is None else number) * optim.global_batch
        batches = step_batches(source, first=first, dp_rank=parts.data_rank, dp=parts.layout.dp, **share)
        return train_step(parts, batches, values)

    step.parts, step.stages = parts, parts.stages
    step.facts = {
        "parameters": sum(p.numel() for chunk in parts.chunks.values() for p in chunk.parameters()),
        "tokens": optim.global_batch * length,
        "flops_per_token": training_flops_per_token(recipe.model, length),
    }
    return step


def transformers(
    words: tuple[str, ...], compiled: bool = False, device: str = "cpu", dtype: str = "float32", attention: str = "sdpa"
) -> Any:
    """DeepseekV3ForCausalLM of the same shape, the plainest loop around it, torch's fused AdamW.

    grouped_mm is the fastest of its ways to compute experts on a CPU. A step returns the mean loss.
    """
    import torch
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    from launcher.command_line.compose import compose

    recipe = compose(list(words))
    model, length = recipe.model, recipe.data.sequence_length
    micro, batch = recipe.optim.micro_batch, recipe.optim.global_batch
    shape = model.model_dump(exclude={"rope_scaling", "rope_theta", "topk_method", "scoring_func"})
    config = DeepseekV3Config(**shape, num_key_value_heads=model.num_attention_heads)
    config._experts_implementation, config._attn_implementation = "grouped_mm", attention
    with torch.device(device):
        network = DeepseekV3ForCausalLM(config).to(getattr(torch, dtype)).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    forward = torch.compile(network) if compiled else network
    tokens = torch.randint(0, model.vocab_size, (batch // micro, micro, length), device=device)

    def step() -> Any:
        whole = 0.0
        for ids in tokens:
            loss = forward(ids, labels=ids).loss / len(tokens)
            loss.backward()
            whole = whole + loss.detach()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return whole

    step.facts = {"parameters": sum(p.numel() for p in network.parameters())}
    return step


def matrix_product(size: int = 2048) -> Any:
    """One float32 product of square matrices: 2 size^3 operations, the machine's own rate."""
    import torch

    left, right = torch.randn(2, size, size)
    return lambda: left @ right


def machine() -> dict[str, Any]:
    """Return what a figure of this machine has to be read with."""
    import platform

    import torch

    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return {
        "cpus": os.cpu_count(),
        "cpu_has_bf16": "avx512_bf16" in flags or "amx_bf16" in flags,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load_average_before": os.getloadavg()[0],
    }
