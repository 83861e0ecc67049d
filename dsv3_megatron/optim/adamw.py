"""AdamW for machines without Transformer Engine or Apex, with the interface megatron-core expects of their FusedAdam.

Decoupled weight decay (arXiv 1711.05101); moments may be held in BF16 while all arithmetic is float32
(arXiv 2412.19437 section 3.3.3). On GPUs TE's or Apex's is used where it is installed (optimizer.choose_adamw).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.optim.adamw import adamw

# Numbers updated together: float32 copies of BF16 moments, and what an update makes on the way, exist for so many at
# once, while a call of the kernels still serves many parameters.
_TOGETHER = 1 << 26


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
        if state:
            return
        for name, dtype in self.moments_of(param).items():
            state[name] = torch.zeros_like(param.data, dtype=dtype)
        if self._master_weights:
            state["master_param"] = param.detach().float().clone()

    def moments_of(self, param: Tensor) -> dict[str, torch.dtype]:
        """Return the names of what is kept of ``param``'s gradients, and the dtype that each is held in."""
        return self._moment_dtypes

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
                dtype = self.moments_of(param).get(name, torch.float32)
                self.state[param][name] = value.detach().to(device=param.device, dtype=dtype, copy=True)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # nobody here evaluates the loss again
        """Update every parameter that has a gradient."""
        self._update_all()

    def _update_all(self) -> None:
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for params in _portions([p for p in group["params"] if self._gradient(p) is not None]):
                self._update(group, params)

    def _gradient(self, param: Tensor) -> Tensor | None:
        return getattr(param, "decoupled_grad", None) if self._use_decoupled_grad else param.grad

    def _update(self, group: dict, params: list[Tensor]) -> None:
        """One multi-tensor update: the number of kernel calls does not grow with the number of parameters."""
        for param in params:
            self.initialize_state(param)
        states = [self.state[p] for p in params]
        gradients = [self._gradient(p).float() for p in params]
        weights = [s["master_param"] if self._master_weights else p.data for s, p in zip(states, params)]
        first = [s["exp_avg"].float() for s in states]  # the tensor itself where it is float32 already
        second = [s["exp_avg_sq"].float() for s in states]

        if all(m is s["exp_avg"] and v is s["exp_avg_sq"] for m, v, s in zip(first, second, states)):
            self._update_in_one_pass(group, weights, gradients, first, second)
        else:
            self._update_in_turns(group, weights, gradients, first, second)

        for state, m, v, weight, param in zip(states, first, second, weights, params):
            if state["exp_avg"] is not m:
                state["exp_avg"].copy_(m)
            if state["exp_avg_sq"] is not v:
                state["exp_avg_sq"].copy_(v)
            if self._master_weights:
                param.data.copy_(weight)

    @staticmethod
    def _update_in_one_pass(
        group: dict, weights: list[Tensor], gradients: list[Tensor], first: list[Tensor], second: list[Tensor]
    ) -> None:
        """torch's fused kernel: every number is read and written once."""
        beta1, beta2 = group["betas"]
        # It counts a step of its own, for each weight on the weight's device, before it uses it.
        steps = list(torch.full((len(weights),), group["step"] - 1.0, device=weights[0].device).unbind())
        adamw(
            weights,
            gradients,
            first,
            second,
            [],
            steps,
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    @staticmethod
    def _update_in_turns(
        group: dict, weights: list[Tensor], gradients: list[Tensor], first: list[Tensor], second: list[Tensor]
    ) -> None:
        """One pass an operation, for moments that are held in another dtype."""
        beta1, beta2 = group["betas"]
        torch._foreach_lerp_(first, gradients, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)
        denominators = torch._foreach_sqrt(second)
        torch._foreach_div_(denominators, (1 - beta2 ** group["step"]) ** 0.5)
        torch._foreach_add_(denominators, group["eps"])
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_addcdiv_(weights, first, denominators, -group["lr"] / (1 - beta1 ** group["step"]))


def longest_late_step(betas: tuple[float, float], updates: int) -> float:
    """Return how many times as long as Adam's a step can be of a weight whose moments begin with zeros when the
    optimizer has made ``updates`` updates already: its correction of young moments goes by that count."""
    beta1, beta2 = betas

    def young(beta: float, steps: int) -> float:
        return (1 - beta**steps) / (1 - beta ** (updates + steps))

    return max(young(beta1, steps) / young(beta2, steps) ** 0.5 for steps in range(1, 1000))


def _portions(params: list[Tensor]) -> Iterator[list[Tensor]]:
    """Yield the parameters in their order, ``_TOGETHER`` numbers at a time; a larger one alone."""
    portion: list[Tensor] = []
    size = 0
    for param in params:
        if portion and size + param.numel() > _TOGETHER:
            yield portion
            portion, size = [], 0
        portion.append(param)
        size += param.numel()
    if portion:
        yield portion
