"""launcher/layout.py: the layout of any number of ranks, without starting one."""

import pytest

from launcher.layout import main
from parallel.errors import UserError


def test_the_papers_2048_ranks_are_shown(capsys):
    assert main(["recipe=dsv3_671b", "rank=100"]) == 0
    text = capsys.readouterr().out
    assert "2048 ranks: PP 16 x DP 128 (EP 64, expert DP 2)" in text
    assert "expert_dp   1024 groups of    2   36 100" in text
    assert "ep            32 groups of   64   64 65 ... 127" in text


def test_any_number_of_ranks_can_be_asked_for(capsys):
    assert main(["recipe=dsv3_tiny", "parallel=pp2_ep2", "world=8", "rank=5"]) == 0
    assert "dp 1, pp 1, expert_tp 0, ep 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"), [(["world=x"], "world = x"), (["rank=3"], "rank 3 is not in a world of 1")]
)
def test_what_cannot_be_is_one_line(words, message):
    with pytest.raises(UserError, match=message):
        main(words)
