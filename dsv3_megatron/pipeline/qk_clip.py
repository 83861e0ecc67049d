"""QK-clip of a rank's stages: the largest logits of a step, of all ranks, and what is clipped for them.

Legend: L attention layers of the model, those of the multi-token-prediction modules last; H heads of the model.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.multi_latent_attention import MultiLatentAttention
from torch import Tensor

from dsv3_megatron.model.heads import heads_of
from dsv3_megatron.model.layers.max_logits import MaxLogits, watch_logits
from dsv3_megatron.model.settings import ModelSettings
from dsv3_megatron.optim.qk_clip import head_factors, key_value_rows, query_rows, scale_after_updates

_LAYER = re.compile(r"(decoder|mtp)\.layers\.(\d+)\.")


@dataclass(frozen=True)
class HeadLogits:
    """The largest attention logits of a step.

    Attributes:
        largest: [L, H] float32; infinite where a logit was no finite number.
        clipped: how many heads are above the threshold.
    """

    largest: np.ndarray
    clipped: int


@dataclass(frozen=True)
class _Layer:
    """An attention on this rank: where its largest logits are found, and the weights that make queries and keys."""

    logits: MaxLogits
    query: torch.nn.Parameter
    key_value: torch.nn.Parameter


class QkClip:
    """Watches the logits of this rank's stages, and clips after each update of the optimizer."""

    def __init__(
        self,
        chunks: dict[int, GPTModel],
        first_layers: dict[int, int],
        optimizer: MegatronOptimizer,
        groups: ProcessGroupCollection,
        model: ModelSettings,
        threshold: float,
    ):
        """Take this rank's stages.

        Args:
            first_layers: of every stage the number of its first decoder layer.
            threshold: the largest logit that is left alone (tau).
        """
        self._model, self._threshold, self._tp = model, threshold, groups.tp
        self._device = next(parameter.device for chunk in chunks.values() for parameter in chunk.parameters())
        self._layers = {
            _number(name, first_layers[stage], model): _watched(module)
            for stage, chunk in chunks.items()
            for name, module in chunk.named_modules()
            if isinstance(module, MultiLatentAttention)
        }
        self._rows: dict[torch.nn.Parameter, Tensor] = {}
        scale_after_updates(optimizer, self._rows)

    @torch.no_grad()
    def take(self) -> HeadLogits:
        """Return the largest logits since the last call, over all microbatches and ranks, and let the next update clip
        by them. Collective: the one exchange that QK-clip needs, of 4 bytes a head of the model."""
        model = self._model
        layers = model.num_hidden_layers + model.num_nextn_predict_layers
        shape = (layers, self._tp.size(), model.num_attention_heads // self._tp.size())
        table = torch.full(shape, float("-inf"), device=self._device)
        for number, layer in self._layers.items():
            # Whether a maximum over ranks is NaN where one of them is depends on the backend.
            table[number, self._tp.rank()] = layer.logits.take().nan_to_num(float("inf"), float("inf"), float("-inf"))
        dist.all_reduce(table, op=dist.ReduceOp.MAX)
        found = table.cpu()
        self._prepare(head_factors(found, self._threshold)[:, self._tp.rank()])
        whole = found.flatten(1)
        return HeadLogits(whole.numpy(), int((head_factors(whole, self._threshold) < 1).sum()))

    def _prepare(self, factors: Tensor) -> None:
        """Let the next update multiply by ``factors`` [L, heads on this rank]."""
        self._rows.clear()
        heads = heads_of(self._model)
        for number, layer in self._layers.items():
            if (factors[number] < 1).any():
                self._rows[layer.query] = query_rows(factors[number], heads.nope, heads.rope).to(self._device)
                self._rows[layer.key_value] = key_value_rows(factors[number], heads.nope, heads.value).to(self._device)


def _number(name: str, first_layer: int, model: ModelSettings) -> int:
    """Return the number of an attention in the model, by its name in a stage."""
    match = _LAYER.search(name)
    assert match is not None, f"{name} is an attention outside the layers"
    kind, number = match.groups()
    return int(number) + (model.num_hidden_layers if kind == "mtp" else first_layer)


def _watched(attention: MultiLatentAttention) -> _Layer:
    full_rank = attention.config.q_lora_rank is None
    query = attention.linear_q_proj if full_rank else attention.linear_q_up_proj
    return _Layer(watch_logits(attention), query.weight, attention.linear_kv_up_proj.weight)
