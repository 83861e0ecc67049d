"""What ends a command, and lines that stay lines whatever stands in them."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from launcher import prepare_data
from launcher.command_line import arguments
from launcher.command_line.arguments import Arguments, ReadableBy, takes
from launcher.command_line.console import guarded, step_line
from launcher.command_line.output import write_output
from launcher.data_commands.words import tell
from parallel.errors import DataError, RecipeError


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """Commands that run in this process leave the environment as other tests expect it."""
    monkeypatch.setenv("PYTHONSAFEPATH", "")


def test_a_reader_that_has_enough_is_no_failure():
    code = (
        "import sys; from launcher.command_line.console import guarded\n"
        "sys.exit(guarded(lambda _: [print('x' * 1000) for _ in range(10_000)] and 5))"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.wait() == 0 and b"Traceback" not in process.stderr.read()


def test_a_pipe_that_broke_elsewhere_is_no_success(monkeypatch):
    """Such as the one to a process that was to help: the command has not done what it was asked for."""

    monkeypatch.setenv("DSV3_UMASK", "22")
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # which stays as it is after an exception
    monkeypatch.setattr(sys, "stderr", sys.stderr)

    def command(_):
        raise BrokenPipeError(32, "Broken pipe")

    before = os.umask(0o022)
    try:
        with pytest.raises(BrokenPipeError):
            guarded(command)
    finally:
        os.umask(before)


def test_processes_that_a_command_starts_import_nothing_from_the_current_directory(tmp_path, monkeypatch):
    """They are begun by `python -m` and `python -c`, before which that directory's files come."""
    monkeypatch.setattr(sys, "argv", ["dsv3", "import heapq", "-mheapq"])
    (tmp_path / "heapq.py").write_text("raise SystemExit(66)\n")

    def command(words):
        started = [[sys.executable, "-c", words[0]], [sys.executable, words[1]]]
        return sum(subprocess.run(each, cwd=tmp_path, stdout=subprocess.DEVNULL).returncode for each in started)

    assert guarded(command) == 0


def test_control_characters_of_a_name_neither_break_a_line_nor_reach_the_terminal(capsys):
    name = "new\nline\r\x1b[31m \u2028.jsonl\tb"
    tell(f"{name}:1: is not JSON")
    assert capsys.readouterr().err == "new\\nline\\r\\x1b[31m \\u2028.jsonl\tb:1: is not JSON\n"
    assert str(DataError(name)) == "data: new\\nline\\r\\x1b[31m \\u2028.jsonl\tb"


def test_an_output_that_is_open_is_written_to_and_not_replaced(tmp_path):
    """As by ``output=/dev/stdout >> FILE``; root would replace /dev/stdout itself."""
    with open(tmp_path / "file", "a+b", buffering=0) as file:
        file.write(b"before\n")
        write_output(Path(f"/dev/fd/{file.fileno()}"), "text\n", "output")
        file.write(b"after\n")
    assert (tmp_path / "file").read_text() == "before\ntext\nafter\n"


def test_a_line_that_quotes_without_end_has_its_begin_and_its_end():
    assert str(DataError("a " + "x" * 100_000 + "; do this")) == f"data: a {'x' * 3998} ... {'x' * 991}; do this"


@pytest.mark.parametrize("weights", ["inf,1", "1,nan", "nan,1", "1e30,1", "0,1", "1", "-1,2", "a,b"])
def test_weights_that_training_would_refuse_are_refused_before_preparing(tmp_path, weights):
    words = [f"input={tmp_path}/a.jsonl,{tmp_path}/b.jsonl", f"output={tmp_path}/out", "tokenizer=none"]
    with pytest.raises(RecipeError, match="^recipe: weights"):
        prepare_data.main([*words, f"weights={weights}"])


@pytest.mark.parametrize(("clipped", "told"), [(None, ""), (0, ""), (7, "  clipped 7 heads"), (1, "  clipped 1 head")])
def test_a_step_line_says_what_qk_clip_has_clipped(clipped, told):
    metrics = dict.fromkeys(("mtp_loss", "max_violation", "memory_peak_rank", "bubble_fraction"))
    metrics |= dict.fromkeys(("lm_loss", "learning_rate", "grad_norm", "tokens_per_second", "memory_peak_bytes"), 1)
    line = step_line(SimpleNamespace(step=3, skipped=0, clipped_heads=clipped, **metrics), None, 1.0)
    assert line == f"step 3  loss 1.0000  lr 1.00e+00  norm 1.00{told}  1 tok/s  1 B"


def test_a_command_makes_files_for_their_owner_and_prints_nothing_that_drives_a_terminal(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DSV3_UMASK", "22")
    before = os.umask(0o022)

    def command(_):
        print("\x1b]0;title\x07")
        (tmp_path / "made").touch()
        raise DataError("\x1b[2J is no shard")

    try:
        assert guarded(command) == 2
    finally:
        os.umask(before)
    said = capsys.readouterr()
    assert (said.out, said.err) == ("\\x1b]0;title\\x07\n", "data: \\x1b[2J is no shard\n")
    assert (tmp_path / "made").stat().st_mode & 0o777 == 0o600


def test_what_is_asked_for_is_written_in_the_place_of_a_link_and_into_a_device(tmp_path):
    (tmp_path / "other").write_text("precious")
    (tmp_path / "plan.json").symlink_to(tmp_path / "other")
    write_output(tmp_path / "plan.json", "mine", "output")
    assert (tmp_path / "plan.json").read_text() == "mine" and (tmp_path / "other").read_text() == "precious"
    write_output(Path("/dev/null"), "mine", "output")
    assert Path("/dev/null").is_char_device()


def test_a_folder_for_a_team_is_asked_for_by_a_key(monkeypatch):
    asked = []
    monkeypatch.setattr(arguments, "for_owner", asked.append)

    class Keys(Arguments):
        readable_by: ReadableBy = "owner"

    main = takes(Keys, None)(lambda given: 0)
    main([])
    assert asked == []
    main(["readable_by=group"])
    assert asked == ["group"]
    with pytest.raises(RecipeError, match="readable_by = all: .* owner, group"):
        main(["readable_by=all"])
