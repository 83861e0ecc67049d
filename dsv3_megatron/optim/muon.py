"""Muon for matrices and AdamW for the rest, as one optimizer over this rank's runs of the parameters.

A step: M <- mu M + (1 - mu) G; O = NewtonSchulz((1 - mu) G + mu M) with Nesterov's look ahead, else of M;
W <- (1 - lr decay) W - lr scale sqrt(max(n, m)) O (arXiv 2502.16982 equation 4; Newton-Schulz divides by the norm, so
that the published M <- mu M + G gives the same). All but Newton-Schulz is of each number alone, and is done where the
number is held; only what is orthogonalised, and what comes of it, travels (``exchange``).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from dsv3_megatron.optim.adamw import FusedAdam
from dsv3_megatron.optim.exchange import Exchange
from dsv3_megatron.optim.newton_schulz import orthogonalise
from dsv3_megatron.optim.settings import MuonSettings
from dsv3_megatron.optim.spread import Box, Held

MOMENTUM = "momentum_buffer"  # torch.optim.Muon's name of it


def arithmetic(settings: MuonSettings, device: torch.device) -> torch.dtype:
    """Return the dtype of Newton-Schulz, and of what ranks exchange for it."""
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[settings.arithmetic_on(device.type)]


@dataclass(frozen=True)
class Piece:
    """A box of a matrix that a rank holds, in the run of the parameter that it belongs to."""

    box: Box
    parameter: Tensor  # the run, as the optimizer has it
    strides: tuple[int, int]
    offset: int

    @classmethod
    def of(cls, held: Held, parameter: Tensor) -> Piece:
        """Return it for a box held in the run that ``parameter`` is."""
        return cls(held.box, parameter, held.strides, held.offset)

    def view(self, run: Tensor) -> Tensor:
        """Return the box [rows, columns] in a state of the run."""
        size = (self.box.rows, self.box.columns)
        return run.as_strided(size, self.strides, run.storage_offset() + self.offset)


class MuonWithAdamW(FusedAdam):
    """AdamW, but for the parameters that :meth:`let_muon` names."""

    def __init__(self, *args: Any, **kwargs: Any):
        self._matrices: dict[Tensor, None] = {}  # a set in the order in which they were named
        self._pieces: list[Piece] = []
        self._muon = MuonSettings()
        self.exchange: Exchange | None = None
        super().__init__(*args, **kwargs)

    def let_muon(
        self, parameters: Iterable[Tensor], pieces: Iterable[Piece], exchange: Exchange, settings: MuonSettings
    ) -> None:
        """Update ``parameters`` by Muon. Call before the first step, on all ranks of the exchange.

        Args:
            parameters: runs of which matrices own every number.
            pieces: the boxes of matrices that lie in them, in the order of the exchange's plan.
        """
        self._matrices = dict.fromkeys(parameters)
        self._pieces, self._muon, self.exchange = list(pieces), settings, exchange

    def moments_of(self, param: Tensor) -> dict[str, torch.dtype]:
        """Return the momentum of a matrix, held in the dtype of first moments; AdamW's two moments of the rest."""
        moments = super().moments_of(param)
        return {MOMENTUM: moments["exp_avg"]} if param in self._matrices else moments

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # nobody here evaluates the loss again
        """Update every parameter that has a gradient; of matrices all have one. Collective."""
        if self.exchange is None:
            self._update_all()
            return
        group_of = {param: group for group in self.param_groups for param in group["params"]}
        self._update_momentum()
        self.exchange.run(
            self._fill,
            lambda stack: orthogonalise(stack, self._muon.steps, self._muon.coefficients),
            lambda places, updates: self._take(places, updates, group_of),
            beside=lambda: self._update_the_rest(group_of),
        )
        if self._master_weights:
            for param in self._matrices:
                param.data.copy_(self.state[param]["master_param"])

    def _gradient(self, param: Tensor) -> Tensor | None:
        """Return the gradient that AdamW is to use: of a matrix, none."""
        return None if param in self._matrices else super()._gradient(param)

    def _gradients(self) -> dict[Tensor, Tensor]:
        """Return the gradients of the runs of matrices, as they are held."""
        found = {param: super(MuonWithAdamW, self)._gradient(param) for param in self._matrices}
        return {param: gradient for param, gradient in found.items() if gradient is not None}

    def _update_momentum(self) -> None:
        for param, gradient in self._gradients().items():
            self.initialize_state(param)
            momentum = self.state[param][MOMENTUM]
            new = momentum.float().lerp_(gradient.float(), 1 - self._muon.momentum)
            if new is not momentum:
                momentum.copy_(new)

    def _update_the_rest(self, group_of: dict[Tensor, dict]) -> None:
        """What is done while matrices travel: AdamW's parameters, and the decay of matrices."""
        self._update_all()  # not AdamW's step: torch calls the hooks of a step around each class's
        for param in self._matrices:
            group = group_of[param]
            self._weight(param).mul_(1 - group["lr"] * group["weight_decay"])

    def _weight(self, param: Tensor) -> Tensor:
        """Return the float32 weights of a run."""
        return self.state[param]["master_param"] if self._master_weights else param.data

    def _fill(self, places: list[int], views: list[Tensor]) -> None:
        """Write the boxes at ``places``, of what is orthogonalised, into ``views``."""
        gradients = self._gradients()
        for place, view in zip(places, views):
            piece = self._pieces[place]
            momentum = piece.view(self.state[piece.parameter][MOMENTUM])
            if self._muon.nesterov:
                gradient = piece.view(gradients[piece.parameter]).float()
                momentum = torch.lerp(gradient, momentum.float(), self._muon.momentum)
            view.copy_(momentum)

    def _take(self, places: list[int], updates: list[Tensor], group_of: dict[Tensor, dict]) -> None:
        """Change the boxes at ``places`` of the weights by what their owners made of them."""
        assert self.exchange is not None
        for place, update in zip(places, updates):
            piece = self._pieces[place]
            longer = max(self.exchange.plan.shapes[piece.box.matrix])
            rate = group_of[piece.parameter]["lr"] * self._muon.scale * sqrt(longer)
            piece.view(self._weight(piece.parameter)).add_(update, alpha=-rate)
