"""Boxes cover a run of numbers, all of it and nothing else, for any shape."""

from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_megatron.checkpoint.boxes import Box, boxes_of_run, common_box, strides_of
from testing.lanes import examples

SHAPES = st.lists(st.integers(1, 6), min_size=0, max_size=4).map(tuple)


@st.composite
def runs(draw):
    shape = draw(SHAPES)
    size = torch.Size(shape).numel()
    start = draw(st.integers(0, size))
    return shape, start, draw(st.integers(start, size)), draw(st.integers(1, size + 1))


def numbers_of(shape, box):
    """Return which numbers of a row-major tensor a box holds, in row-major order."""
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    return whole[tuple(slice(s, s + e) for s, e in zip(box.start, box.extent))].flatten().tolist()


@settings(deadline=None, max_examples=examples(100))
@given(runs())
def test_boxes_are_the_run_in_its_order(case):
    shape, start, end, limit = case
    boxes = list(boxes_of_run(shape, start, end, limit))
    assert [n for box in boxes for n in numbers_of(shape, box)] == list(range(start, end))
    assert all(torch.Size(box.extent).numel() <= limit for box in boxes)


@settings(deadline=None, max_examples=examples(100))
@given(runs())
def test_without_a_limit_a_run_is_few_boxes(case):
    shape, start, end, _ = case
    assert len(list(boxes_of_run(shape, start, end, 10**9))) <= max(2 * len(shape) - 1, 1)


@settings(deadline=None, max_examples=examples(100))
@given(SHAPES.filter(len), st.data())
def test_what_boxes_have_in_common(shape, data):
    boxes = []
    for _ in range(2):
        start = tuple(data.draw(st.integers(0, size - 1)) for size in shape)
        boxes.append(Box(start, tuple(data.draw(st.integers(1, n - s)) for s, n in zip(start, shape))))
    common = common_box(*boxes)
    expected = sorted(set(numbers_of(shape, boxes[0])) & set(numbers_of(shape, boxes[1])))
    assert ([] if common is None else numbers_of(shape, common)) == expected


@settings(deadline=None, max_examples=examples(100))
@given(SHAPES)
def test_strides_are_torchs(shape):
    assert strides_of(shape) == torch.empty(shape).stride()
    assert all(a >= b for a, b in pairwise(strides_of(shape)))
