"""What a run directory may be: a new folder, an empty one, one with logs, or a run's own."""

import pytest

from dsv3_megatron.run.directory import RunDirectory
from parallel.errors import RecipeError


@pytest.mark.parametrize("found", ["metrics.jsonl", "events.jsonl", "tokenizer.json", "summary.json"])
def test_a_folder_whose_files_a_run_would_replace_is_refused(tmp_path, found):
    (tmp_path / found).write_text("precious")
    with pytest.raises(RecipeError, match=f"holds {found} of something that is no run; name a new directory"):
        RunDirectory(tmp_path).create()
    assert [path.name for path in tmp_path.iterdir()] == [found]


def test_an_exported_model_is_refused_though_it_has_a_recipe(tmp_path):
    for name in ("recipe.yaml", "model.safetensors.index.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(RecipeError, match="of something that is no run"):
        RunDirectory(tmp_path).create()


@pytest.mark.parametrize(
    "found", [[], ["job.out", "lock", "jobs.jsonl"], ["recipe.yaml", "metrics.jsonl"], ["checkpoints/", "events.jsonl"]]
)
def test_a_new_folder_one_with_logs_and_a_run_are_taken(tmp_path, found):
    for name in found:
        (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).write_text("")
    RunDirectory(tmp_path).create()
    assert (tmp_path / "checkpoints").is_dir()


def test_a_place_is_tried_without_writing_through_a_link(tmp_path, monkeypatch):
    monkeypatch.setattr("platform.node", lambda: "host")
    monkeypatch.setattr("os.getpid", lambda: 1)
    (tmp_path / "run").mkdir()
    for link in (".writable-host-1", ".made-abc"):
        (tmp_path / "run" / link).symlink_to(tmp_path / "elsewhere")
    RunDirectory(tmp_path / "run").create()
    RunDirectory(tmp_path / "run").leave_mark("abc")
    assert not (tmp_path / "elsewhere").exists()
