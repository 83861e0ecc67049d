"""Every target runs briefly in the fast lane and longer in the other (testing/fuzz/runner.py)."""

import pytest

from testing.cpu_seconds import cpu_seconds
from testing.fuzz.runner import LONG_SECONDS, SHORT_SECONDS
from testing.fuzz.runner import fuzz as fuzz_for


def pytest_generate_tests(metafunc):
    if "fuzz" in metafunc.fixturenames:
        lanes = [pytest.param(SHORT_SECONDS, id="short"), pytest.param(LONG_SECONDS, id="long", marks=pytest.mark.full)]
        metafunc.parametrize("fuzz", lanes, indirect=True)


@pytest.fixture
def fuzz(request):
    """``fuzz(damage, seeds, read)``: read damaged files for the seconds of this lane, and count them."""

    def fuzz(damage, seeds, read):
        before = cpu_seconds()
        cases = fuzz_for(damage, seeds, read, request.param)
        request.node.user_properties.append(("fuzz", (cases, round(cpu_seconds() - before))))

    return fuzz


def pytest_terminal_summary(terminalreporter):
    """Say how many damaged files each target has read."""
    for report in terminalreporter.stats.get("passed", []):
        for name, (cases, seconds) in report.user_properties if report.when == "call" else ():
            if name == "fuzz":
                terminalreporter.write_line(f"{cases:9,} cases {seconds:5} CPU-s {report.nodeid}")
