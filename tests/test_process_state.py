"""What the code under test sets for its process does not reach other tests (tests/conftest.py)."""

import os

import pytest

from dsv3_megatron.run.made import for_owner


def umask():
    now = os.umask(0o022)
    os.umask(now)
    return now


AT_THE_START = umask()


@pytest.fixture(scope="module")
def command():
    """A command that is run in this process by a fixture of a whole file."""
    for_owner()


@pytest.mark.parametrize("time", ["before the first test", "before the second"])
def test_what_a_fixture_sets_for_the_process_is_undone(command, time):
    assert umask() == AT_THE_START
    assert "DSV3_UMASK" not in os.environ
