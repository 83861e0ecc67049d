"""What one matrix is, and which optimizer updates a parameter: declared here, by name, and nowhere else.

Muon's update of a matrix depends on all of it, so that what counts as one is a part of the recipe's mathematics and not
of the layout's. Names and shapes are those of checkpoints, which no layout changes: one tensor there may be several
matrices (gate and up of a SwiGLU, every expert of a stack), and ``optim.muon`` has variants of some.

As published (Moonlight, arXiv 2502.16982 section 2.2; Kimi-K2, arXiv 2507.20534): Muon for every matrix as the
published weights have it, AdamW for norms, embedding and head. Variants by head are GLM-5's (arXiv 2602.15763, "Muon
Split"), which orthogonalises every head's part of the up-projections alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from dsv3_megatron.optim.settings import OptimSettings
from parallel.errors import RecipeError

Runs = tuple[tuple[int, int], ...]  # [start, end) of rows or columns


@dataclass(frozen=True)
class Heads:
    """The shape of multi-head latent attention, of the whole model: what splits by head need to know."""

    count: int
    nope: int  # width of a head's query and key without position
    rope: int  # width of its query with rotary position
    value: int


@dataclass(frozen=True)
class Matrix:
    """Where one matrix lies in a tensor of a checkpoint.

    Attributes:
        name: of the tensor, and of the part of it that this is.
        key: the tensor.
        expert: its number in a stack of experts; None in a tensor that is no stack.
        rows, columns: runs of the tensor's last two axes, which together are the matrix.
    """

    name: str
    key: str
    expert: int | None
    rows: Runs
    columns: Runs

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix."""
        return _length(self.rows), _length(self.columns)


# Of a tensor [rows, columns]: the parts that are one matrix each, as (name, rows, columns).
_Split = Callable[[int, int], Iterator[tuple[str, Runs, Runs]]]


@dataclass(frozen=True)
class Rule:
    """How parameters whose name ends so are updated. ``split`` None: by AdamW."""

    pattern: str
    split: _Split | None
    why: str


def rules(optim: OptimSettings, heads: Heads) -> tuple[Rule, ...]:
    """Return the table: the first rule whose pattern a name matches holds."""
    if optim.name == "adamw":
        return (Rule(r".*", None, "optim.name = adamw"),)
    muon = optim.muon
    query = {"whole": _whole, "head": _equal_rows(heads.count, "head")}[muon.query]
    key_value = {
        "whole": _whole,
        "parts": _alternating_rows(heads.count, heads.nope, heads.value),
        "head": _alternating_rows(heads.count, heads.nope, heads.value, by_head=True),
    }[muon.key_value]
    output = {"whole": _whole, "head": _equal_columns(heads.count)}[muon.output]
    router = {"muon": _whole, "adamw": None}[muon.router]
    return (
        Rule(r".*norm\.weight", None, "a vector"),
        Rule(r"embedding\..*", None, "embedding (Moonlight 2.2)"),
        Rule(r"output_layer\..*", None, "head (Moonlight 2.2)"),
        Rule(r".*\.linear_q_down_proj\.weight", _whole, "q_a"),
        Rule(r".*\.linear_q(_up)?_proj\.weight", query, f"q_b; optim.muon.query = {muon.query}"),
        Rule(r".*\.linear_kv_down_proj\.weight", _whole, "kv_a"),
        Rule(r".*\.linear_kv_up_proj\.weight", key_value, f"kv_b; optim.muon.key_value = {muon.key_value}"),
        Rule(r".*\.self_attention\.linear_proj\.weight", output, f"o; optim.muon.output = {muon.output}"),
        Rule(r".*\.router\.weight", router, f"gate; optim.muon.router = {muon.router}"),
        Rule(r".*\.linear_fc1\.weight", _gate_and_up, "gate and up of SwiGLU"),
        Rule(r".*\.linear_fc2\.weight", _whole, "down of SwiGLU"),
        Rule(r"mtp\..*\.eh_proj\.weight", _whole, "multi-token prediction's projection"),
    )


def rule_of(key: str, shape: Sequence[int], table: Sequence[Rule]) -> Rule:
    """Return the rule that a parameter falls under.

    Args:
        key: its name in checkpoints.
        shape: of the whole tensor.
    Raises: RecipeError: no rule names it. One that is neither a matrix nor a stack of them is AdamW's by any rule.
    """
    rule = next((rule for rule in table if re.fullmatch(rule.pattern, key)), None)
    if rule is None:
        raise RecipeError(
            f"optim.name = muon, but no rule says what a matrix is in {key} {list(shape)} "
            f"(dsv3_megatron/optim/matrices.py); set optim.name=adamw"
        )
    return rule


def matrices_in(key: str, shape: Sequence[int], table: Sequence[Rule]) -> Iterator[Matrix]:
    """Yield the matrices of a tensor [rows, columns] or [experts, rows, columns]; none of one that is AdamW's."""
    split = rule_of(key, shape, table).split
    if split is None:
        return
    *stack, rows, columns = shape
    experts: Sequence[int | None] = range(stack[0]) if stack else (None,)
    for expert in experts:
        for part, part_rows, part_columns in split(rows, columns):
            place = "" if expert is None else f"[{expert}]"
            yield Matrix(f"{key}{place}{part}", key, expert, part_rows, part_columns)


# -- the ways to split -------------------------------------------------------------------------------------------------


def _whole(rows: int, columns: int) -> Iterator[tuple[str, Runs, Runs]]:
    yield "", ((0, rows),), ((0, columns),)


def _gate_and_up(rows: int, columns: int) -> Iterator[tuple[str, Runs, Runs]]:
    yield ".gate", ((0, rows // 2),), ((0, columns),)
    yield ".up", ((rows // 2, rows),), ((0, columns),)


def _equal_rows(count: int, name: str) -> _Split:
    def split(rows: int, columns: int) -> Iterator[tuple[str, Runs, Runs]]:
        each = rows // count
        for part in range(count):
            yield f".{name}{part}", ((part * each, (part + 1) * each),), ((0, columns),)

    return split


def _equal_columns(count: int) -> _Split:
    def split(rows: int, columns: int) -> Iterator[tuple[str, Runs, Runs]]:
        each = columns // count
        for part in range(count):
            yield f".head{part}", ((0, rows),), ((part * each, (part + 1) * each),)

    return split


def _alternating_rows(count: int, first: int, second: int, *, by_head: bool = False) -> _Split:
    """Rows that hold, head after head, a key part and a value part: all heads' keys are one matrix and all values
    another, or each head's are."""

    def split(rows: int, columns: int) -> Iterator[tuple[str, Runs, Runs]]:
        each = first + second
        keys = tuple((head * each, head * each + first) for head in range(count))
        values = tuple((head * each + first, (head + 1) * each) for head in range(count))
        for name, runs in ((".k", keys), (".v", values)):
            if by_head:
                for head, run in enumerate(runs):
                    yield f"{name}.head{head}", (run,), ((0, columns),)
            else:
                yield name, runs, ((0, columns),)

    return split


def _length(runs: Runs) -> int:
    return sum(end - start for start, end in runs)
