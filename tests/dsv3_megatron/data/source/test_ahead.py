"""Reading ahead: the same batches, no wait where the guess was right, and nothing left running."""

import threading
import time

import pytest

from dsv3_megatron.data.source.ahead import ReadAhead


class Reader:
    """Reads a number as its square, and remembers what it was asked for."""

    def __init__(self):
        self.asked, self.gate = [], threading.Event()
        self.gate.set()

    def __call__(self, number):
        assert self.gate.wait(30)
        self.asked.append(number)
        if number < 0:
            raise OSError(f"cannot read {number}")
        return number * number


def wait_until(is_so):
    end = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_what_follows_is_read_while_nobody_waits_and_only_once():
    reader = Reader()
    ahead = ReadAhead(reader)
    assert ahead.take(1, (2, 3)) == 1
    wait_until(lambda: reader.asked == [1, 2, 3])
    reader.gate.clear()  # what is read already needs no reading
    assert ahead.take(2, (3, 4)) == 4
    assert ahead.take(3, (4, 5)) == 9
    reader.gate.set()
    assert ahead.take(4, (5,)) == 16
    ahead.close()
    assert reader.asked[:4] == [1, 2, 3, 4]


def test_a_wrong_guess_costs_its_work_and_no_more():
    reader = Reader()
    ahead = ReadAhead(reader)
    assert ahead.take(1, (2, 3)) == 1
    assert ahead.take(10, (11,)) == 100
    wait_until(lambda: reader.asked[-1] == 11)
    assert ahead.take(11) == 121
    ahead.close()
    assert reader.asked.count(11) == 1


def test_an_error_is_raised_for_the_request_that_met_it_and_the_next_is_read():
    ahead = ReadAhead(Reader())
    assert ahead.take(1, (-1, 2)) == 1
    with pytest.raises(OSError, match="cannot read -1"):
        ahead.take(-1, (2,))
    assert ahead.take(2) == 4
    ahead.close()


def test_without_anything_to_follow_nothing_is_read_ahead():
    reader = Reader()
    ahead = ReadAhead(reader)
    assert [ahead.take(n) for n in (1, 2)] == [1, 4]
    time.sleep(0.05)
    ahead.close()
    assert reader.asked == [1, 2]


def test_closing_waits_for_the_read_at_hand_and_forgets_those_to_come():
    reader = Reader()
    ahead = ReadAhead(reader)
    assert ahead.take(1) == 1
    reader.gate.clear()
    taking = threading.Thread(target=lambda: ahead.take(2, (3, 4)))
    taking.start()
    wait_until(lambda: len(ahead._known) == 2)  # 2 is being waited for
    threading.Timer(0.1, reader.gate.set).start()
    ahead.close()
    taking.join()
    assert reader.asked == [1, 2]
    assert not [thread for thread in threading.enumerate() if thread.name == "reading ahead"]
    ahead.close()
