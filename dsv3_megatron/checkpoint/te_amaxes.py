"""The scales of delayed scaling on Transformer Engine, as an extra state of checkpoints that only the te backend has.

TE pickles them into every module's ``_extra_state`` and unpickles them only where it is allowed to run what a file
holds; megatron-core cuts those of grouped layers by expert as if all inputs came first, then all weights, where TE
2.20.2 puts the three of one expert side by side. Here they are tensors like all others, by layer and expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from dsv3_megatron.model.initialise import global_name
from dsv3_megatron.model.stage import is_routed_expert
from dsv3_megatron.pipeline.saved import Entry

NAME = "te_amaxes"


class TeAmaxes:
    """Scales and amax histories of this rank's stages (pipeline.parts.ExtraState)."""

    def __init__(
        self, chunks: dict[int, torch.nn.Module], first_layers: dict[int, int], groups: ProcessGroupCollection
    ):
        """``chunks``: this rank's stages; ``first_layers``: the number of each one's first decoder layer, from 0."""
        self._chunks, self._first_layers, self._groups = chunks, first_layers, groups

    def entries(self) -> Iterator[Entry]:
        """Yield the state of every layer, an expert's [1, ...] as its place in [experts, ...].

        All ranks have the same amaxes, those of the largest: each is saved by the first that holds the layer.
        """
        groups = self._groups
        for name, module in self._layers():
            experts = is_routed_expert(f"{name}.")
            tp, dp = (groups.expt_tp, groups.expt_dp) if experts else (groups.tp, groups.dp_cp)
            writes = tp.rank() == dp.rank() == 0
            for part, tensor in _tensors(module).items():
                count, number = (groups.ep.size(), groups.ep.rank()) if experts else (1, 0)
                whole = (count * tensor.shape[0], *tensor.shape[1:])
                start = (number * tensor.shape[0], *(0,) * (tensor.ndim - 1))
                yield Entry(f"{NAME}.{name}.{part}", whole, start, tensor.detach(), writes, dp)

    def loaded(self) -> None:
        """Let the layers' histories move on from the state that was filled."""
        for _, module in self._layers():
            _let_age(module)

    def begin_anew(self) -> None:
        """Start as a run does: scales of one, no amax seen."""
        for _, module in self._layers():
            module.reset_fp8_meta_tensors()

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """Leave no trace of what runs inside: an evaluation would hand its amaxes to the next step."""
        before = [(tensor, tensor.clone()) for _, module in self._layers() for tensor in _tensors(module).values()]
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, kept in before:
                    tensor.copy_(kept)

    def _layers(self) -> list[tuple[str, torch.nn.Module]]:
        """Return the layers that multiply in FP8, by their names in the whole model, with their state made."""
        found = []
        for stage, chunk in self._chunks.items():
            with torch.no_grad(), get_fp8_context(chunk.config):
                for name, module in chunk.named_modules():
                    # Attention without its projections has the attribute too, and multiplies in no FP8.
                    if hasattr(module, "fp8_meta") and any(True for _ in module.parameters(recurse=False)):
                        module.init_fp8_metadata(getattr(module, "num_gemms", 1))  # as the first forward does
                        found.append((global_name(name, self._first_layers[stage]), module))
        return found


def _let_age(module: torch.nn.Module) -> None:
    """Let a layer's history move on from the first forward of any layer on, as in the run that was saved; TE would
    begin with the layer's own first forward."""
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager  # only where te is the backend

    FP8GlobalStateManager.add_fp8_tensors_to_global_buffer(module.fp8_meta)


def _tensors(module: torch.nn.Module) -> dict[str, Tensor]:
    """Return views of a layer's scales [G, R] and amax histories [G, H, R]: G products, R roles (input, weight, output;
    or two gradients), H steps."""
    products, found = module.fp8_meta["num_gemms"], {}
    for name in ("scaling_fwd", "scaling_bwd"):
        state = module.fp8_meta[name]
        found[f"{name}.scale"] = state.scale.view(products, -1)
        found[f"{name}.amax_history"] = state.amax_history.unflatten(1, (products, -1)).transpose(0, 1)
    return found
