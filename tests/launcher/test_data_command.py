"""data.py COMMAND: the commands over data under one name."""

import pytest

from launcher import data
from parallel.errors import RecipeError


def test_its_help_names_every_command(capsys):
    assert data.main(["--help"]) == 0
    told = capsys.readouterr().out
    assert all(f"data.py {name} " in told for name in data.COMMANDS)
    assert data.main([]) == 2


@pytest.mark.parametrize("name", data.COMMANDS)
def test_every_command_tells_of_itself(name, capsys):
    assert data.main([name, "--help"]) == 0
    assert "Keys" in capsys.readouterr().out


def test_a_command_that_is_none_is_one_line():
    with pytest.raises(RecipeError, match=r"trase is not a command of data; did you mean trace\? there are: trace"):
        data.main(["trase"])
