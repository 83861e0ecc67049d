"""The small model that the checks of correctness train, and the ways they train it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import work
from benchmarks.gpu_check.outcome import Visit

# Everything DeepSeek-V3 has, MTP included. Widths are multiples of 128, so that FP8 tiles and products are whole ones.
SHAPE = (
    "recipe=dsv3_tiny",
    "data=synthetic",
    "data.sequence_length=64",
    "model.hidden_size=128",
    "model.intermediate_size=128",
    "model.moe_intermediate_size=128",
    "model.num_hidden_layers=2",
    "model.q_lora_rank=128",
    "model.kv_lora_rank=128",
    "model.qk_nope_head_dim=128",
    "model.qk_rope_head_dim=64",
    "model.v_head_dim=128",
    "model.n_routed_experts=8",
    "model.num_experts_per_tok=4",
    "model.num_attention_heads=2",
    "model.vocab_size=512",
    "optim.micro_batch=2",
    "optim.global_batch=4",
    "optim.learning_rate=1e-3",
    "logging.wandb=disabled",
    "logging.report_every_seconds=0",
)

HELD_OUT = 4  # sequences of an evaluation: that it is made counts here, not what it says


def words(backend: str, precision: str, *more: str) -> tuple[str, ...]:
    """Return the recipe of the small model."""
    return (*SHAPE, f"backend={backend}", f"precision={precision}", *more)


def prepare(visit: Visit, recipe: tuple[str, ...]) -> Any:
    """Return the recipe, and prepare this process for it as launcher/pretrain.py does: before megatron-core and TE are
    imported."""
    from dsv3_megatron.megatron.host import adapt_host
    from dsv3_megatron.precision.transformer_engine import prepare_environment
    from launcher.command_line.compose import compose

    made = compose(list(recipe))
    prepare_environment(made.precision)
    adapt_host(visit.device)
    return made


@contextmanager
def stepper(visit: Visit, recipe: tuple[str, ...]) -> Iterator[Any]:
    """The trainer's step on the device, as benchmarks.work.ours makes it, with weights drawn as on a CPU."""
    prepare(visit, recipe)
    with drawn_on_the_cpu():
        step = work.ours(recipe, visit.device)
    from parallel.groups import stop_processes

    try:
        yield step
    finally:
        stop_processes()


@contextmanager
def drawn_on_the_cpu() -> Iterator[None]:
    """Draw weights by the CPU's generator for as long as the block lasts: a GPU's gives other numbers for a seed."""
    import torch

    from dsv3_megatron.model import initialise

    draw = initialise._whole

    def drawn(shape: list[int], key: str, *, device: torch.device, **how: Any) -> torch.Tensor:
        return draw(shape, key, device=torch.device("cpu"), **how).to(device)

    initialise._whole = drawn
    try:
        yield
    finally:
        initialise._whole = draw


class Observed:
    """A run of launcher/pretrain.py's kind, seen from where a person would be told of it."""

    def __init__(self, at_start: Callable[[Any], None] | None = None, at_step: Callable[[Any], None] | None = None):
        self.at_start, self.at_step = at_start, at_step
        self.parts: Any = None
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.notes: list[str] = []

    def start(self, facts: dict[str, str]) -> None:
        """Weights are drawn or loaded, and nothing is trained yet."""
        if self.at_start:
            self.at_start(self.parts)

    def step(self, metrics: Any, last_step: int | None) -> None:
        """A step is done."""
        self.losses.append(metrics.lm_loss)
        self.norms.append(metrics.grad_norm)
        if self.at_step:
            self.at_step(self.parts)

    def evaluation(self, step: int, values: dict[str, float]) -> None:
        """The held-out loss."""

    def note(self, text: str) -> None:
        """A remark, such as where it resumes."""
        self.notes.append(text)


def train(visit: Visit, recipe_words: tuple[str, ...], directory: Path, **watched: Any) -> Observed:
    """Run the trainer as launcher/pretrain.py does, saves and evaluations included; return what was seen of it."""
    from launcher.command_line.compose import resolved_yaml
    from parallel.world import World

    recipe = prepare(visit, (*recipe_words, f"run.directory={directory}", f"run.device={visit.device}"))
    import dsv3_megatron.train.run as run

    seen, build, data = Observed(**watched), run.build_parts, run.build_data

    def build_and_show(*given: Any) -> Any:
        seen.parts = build(*given)
        return seen.parts

    run.build_parts = build_and_show

    def read_less(*given: Any, **more: Any) -> Any:
        found = data(*given, **more)
        return replace(found, held_out=found.held_out.of_at_most(HELD_OUT))

    run.build_data = read_less
    try:
        run.run(recipe, World(0, 1, 0), seen, resolved_yaml(recipe))
    finally:
        run.build_parts, run.build_data = build, data
    return seen


def weights_of(parts: Any) -> dict[str, Any]:
    """Return copies of this rank's parameters and router biases, by name, in host memory."""
    from dsv3_megatron.pipeline.parts import named_parameters

    found = {name: p.detach().float().cpu().clone() for name, p in named_parameters(parts).items()}
    for stage, chunk in parts.chunks.items():
        found |= {
            f"{stage}/{n}": b.detach().cpu().clone() for n, b in chunk.named_buffers() if n.endswith("expert_bias")
        }
    return found
