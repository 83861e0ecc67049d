"""AdamW for machines without Transformer Engine or Apex, with the interface megatron-core expects of their FusedAdam.

Decoupled weight decay (arXiv 1711.05101); moments may be held in BF16 while all arithmetic is float32
(arXiv 2412.19437 section 3.3.3). Where TE or Apex is installed megatron-core uses theirs and this file is not read.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class FusedAdam(torch.optim.Optimizer):
    """AdamW whose step counter lives in the parameter group, as TE's does.

    Derives from ``torch.optim.Optimizer``, not from torch's AdamW, whose ``__setstate__`` wants a step in every
    parameter's state, where megatron-core's distributed optimizer keeps none.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        exp_avg_dtype: torch.dtype = torch.float32,
        exp_avg_sq_dtype: torch.dtype = torch.float32,
        master_weights: bool = False,
        use_decoupled_grad: bool = False,
        **unused: object,
    ):
        self._moment_dtypes = {"exp_avg": exp_avg_dtype, "exp_avg_sq": exp_avg_sq_dtype}
        self._master_weights = master_weights
        self._use_decoupled_grad = use_decoupled_grad
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def initialize_state(self, param: Tensor, store_param_remainders: bool = False) -> None:
        """Give ``param`` zero moments, and a float32 master copy where asked for, unless it has them."""
        state = self.state[param]
        if "exp_avg" in state:
            return
        for name, dtype in self._moment_dtypes.items():
            state[name] = torch.zeros_like(param.data, dtype=dtype)
        if self._master_weights:
            state["master_param"] = param.detach().float().clone()

    def get_unscaled_state(self, param: Tensor, name: str) -> Tensor:
        """Return a state of ``param`` in float32."""
        return self.state[param][name].float()

    def set_scaled_state(self, param: Tensor, name: str, value: Tensor) -> None:
        """Overwrite a state of ``param``, in the dtype it is held in."""
        self.initialize_state(param)
        self.state[param][name].copy_(value)

    def load_state_dict(self, state_dict: dict) -> None:
        """Take over a state. torch casts every state to its parameter's dtype, which would cut float32 masters of BF16
        parameters (and widen BF16 moments): they are put back in the dtype they are held in."""
        super().load_state_dict(state_dict)
        params = [p for group in self.param_groups for p in group["params"]]
        for number, param in enumerate(params):
            for name, value in state_dict["state"].get(number, {}).items():
                dtype = self._moment_dtypes.get(name, torch.float32)
                self.state[param][name] = value.detach().to(device=param.device, dtype=dtype, copy=True)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            params = [p for p in group["params"] if self._gradient(p) is not None]
            if params:
                self._update(group, params)

    def _gradient(self, param: Tensor) -> Tensor | None:
        return getattr(param, "decoupled_grad", None) if self._use_decoupled_grad else param.grad

    def _update(self, group: dict, params: list[Tensor]) -> None:
        """One multi-tensor update: the number of kernel calls does not grow with the number of parameters."""
        beta1, beta2 = group["betas"]
        for param in params:
            self.initialize_state(param)
        states = [self.state[p] for p in params]
        gradients = [self._gradient(p).float() for p in params]
        weights = [s["master_param"] if self._master_weights else p.data for s, p in zip(states, params)]
        first = [s["exp_avg"].float() for s in states]  # the tensor itself where it is float32 already
        second = [s["exp_avg_sq"].float() for s in states]

        torch._foreach_lerp_(first, gradients, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)
        denominators = torch._foreach_sqrt(second)
        torch._foreach_div_(denominators, (1 - beta2 ** group["step"]) ** 0.5)
        torch._foreach_add_(denominators, group["eps"])
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_addcdiv_(weights, first, denominators, -group["lr"] / (1 - beta1 ** group["step"]))

        for state, m, v, weight, param in zip(states, first, second, weights, params):
            if state["exp_avg"] is not m:
                state["exp_avg"].copy_(m)
            if state["exp_avg_sq"] is not v:
                state["exp_avg_sq"].copy_(v)
            if self._master_weights:
                param.data.copy_(weight)
