"""Is a run that was saved and resumed the run that was not, bit for bit?"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

from benchmarks.gpu_check.outcome import Outcome, Outcomes, Visit, judged
from benchmarks.gpu_check.tiny import Observed, train, words

STEPS, SAVED_AT = 3, 2


def bit_exact(visit: Visit, backend: str, precision: str) -> Outcomes:
    """Two steps and a save, then a new start from there to the third; beside it three steps in one go."""
    import torch

    torch.use_deterministic_algorithms(True, warn_only=True)
    recipe = words(backend, precision)
    states: dict[str, str] = {}

    def run(where: str, steps: int, label: str) -> Observed:
        watched = {"at_start": lambda parts: states.update({f"{label} begins": state_of(parts)})}
        seen = train(visit, (*recipe, f"run.steps={steps}"), visit.scratch / where, **watched)
        states[f"{label} ends"] = state_of(seen.parts)
        return seen

    first = run("saved", SAVED_AT, "first")
    resumed = run("saved", STEPS, "resumed")
    whole = run("whole", STEPS, "whole")
    again = None
    if states["resumed ends"] != states["whole ends"]:  # do these kernels give one result at all?
        again = run("again", STEPS, "again")
    yield verdict(states, first.losses + resumed.losses, whole.losses, again.losses if again else None)


def verdict(
    states: dict[str, str], resumed: list[float], whole: list[float], again: list[float] | None = None
) -> Outcome:
    """Return whether state was loaded as it was saved, and training went on as if it had not stopped.

    Where two runs in one go (``whole`` and ``again``) already differ, the kernels of this device do, and only the state
    can be exact.
    """
    shown = f"losses {' '.join(f'{x:.6f}' for x in resumed)} resumed, {' '.join(f'{x:.6f}' for x in whole)} in one go"
    facts = {"states": states, "resumed": resumed, "whole": whole, "again": again}
    if len(resumed) != STEPS or len(whole) != STEPS:
        return judged(False, f"a run did not take {STEPS} steps: {shown}", **facts)
    if states["first ends"] != states["resumed begins"]:
        return judged(False, f"weights, moments or biases were loaded other than they were saved; {shown}", **facts)
    if states["resumed ends"] == states["whole ends"] and resumed == whole:
        return judged(True, f"bit for bit: state and {len(whole)} losses ({shown})", **facts)
    if again is not None and states["again ends"] != states["whole ends"]:
        return judged(
            True,
            f"state is loaded bit for bit; two runs in one go differ here too, so training cannot be: {shown}",
            **facts,
        )
    return judged(False, f"state is loaded as saved, but training does not go on as it would have: {shown}", **facts)


def state_of(parts: Any) -> str:
    """Return a digest of all that a step changes: weights, router biases, master weights and moments."""
    digest = hashlib.sha256()
    for name, value in _state(parts):
        digest.update(name.encode())
        digest.update(_bytes(value))
    return digest.hexdigest()


def _state(parts: Any) -> Iterator[tuple[str, Any]]:
    """Yield every tensor of the state by name, in one order."""
    for stage, chunk in parts.chunks.items():
        for name, parameter in chunk.named_parameters():
            yield f"{stage}/{name}", parameter
        for name, buffer in chunk.named_buffers():
            yield f"{stage}/{name}", buffer
    for number, one in enumerate(getattr(parts.optimizer, "chained_optimizers", [parts.optimizer])):
        for index, group in enumerate(one.optimizer.param_groups):
            for position, parameter in enumerate(group["params"]):
                where = f"optimizer {number}/{index}/{position}"
                yield where, parameter
                for key, value in sorted(one.optimizer.state[parameter].items()):
                    if hasattr(value, "detach"):
                        yield f"{where}/{key}", value


def _bytes(tensor: Any) -> bytes:
    import torch

    plain = tensor.detach()
    if type(plain) is not torch.Tensor:  # held in FP8 by Transformer Engine
        plain = plain.dequantize()
    return plain.cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
