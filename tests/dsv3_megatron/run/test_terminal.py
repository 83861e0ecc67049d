"""Nothing that others wrote reaches a terminal as a command to it."""

import io
import sys

import pytest

from dsv3_megatron.run.terminal import Printable, print_exactly, printable, printing_safely, rewrite

EVIL = "a\x1b]0;title\x07b\x9b2Jc\rd\x7f\x00\be\tf\ng é ▄"
SHOWN = "a\\x1b]0;title\\x07b\\x9b2Jc\\rd\\x7f\\x00\\x08e\tf\ng é ▄"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_control_characters_are_shown_and_lines_tabs_and_letters_stay():
    assert printable(EVIL) == SHOWN


def test_what_is_printed_and_raised_in_the_block_is_shown(monkeypatch):
    out, err = Terminal(), Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    with printing_safely():
        print(EVIL, end="")
        print(EVIL, end="", file=sys.stderr, flush=True)
        sys.stderr.writelines([EVIL])
        with printing_safely():  # one command runs another
            print(EVIL, end="")
        rewrite(sys.stdout, "step \x1b[31m1")
    assert out.getvalue() == 2 * SHOWN + "\r\x1b[2Kstep \\x1b[31m1" and err.getvalue() == 2 * SHOWN
    assert sys.stdout is out and sys.stderr is err


def test_a_traceback_is_shown_so_when_python_prints_it_at_the_end(monkeypatch):
    err = Terminal()
    monkeypatch.setattr(sys, "stderr", err)
    with pytest.raises(ValueError), printing_safely():
        raise ValueError("\x1b[2J")
    try:
        raise ValueError("\x1b[2J")
    except ValueError:
        sys.__excepthook__(*sys.exc_info())
    assert "ValueError: \\x1b[2J" in err.getvalue() and "\x1b" not in err.getvalue()


@pytest.mark.parametrize(("stream", "shown"), [(Terminal, SHOWN), (io.StringIO, EVIL)])
def test_a_text_is_exact_where_no_terminal_is(monkeypatch, stream, shown):
    monkeypatch.setattr(sys, "stdout", out := stream())
    with printing_safely():
        print_exactly(EVIL)
    assert out.getvalue() == shown + "\n"


def test_what_the_stream_cannot_encode_is_shown_too():
    raw = io.BytesIO()
    stream = Printable(io.TextIOWrapper(raw, encoding="ascii"))
    stream.write("é\udcff.jsonl")
    stream.flush()
    assert raw.getvalue() == b"\\xe9\\udcff.jsonl" and stream.encoding == "ascii"
