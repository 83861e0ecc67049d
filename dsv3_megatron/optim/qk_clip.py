"""QK-clip: after an update, projections of heads whose attention logits grew too large are scaled down.

Source: MuonClip, arXiv 2507.20534 section 2.1, algorithm 1. A logit is the product of a query and a key. Of MLA's, each
head has a part without position of its own, of both of which the square root is taken, and a rotary part, of which
the query alone is its own: the rotary key is all heads', and stays as it is.

Legend: H heads on this rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from dsv3_megatron.optim.optimizer import parts_of, run_of


def head_factors(largest: Tensor, threshold: float) -> Tensor:
    """Return what each head's logits are to be multiplied with [H] float32: threshold / largest where the largest is
    above the threshold, else exactly 1; also where it is no finite number, of which nothing follows for the weights."""
    above = largest.isfinite() & (largest > threshold)
    return torch.where(above, threshold / largest, 1.0)


def query_rows(factors: Tensor, nope: int, rope: int) -> Tensor:
    """Return what each row of the query projection is multiplied with [H * (nope + rope)], from the heads' [H]."""
    return _rows((factors.sqrt(), nope), (factors, rope))


def key_value_rows(factors: Tensor, nope: int, value: int) -> Tensor:
    """Return the same of the up-projection of keys and values [H * (nope + value)]: values stay as they are."""
    return _rows((factors.sqrt(), nope), (torch.ones_like(factors), value))


def _rows(*parts: tuple[Tensor, int]) -> Tensor:
    return torch.cat([part[:, None].expand(-1, width) for part, width in parts], 1).flatten()


def scale_after_updates(optimizer: MegatronOptimizer, rows: Mapping[torch.nn.Parameter, Tensor]) -> None:
    """Let every update of the optimizer end with multiplying rows of parameters.

    It happens between the step of the inner optimizer, whichever that is, and the copy of float32 masters into the
    weights, which then follow in their own format. Moments stay as they are.

    Args:
        rows: [rows] float32 by parameter, looked at anew after each update; those that are not in it are not touched.
    """
    for part in parts_of(optimizer):
        part.optimizer.register_step_post_hook(partial(_scale, part, rows))


@torch.no_grad()
def _scale(part: Any, rows: Mapping[torch.nn.Parameter, Tensor], *of_hook: object) -> None:
    """Multiply this rank's runs of the parameters' masters (megatron-core 0.16.1's names for where they are)."""
    inner = part.optimizer
    for parameter, factors in rows.items():
        if (held := run_of(part, parameter)) is None:
            continue  # other ranks have all of it, or another of the chained optimizers has it
        run = part._get_model_param_range_map(parameter)["param"]
        master = inner.state[held].get("master_param")
        scale_run(held.data if master is None else master, factors, parameter.shape[1], run.start)
        if master is not None:  # the inner optimizer has made the weights of the masters already
            held.data.copy_(master)


def scale_run(run: Tensor, factors: Tensor, width: int, start: int) -> None:
    """Multiply, in place, a run of a matrix's numbers, row-major, by the factors of their rows.

    Args:
        run: [numbers] from number ``start`` of the matrix on; it may begin and end inside a row.
        factors: of all rows of the matrix. width: of a row.
    """
    row, begun = divmod(start, width)
    head = min(len(run), -begun % width)  # what is left of the row that was begun before this run
    whole = (len(run) - head) // width
    if head:
        run[:head].mul_(factors[row])
        row += 1
    middle = run[head : head + whole * width]
    middle.view(whole, width).mul_(factors[row : row + whole, None])
    tail = run[head + whole * width :]
    if len(tail):
        tail.mul_(factors[row + whole])
