"""The stand-in for a GPU's streams refuses what a GPU would run too early, or in memory that is still in use."""

import pytest
import torch

from testing.nccl.device import Event, Gpu, RaceError, Stream, streams_of


@pytest.fixture
def gpu():
    with streams_of(Gpu(rank=5)) as gpu:
        yield gpu


def test_a_stream_reads_what_another_made_only_after_an_event(gpu):
    side = torch.cuda.Stream()
    x = torch.ones(3)
    named = "rank 5, action 0F1: aten.mul.*is reading.*aten.ones"
    with torch.cuda.stream(side), gpu.doing_now("action 0F1"), pytest.raises(RaceError, match=named):
        x * 2
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        y = x * 2
    event = side.record_event()
    with pytest.raises(RaceError, match="aten.add.* on the default stream is reading"):
        y + 1
    event.wait()
    assert (y + 1).tolist() == [3, 3, 3]


def test_an_event_orders_what_came_before_it_and_nothing_else(gpu):
    side, event, x = torch.cuda.Stream(), torch.cuda.Event(), torch.ones(3)
    event.record()
    x.add_(1)
    with torch.cuda.stream(side):
        event.wait()
        with pytest.raises(RaceError, match="aten.add_"):
            x.sum()


def test_memory_that_another_stream_reads_is_not_written(gpu):
    side, x = torch.cuda.Stream(), torch.ones(3)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        y = x * 2
    with pytest.raises(RaceError, match="aten.zero_.* is writing to what aten.mul.*reading"):
        x.zero_()
    del y


@pytest.mark.parametrize("how", ["let go", "emptied"])
@pytest.mark.parametrize("safe", [None, "recorded", "ordered"])
def test_memory_freed_while_another_stream_uses_it_must_have_been_recorded(gpu, how, safe):
    side, x = torch.cuda.Stream(), torch.ones(3)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        y = x * 2
    if safe == "recorded":
        x.record_stream(side)
    if how == "emptied":
        x.untyped_storage().resize_(0)
    else:
        del x
    if safe == "ordered":
        torch.cuda.current_stream().wait_stream(side)
    if safe is None:
        with pytest.raises(
            RaceError, match=f"{how} while stream.*may still run aten.mul.*record_stream was not called"
        ):
            torch.zeros(1)
    torch.zeros(1)
    assert y.tolist() == [2, 2, 2] if safe == "ordered" else True


def test_slices_of_one_buffer_are_followed_apart(gpu):
    side, buffer = torch.cuda.Stream(), torch.zeros(8)
    gpu.slice_memory(buffer)
    low, high = buffer[:4], buffer[4:]
    side.wait_stream(torch.cuda.current_stream())
    low.add_(1)
    with torch.cuda.stream(side):
        high.add_(1)
    with pytest.raises(RaceError, match=r"aten\.sum"):
        buffer.sum()
    torch.cuda.current_stream().wait_stream(side)
    assert buffer.sum() == 8


def test_what_happens_to_a_buffer_happens_to_slices_that_are_made_later(gpu):
    side, buffer = torch.cuda.Stream(), torch.zeros(8)
    gpu.slice_memory(buffer)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        buffer.add_(1)
    first, crossing = buffer[:4], buffer[2:6]
    for part in (first, crossing):
        with pytest.raises(RaceError, match=r"aten\.mul"):
            part * 2
    torch.cuda.current_stream().wait_stream(side)
    first.add_(1)
    with torch.cuda.stream(side), pytest.raises(RaceError, match=r"aten\.mul"):
        crossing * 2


def test_backward_runs_under_the_same_rules(gpu):
    side, x = torch.cuda.Stream(), torch.ones(3, requires_grad=True)
    y = (x * x).sum()
    with torch.cuda.stream(side), pytest.raises(RaceError, match=r"aten\.mul"):
        y.backward()
    assert isinstance(side, Stream) and isinstance(side.record_event(), Event)
