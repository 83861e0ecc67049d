"""Who orthogonalises what: whole matrices from any cut, even work, bounded rounds, little traffic."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_megatron.checkpoint.boxes import boxes_of_run, strides_of
from dsv3_megatron.optim.matrices import Matrix
from dsv3_megatron.optim.spread import SLACK, Box, Holding, Piece, boxes_of, make_plan, products


@st.composite
def cut_tensors(draw):
    """Return the shape of a tensor, its matrices, which leave nothing out, and cuts of its numbers."""
    experts, parts = draw(st.integers(0, 3)), draw(st.integers(1, 4))
    block, columns, split = draw(st.integers(1, 3)), draw(st.integers(1, 6)), draw(st.integers(1, 2))
    rows = block * parts * 2
    shape = (*((experts,) if experts else ()), rows, columns * split)
    matrices = []
    for expert in range(experts) if experts else (None,):
        for part in range(parts):  # every parts-th block of rows, as heads' keys and values alternate
            runs = tuple((start, start + block) for start in range(part * block, rows, parts * block))
            for at in range(split):
                name = f"[{expert}].{part}.{at}"
                matrices.append(Matrix(name, "t", expert, runs, ((at * columns, (at + 1) * columns),)))
    size = int(np.prod(shape))
    cuts = sorted(draw(st.lists(st.integers(0, size), min_size=0, max_size=5)))
    return shape, matrices, [0, *cuts, size]


def pieces_of(shape, start, end):
    strides = strides_of(shape)
    for box in boxes_of_run(shape, start, end, 7):
        yield Piece(box.start, box.extent, strides, sum(a * b for a, b in zip(box.start, strides)) - start)


@given(cut_tensors())
def test_boxes_of_all_runs_make_every_matrix_and_nothing_twice(tensor):
    shape, matrices, cuts = tensor
    numbers = np.arange(np.prod(shape))
    made = {m.name: np.full(m.shape, -1) for m in matrices}
    for start, end in pairwise(cuts):
        run = numbers[start:end]
        for piece in pieces_of(shape, start, end):
            for matrix in matrices:
                for held in boxes_of(matrix, piece):
                    box, (down, across) = held.box, held.strides
                    places = held.offset + down * np.arange(box.rows)[:, None] + across * np.arange(box.columns)
                    target = made[matrix.name][box.row : box.row + box.rows, box.column : box.column + box.columns]
                    assert target.shape == places.shape and (target == -1).all()
                    target[:] = run[places]
    whole = numbers.reshape(shape)
    for matrix in matrices:
        tensor = whole if matrix.expert is None else whole[matrix.expert]
        rows = np.concatenate([np.arange(*run) for run in matrix.rows])
        columns = np.concatenate([np.arange(*run) for run in matrix.columns])
        assert (made[matrix.name] == tensor[np.ix_(rows, columns)]).all()


@st.composite
def held_matrices(draw):
    ranks = draw(st.integers(1, 9))
    shapes = {f"m{i}": draw(st.tuples(st.integers(1, 40), st.integers(1, 40))) for i in range(draw(st.integers(1, 30)))}
    boxes = [[] for _ in range(ranks)]
    for name, (rows, columns) in shapes.items():
        first, second = draw(st.integers(0, ranks - 1)), draw(st.integers(0, ranks - 1))
        cut = draw(st.integers(0, rows))
        boxes[first] += [Box(name, 0, cut, 0, columns)] if cut else []
        boxes[second] += [Box(name, cut, rows - cut, 0, columns)] if cut < rows else []
    return shapes, [Holding(tuple(each)) for each in boxes]


@given(held_matrices(), st.integers(1, 4000))
def test_work_is_even_and_rounds_are_bounded(held, limit):
    shapes, holdings = held
    plan = make_plan(shapes, holdings, limit)
    assert Counter(name for each in plan.rounds for name in each) == Counter(shapes.keys())  # none twice
    work = plan.work(5)
    even = max(sum(work) / len(work), max(products(*shape, 5) for shape in shapes.values()))
    # Greedy by the largest: no worse than twice the larger of an even share and the largest piece, and no worse than
    # the slack allows where every holder may keep what it has.
    assert max(work) <= (2 + SLACK) * even
    for names in plan.rounds:
        for rank in range(len(holdings)):
            mine = [shapes[name] for name in names if plan.owner[name] == rank]
            assert len(mine) < 2 or sum(rows * columns for rows, columns in mine) <= limit


@given(held_matrices())
def test_what_ranks_send_and_get_agrees(held):
    shapes, holdings = held
    plan = make_plan(shapes, holdings)
    out, back = zip(*map(plan.traffic, range(len(holdings))))
    assert sum(out) == sum(back)
    apart = sum(
        2 * box.numbers for rank, each in enumerate(holdings) for box in each.boxes if plan.owner[box.matrix] != rank
    )
    assert sum(out) == apart


def test_who_holds_a_matrix_works_on_it_where_that_is_even():
    shapes = {f"m{i}": (8, 16) for i in range(8)}
    holdings = [Holding(tuple(Box(f"m{i}", 0, 8, 0, 16) for i in range(r * 2, r * 2 + 2))) for r in range(4)]
    plan = make_plan(shapes, holdings)
    assert [plan.traffic(rank) for rank in range(4)] == [(0, 0)] * 4 and len(set(plan.work(5))) == 1


def test_a_copy_is_not_sent_and_gets_its_result():
    box = Box("m", 0, 4, 0, 6)
    plan = make_plan({"m": (4, 6)}, [Holding((box,)), Holding((box,), frozenset({0}))])
    assert plan.owner == {"m": 0} and plan.sent(1, 0, 0) == [] and plan.taken(1, 0, 0) == [0]
    assert plan.traffic(0) == (24, 0) and plan.traffic(1) == (0, 24)


def test_matrices_with_holes_are_refused():
    with pytest.raises(AssertionError, match="1 matrices would not be whole, m for one"):
        make_plan({"m": (4, 6)}, [Holding((Box("m", 0, 3, 0, 6),))])
