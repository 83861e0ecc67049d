"""Are weights quantised anew after each step, or does FP8 go on multiplying by those of the first?"""

from __future__ import annotations

from typing import Any

from benchmarks.gpu_check.outcome import Outcome, Outcomes, Visit, judged
from benchmarks.gpu_check.tiny import stepper, weights_of, words

STEPS = 2
RATE = "optim.learning_rate=1e-3"
# Not in FP8: what these hold is the same in all three losses below.
HIGH = ("embedding", "output_layer", "router", "layernorm", "layer_norm", "norm.", "expert_bias")
ALLOWED = 0.02  # of the difference that old weights make
LEAST = 1e-3  # nats that old weights must make, or the check could not see them


def weights_follow(visit: Visit, backend: str, precision: str) -> Outcomes:
    """The loss of a model that trains, beside that of a new model given the same weights.

    A third model gets the FP8 layers' weights from before the training, which is what stale FP8 copies amount to.
    """
    recipe = words(backend, precision)
    with stepper(visit, recipe) as step:
        before = weights_of(step.parts)
        for _ in range(STEPS):
            step(0)
        after = weights_of(step.parts)
        trained = step(0).lm_loss
    new = _loss_with(visit, recipe, after)
    stale = {name: (value if any(word in name for word in HIGH) else before[name]) for name, value in after.items()}
    yield verdict(trained, new, _loss_with(visit, recipe, stale))


def verdict(trained: float, new: float, old: float) -> Outcome:
    """Return whether the trained model's loss is that of its weights (``new``) and not of older ones (``old``)."""
    gap, apart = abs(old - new), abs(trained - new)
    said = (
        f"loss {trained:.5f} after {STEPS} steps, {new:.5f} by a new model with its weights, {old:.5f} with the FP8 "
        "layers' weights of before"
    )
    facts = {"trained": trained, "new": new, "old": old}
    if not gap > LEAST:
        return judged(False, f"{said}: too near to tell", **facts)
    return judged(apart <= ALLOWED * gap, said, **facts)


def _loss_with(visit: Visit, recipe: tuple[str, ...], weights: dict[str, Any]) -> float:
    """Return the loss of the first batch by a new model with these weights."""
    import torch

    from dsv3_megatron.pipeline.parts import named_parameters

    with stepper(visit, recipe) as step, torch.no_grad():
        for name, parameter in named_parameters(step.parts).items():
            parameter.copy_(weights[name].to(parameter.device, parameter.dtype))
        for stage, chunk in step.parts.chunks.items():
            for name, buffer in chunk.named_buffers():
                if name.endswith("expert_bias"):
                    buffer.copy_(weights[f"{stage}/{name}"])
        with torch.enable_grad():
            return step(0).lm_loss
