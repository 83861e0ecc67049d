"""What one rank trains with, and what of it checkpoints know. train/build.py makes it."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from dsv3_megatron.megatron.host import adapt_host
from dsv3_megatron.recipe import Recipe
from parallel.layout import Layout
from parallel.pipeline.actions import Schedule
from parallel.pipeline.engine import Engine
from parallel.pipeline.watchdog import NoWatchdog, Watchdog

adapt_host()

from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import MLATransformerConfig

from dsv3_megatron.model.initialise import global_name
from dsv3_megatron.pipeline.model_stages import ModelStages
from dsv3_megatron.pipeline.qk_clip import QkClip
from dsv3_megatron.pipeline.saved import Entry
from dsv3_megatron.pipeline.schedule import evaluation_schedule, schedule_of

# Kept at a time: a batch that ramps up has hundreds of numbers of microbatches, and a schedule of DeepSeek-V3's run, of
# all its pipeline ranks, has ten thousand actions.
_ENGINES = 4


class ExtraState(Protocol):
    """A state that is saved beside model and optimizer under a name: registered in :attr:`Parts.extra_states`."""

    def entries(self) -> Iterable[Entry]:
        """Return the boxes of this state that this rank holds. Keys of its tensors must not be those of the model:
        begin them with the state's name."""

    def loaded(self) -> None:
        """The memory of :meth:`entries` was filled from a checkpoint."""

    def begin_anew(self) -> None:
        """Model and optimizer were loaded from a checkpoint that does not hold this state: start from them."""


class WeightAverage(ExtraState, Protocol):
    """An average of the weights that is updated beside training (train/ema.py).

    Attributes:
        average: float32, by ``stageN.`` and the parameter's name in it: of each the run that this rank has a share of.
            What is frozen is its own average, and not in it.
    """

    average: dict[str, Tensor]

    def entries(self, *, but: AbstractSet[Tensor] = frozenset()) -> Iterable[Entry]:
        """Return the average's boxes, but for those of some parameters, which a checkpoint does not hold."""

    def begin_anew(self, parameters: AbstractSet[Tensor] | None = None) -> None:
        """Start from the weights as they are, all of them or those of some parameters."""

    def start(self) -> None:
        """Begin to average in the weights as they are."""

    def wait(self) -> None:
        """Wait until the weights may change again and the average is whole."""

    def copy_into_weights(self) -> None:
        """Make the average the model's weights."""


@dataclass
class Parts:
    """What one rank trains with. Stages are in ascending order everywhere: ranks that hold the same agree on it."""

    recipe: Recipe
    layout: Layout
    groups: ProcessGroupCollection
    device: torch.device
    backend: BackendSpecProvider
    layers_of_stages: tuple[int, ...]
    chunks: dict[int, GPTModel]
    ddps: dict[int, DistributedDataParallel]
    optimizer: MegatronOptimizer
    stages: ModelStages
    embedding_copy: torch.nn.Parameter | None
    _engines: dict[tuple[str, int], tuple[Schedule, Engine]] = field(default_factory=dict)
    watchdog: Watchdog | NoWatchdog = field(default_factory=NoWatchdog)
    ema: WeightAverage | None = None
    qk_clip: QkClip | None = None
    adamw: str = ""  # whose AdamW updates the weights
    extra_states: dict[str, ExtraState] = field(default_factory=dict)

    @property
    def data_rank(self) -> int:
        """This rank's data-parallel coordinate: which sequences of a batch it reads."""
        return self.layout.coordinates(dist.get_rank())["dp"]

    @property
    def reads_samples(self) -> bool:
        """Whether a stage here looks at the text: the first reads tokens, the last labels (and with multi-token
        prediction tokens), and every one the documents where they are isolated."""
        ends = (0, len(self.layers_of_stages) - 1)
        return self.recipe.data.isolate_documents or any(stage in self.chunks for stage in ends)

    @property
    def configs(self) -> list[MLATransformerConfig]:
        """The configurations of this rank's stages."""
        return [chunk.config for chunk in self.chunks.values()]

    @property
    def whole_model(self) -> GPTModel:
        """The model, where one rank holds it as one stage."""
        (chunk,) = self.chunks.values()
        return chunk

    def first_layer(self, stage: int) -> int:
        """Return the number (from 0) of a stage's first decoder layer."""
        return sum(self.layers_of_stages[:stage])

    def engine(self, microbatches: int, *, training: bool) -> tuple[Schedule, Engine]:
        """Return the schedule for so many microbatches and the engine that runs it; the latest few are kept."""
        key = ("train" if training else "forward", microbatches)
        found = self._engines.pop(key, None)
        if found is None:
            schedule = (schedule_of if training else evaluation_schedule)(self.recipe, microbatches)
            found = schedule, Engine(schedule, self.groups.pp, self.stages, self.watchdog, self.device)
            if len(self._engines) == _ENGINES:
                del self._engines[next(iter(self._engines))]  # not used for longest
        self._engines[key] = found
        return found


def named_parameters(parts: Parts) -> dict[str, torch.nn.Parameter]:
    """Return this rank's parameters, of all its stages, by their names in the whole model."""
    return {
        global_name(name, parts.first_layer(stage)): parameter
        for stage, chunk in parts.chunks.items()
        for name, parameter in chunk.named_parameters()
    }
