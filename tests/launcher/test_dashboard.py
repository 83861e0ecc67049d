"""launcher/dashboard.py: the workspace of the repository shows what runs log."""

import pytest

from dsv3_megatron.metrics.names import NAMES
from launcher.dashboard import SHIPPED, load, main, workspace
from parallel.errors import RecipeError


def test_without_a_server_it_is_checked_and_printed(capsys):
    assert main([]) == 0
    out = capsys.readouterr().out
    assert "Experts" in out and "moe/max_violation" in out


def test_every_metric_is_shown_somewhere():
    shown = {name.removesuffix("/*") for s in load(SHIPPED).sections for p in s.panels for name in p.y}
    no_curves = {
        "train/step",
        "train/tokens",
        "train/samples",
        "train/excluded_tokens",
        "pipeline/slowest_rank",
        "memory/peak_rank",
    }
    assert set(NAMES.values()) - shown == no_curves


def test_wandb_workspaces_accepts_it():
    pytest.importorskip("wandb_workspaces")
    dashboard = load(SHIPPED)
    made = workspace(dashboard, "team", "project")
    assert [s.name for s in made.sections] == [s.name for s in dashboard.sections]
    text = made._to_model().model_dump_json()  # what would be sent
    for section in dashboard.sections:
        for panel in section.panels:
            for name in panel.y:
                assert name.removesuffix("/*") in text, name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x\nsections: [{name: a, panels: [{title: t, y: [train/los]}]}]", "shows train/los, which no run logs"),
        ("name: x\nsections: [{name: a, panels: []}]", "sections.0.panels"),
        ("name: [", "is not YAML"),
        ("name: x\nsection: []", "section"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path, text, message):
    file = tmp_path / "d.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError, match=message) as caught:
        main([f"file={file}"])
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(RecipeError, match="cannot be read"):
        main([f"file={tmp_path / 'none.yaml'}"])
