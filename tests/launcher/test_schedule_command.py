"""launcher/schedule.py: its JSON contract, its drawings, its errors."""

import json
import xml.etree.ElementTree as ElementTree

import pytest

from launcher.schedule import main
from parallel.errors import UserError

WORDS = ["name=dualpipe", "pipeline=16", "microbatches=120", "times.overlapped=2.5"]


def test_the_papers_size_gives_makespan_319_and_bubble_10_5(capsys):
    assert main([*WORDS, "format=json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["name"], found["pipeline"], found["microbatches"]) == ("dualpipe", 16, 120)
    assert found["makespan"] == 319
    assert max(found["bubble"]) == 10.5
    assert max(found["peak_microbatches"]) == 17
    assert len(found["ranks"]) == len(found["bubble"]) == 16
    first = found["ranks"][0][0]
    assert first == {"kind": "F", "parts": [["F", 0, 0]], "start": 0.0, "end": 1.0}
    overlapped = next(step for step in found["ranks"][0] if step["kind"] == "FB")
    assert [part[0] for part in overlapped["parts"]] == ["F", "B"]


def test_the_drawing_shows_every_pass_once(tmp_path):
    path = tmp_path / "dualpipe.svg"
    assert main(["name=dualpipe", "pipeline=4", "microbatches=8", "format=svg", f"output={path}"]) == 0
    root = ElementTree.parse(path).getroot()
    titles = [t.text.split(":")[0] for t in root.iter("{http://www.w3.org/2000/svg}title")]
    assert len(titles) == len(set(titles))
    assert {f"{stage}F{m}" for stage in range(4) for m in range(8)} <= set(titles)


def test_the_text_drawing_has_a_row_for_each_rank(capsys):
    assert main(["name=zb1p", "pipeline=4", "microbatches=8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[1:]] == ["0", "1", "2", "3"]
    assert "zb1p: 4 ranks, 8 microbatches; makespan 27, largest bubble 3" in lines[0]


def test_unequal_stages_cost_more(capsys):
    main(["name=1f1b", "pipeline=2", "microbatches=4", "times.cost=1,2", "format=json"])
    assert json.loads(capsys.readouterr().out)["makespan"] == 2 * 3 * 4 + 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["name=1f1b", "pipeline=2", "microbatches=4", "times.forwar=1"], "did you mean times.forward"),
        (["name=1f1b", "pipeline=2"], "microbatches is missing"),
        (["name=auto", "pipeline=1000000000", "microbatches=2"], "more than 1,000,000 passes"),
        (
            ["name=1f1b", "pipeline=2", "microbatches=4", "times.forward=1e308"],
            r"times.forward = 1e\+308 is no duration",
        ),
        (["name=1f1b", "pipeline=2", "microbatches=4", "times.cost=1,nan"], "must be 2 numbers from 0"),
        (["name=auto", "pipeline=2", "microbatches=4", "times.cost=0,0"], "give one of them a duration"),
        (["name=1f1b", "pipeline=2", "microbatches=4", "width=1000000000"], "width = 1000000000"),
        (["name=1f1b", "pipeline=2", "microbatches=4", "times.cost=a,b"], "times.cost = a,b"),
        (["name=1f1b", "pipeline=2", "microbatches=4", "output=/nowhere/x"], "output = /nowhere/x cannot be written"),
    ],
)
def test_what_cannot_be_is_one_line(words, message):
    with pytest.raises(UserError, match=message):
        main(words)
