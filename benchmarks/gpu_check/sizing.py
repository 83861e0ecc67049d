"""How much of DeepSeek-V3 one GPU can train: the largest of a few shapes whose plan fits the memory found.

Widths are the published model's in all of them; what differs is how many layers, experts and words there are and how
long a sequence is. The smallest have no dense layer, and route every token to each of their eight experts.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsv3_megatron.planning.memory.formulae import estimate_stages
from dsv3_megatron.planning.plan import Plan, make_plan
from dsv3_megatron.recipe import Recipe
from launcher.command_line.compose import compose
from parallel.errors import DoesNotFitError

RECIPE = "dsv3_one_gpu"
# Of the memory found: a measurement is to end, not to fill the GPU, and the plan's own error is part of what it shows.
USABLE = 0.85
_HARDWARE = {"H200": "h200_1", "H100": "h200_1"}  # the same compute; memory is set to what is found


@dataclass(frozen=True)
class Shape:
    """What of the recipe depends on the memory."""

    layers: int
    dense: int
    experts: int
    sequence: int
    vocabulary: int

    def words(self) -> tuple[str, ...]:
        """Return the overrides of the recipe."""
        groups = 4 if self.experts > 8 else 1  # eight experts for eight choices: nothing to limit by groups
        return (
            f"model.num_hidden_layers={self.layers}",
            f"model.first_k_dense_replace={self.dense}",
            f"model.n_routed_experts={self.experts}",
            f"model.n_group={groups}",
            f"model.topk_group={groups}",
            f"model.vocab_size={self.vocabulary}",
            f"model.max_position_embeddings={max(4096, self.sequence)}",
            f"data.sequence_length={self.sequence}",
        )


SHAPES = (  # largest first; the second is the recipe as it stands
    Shape(5, 1, 32, 4096, 32768),
    Shape(3, 1, 16, 4096, 32768),
    Shape(2, 1, 16, 4096, 32768),
    Shape(2, 1, 8, 4096, 32768),
    Shape(2, 1, 8, 2048, 8192),
    Shape(1, 0, 8, 2048, 8192),
    Shape(1, 0, 8, 1024, 4096),
)


def sized(memory_bytes: int, *, gpu: str = "") -> tuple[str, ...]:
    """Return the recipe, as command-line words, of the largest shape whose plan fits in every precision and backend.

    Args:
        memory_bytes: of the whole device.
        gpu: its name; the planner's compute figures are set where they are known.
    Raises: DoesNotFitError: not even the smallest fits.
    """
    for shape in SHAPES:
        words = (f"recipe={RECIPE}", *_cluster(memory_bytes, gpu), *shape.words())
        fullest = compose([*words, "precision=fp8", "backend=te"])  # BF16 weights and FP8 copies beside them
        if plan_of(fullest).tightest.total_bytes <= USABLE * memory_bytes:
            return words
    raise DoesNotFitError(
        f"memory = {memory_bytes / 2**30:.1f} GiB is too little for one layer of DeepSeek-V3's widths with eight "
        "experts; take a GPU with 16 GiB or more"
    )


def sized_here(recipe: str = "") -> tuple[str, ...]:
    """Return the recipe of that name as words; without one that which fits this machine's first GPU."""
    if recipe:
        return (f"recipe={recipe}",)
    import torch

    found = torch.cuda.get_device_properties(0)
    return sized(found.total_memory, gpu=found.name)


def plan_of(recipe: Recipe, *, exact: bool = False) -> Plan:
    """Return the plan on one GPU: by formulae, or ``exact``, by the real modules on fake tensors."""
    return make_plan(recipe, 1, measure=None if exact else estimate_stages)


def _cluster(memory_bytes: int, gpu: str) -> tuple[str, ...]:
    known = next((name for word, name in _HARDWARE.items() if word in gpu), None)
    peak = () if known else ("~cluster.peak_tflops",)  # no share of a peak that is not known
    return (f"cluster={known or 'h200_1'}", *peak, f"cluster.memory={memory_bytes}")
