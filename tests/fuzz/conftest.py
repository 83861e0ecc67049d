"""Every target runs briefly in the fast lane and longer in the other (testing/fuzz/runner.py)."""

import functools

import pytest

from testing.fuzz.runner import LONG_SECONDS, SHORT_SECONDS
from testing.fuzz.runner import fuzz as fuzz_for


def pytest_generate_tests(metafunc):
    if "fuzz" in metafunc.fixturenames:
        lanes = [pytest.param(SHORT_SECONDS, id="short"), pytest.param(LONG_SECONDS, id="long", marks=pytest.mark.full)]
        metafunc.parametrize("fuzz", lanes, indirect=True)


@pytest.fixture
def fuzz(request):
    """``fuzz(damage, seeds, read)``: read damaged files for the seconds of this lane."""
    return functools.partial(fuzz_for, seconds=request.param)
