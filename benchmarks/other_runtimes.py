"""The pipeline runtimes that benchmarks/schedule_fidelity.py puts ours beside: torch's and megatron-core's.

Each over stages that do no arithmetic, one stage or chunk list a rank as its own users would hold them, so that what is
measured is the runtime and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from benchmarks.sleeping import SleepingModule


def torchs(name: str, many: int, chunks: int, seconds: float) -> Callable[[], None] | None:
    """Return the same step under torch's runtime, or None where it has no such schedule."""
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B
    from torch.distributed.pipelining.schedules import ScheduleDualPipeV

    rank, ranks = dist.get_rank(), dist.get_world_size()
    kinds = {"1f1b": Schedule1F1B, "interleaved": ScheduleInterleaved1F1B, "dualpipev": ScheduleDualPipeV}
    held = {"1f1b": [rank], "interleaved": [rank + i * ranks for i in range(chunks)]}.get(name)
    held = held or [rank, 2 * ranks - 1 - rank]
    if name not in kinds:
        return None
    total, example = ranks * len(held), torch.zeros(1, 16)
    stages = [
        PipelineStage(SleepingModule(seconds, seconds, seconds), index, total, torch.device("cpu"), input_args=example)
        for index in held
    ]

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return output.sum()

    schedule = kinds[name](stages[0] if name == "1f1b" else stages, many, loss_fn=loss)
    batch, last = torch.zeros(many, 16), total - 1

    def step() -> None:
        arguments = (batch,) if 0 in held else ()
        schedule.step(*arguments, **({"target": batch} if last in held else {}))

    return step


def megatrons(many: int) -> Callable[[], None]:
    """Return a step of megatron-core's 1F1B over stages that take no time."""
    from dsv3_megatron.megatron.host import adapt_host

    adapt_host()
    from megatron.core import parallel_state
    from megatron.core.enums import ModelType
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.transformer.transformer_config import TransformerConfig

    ranks = dist.get_world_size()
    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=ranks)

    class Stage(torch.nn.Module):
        """A stage that hands its input on."""

        def __init__(self) -> None:
            super().__init__()
            self.config = TransformerConfig(
                num_layers=ranks,
                hidden_size=16,
                num_attention_heads=1,
                pipeline_model_parallel_size=ranks,
                pipeline_dtype=torch.float32,
            )
            self.model_type = ModelType.encoder_or_decoder
            self.weight = torch.nn.Parameter(torch.zeros(1))
            self._input: torch.Tensor | None = None

        def set_input_tensor(self, tensors: object) -> None:
            self._input = tensors[0] if isinstance(tensors, list) else tensors

        def forward(self) -> torch.Tensor:
            return (self._input if self._input is not None else torch.zeros(1, 1, 16)) + self.weight

    stage = Stage()
    run = get_forward_backward_func()

    def forward_step(batches: object, model: Stage) -> tuple[torch.Tensor, Callable]:
        return model(), lambda out: (out.sum(), {})

    def step() -> None:
        run(
            forward_step_func=forward_step,
            data_iterator=None,
            model=stage,
            num_microbatches=many,
            seq_length=1,
            micro_batch_size=1,
        )

    return step
