"""Whatever a check does, the others are carried out, and the table says what happened."""

import json
import time

import psutil
import pytest

from benchmarks.gpu_check import __main__ as command
from benchmarks.gpu_check.outcome import Visit
from benchmarks.gpu_check.runner import Runner
from parallel.errors import RecipeError
from testing.gpu_check.faults import faulty

WRONG = (
    faulty("good", "passes"),
    faulty("broken", "raises", rows=("broken first", "broken second", "broken third")),
    faulty("refused", "refuses"),
    faulty("crash", "crashes"),
    faulty("kill", "is_killed", rows=("kill first", "kill second")),
    faulty("hang", "hangs", seconds=5.0, alone=True),
    faulty("silent", "says_nothing"),
    faulty("reader", "reads", after=("good",)),
    faulty("reader of nothing", "reads", after=("crash",)),
    faulty("too long", "passes", seconds=5000.0),
    faulty("of a GPU", "passes", needs=("gpu",)),
    faulty("last", "passes", alone=True),
)


@pytest.fixture(scope="module")
def visited(tmp_path_factory):
    """A visit in which nearly everything goes wrong: exit code, rows of the file, and what was printed."""
    folder = tmp_path_factory.mktemp("visit")
    arguments = command.Arguments(output=folder / "found.json", device="cpu", seconds=300)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "_started", lambda visit: {})  # new interpreters, as on a GPU
        code = command.carry_out(WRONG, Visit("cpu", 1, folder / "logs", folder, te=False), arguments, [])
    return code, json.loads((folder / "found.json").read_text()), folder


def test_every_fault_is_a_row_with_its_reason_and_costs_no_other(visited):
    code, found, _ = visited
    rows = {name: (row["status"], row["said"]) for name, row in found["rows"].items()}
    assert rows == {
        "good": ("PASS", "well"),
        "broken first": ("PASS", "the first row is known"),
        "broken second": ("FAIL", "ValueError: a value that cannot be"),
        "broken third": ("SKIPPED", "comes after 'broken second' in one process"),
        "refused": ("FAIL", "package: the package is too old; install a newer one"),
        "crash": ("FAIL", rows["crash"][1]),
        "kill first": ("PASS", "before the kill"),
        "kill second": ("FAIL", "its process ended by SIGKILL"),
        "hang": ("FAIL", rows["hang"][1]),
        "silent": ("FAIL", "its process ended without having said anything of it"),
        "reader": ("PASS", "what it reads is there"),
        "reader of nothing": ("SKIPPED", "needs what the row 'crash' finds, and that has not passed"),
        "too long": ("SKIPPED", rows["too long"][1]),
        "of a GPU": ("SKIPPED", "needs a GPU"),
        "last": ("PASS", "well"),
    }
    assert rows["crash"][1].startswith("its process ended by SIGSEGV")
    assert rows["hang"][1].startswith("did not end within 5 s; was in faults.py:")
    assert rows["hang"][1].endswith("wait_for_ever")
    assert "of 300 s were left, and it may take 5000" in rows["too long"][1]
    assert code == 1 and found["failed"] == ["broken second", "refused", "crash", "kill second", "hang", "silent"]
    assert found["device"] == "cpu (stand-in)"


def test_what_a_hung_check_started_is_ended_with_it(visited):
    pid = int((visited[2] / "hang" / "started").read_text())
    started = psutil.Process(pid) if psutil.pid_exists(pid) else None
    assert started is None or started.status() == psutil.STATUS_ZOMBIE  # nobody may be there to bury it


def test_the_file_is_written_with_every_row(tmp_path):
    seen = []

    def told(row):
        seen.append(row.name)

    visit = Visit("cpu", 1, tmp_path, tmp_path)
    Runner(visit, 60, workers=2, told=told).run([faulty("one", "passes"), faulty("two", "passes")])
    assert set(seen) == {"one", "two"}


def test_a_visit_that_is_over_cuts_off_what_runs_and_does_not_blame_it(tmp_path):
    began = time.monotonic()
    checks = [faulty("slow", "hangs", seconds=5.0), faulty("later", "passes", seconds=5.0)]
    rows = Runner(Visit("cpu", 1, tmp_path, tmp_path), 3.0).run(checks)
    assert time.monotonic() - began < 10
    said = {row.name: (row.status, row.said) for row in rows}
    assert said["slow"] == ("SKIPPED", "cut off after 3 s: the visit's 3 s were over")
    assert said["later"][0] == "SKIPPED" and "s were left, and it may take 5" in said["later"][1]


def test_a_visit_in_which_nothing_passed_is_no_success(tmp_path, capsys):
    arguments = command.Arguments(output=tmp_path / "found.json", device="cpu")
    assert (
        command.carry_out(
            [faulty("of a GPU", "passes", needs=("gpu",))], Visit("cpu", 1, tmp_path, tmp_path), arguments, []
        )
        == 1
    )
    assert "0 PASS, 0 FAIL, 1 SKIPPED" in capsys.readouterr().out


def test_without_a_gpu_it_says_so_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert command.main([]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "gpu_check: there is no GPU here; device=cpu rehearses it on stand-ins"
    ]


def test_checks_can_be_chosen_and_bring_what_they_read():
    assert [check.name for check in command.chosen("losses torch fp8")] == ["cpu losses", "losses torch fp8"]
    assert [check.name for check in command.chosen("kernels te bf16")] == ["machine", "measure te bf16"]
    with pytest.raises(RecipeError, match="only = speling is no check; checks are: machine, "):
        command.chosen("speling")
