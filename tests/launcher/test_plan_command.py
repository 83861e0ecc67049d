"""launcher/plan.py as a user runs it: the contract of plan.json, exit codes, refusals, search, report."""

import json
import re

import pytest
import yaml

from dsv3_megatron.planning.search import Found
from launcher.command_line.compose import compose
from launcher.command_line.recipe_files import options
from launcher.plan import main
from launcher.views import search as search_view
from parallel.errors import UserError
from testing.lanes import names_in_lanes


def _plan(tmp_path, *arguments):
    path = tmp_path / "plan.json"
    code = main([*arguments, f"output={path}"])
    return code, json.loads(path.read_text())


def test_plan_of_the_paper_keeps_its_contract(tmp_path, capsys):
    code, plan = _plan(tmp_path, "recipe=dsv3_671b", "cluster=h800_2048", "--fast")
    assert code == 0
    assert plan["fits"]
    assert plan["world_size"] == 2048
    assert plan["parameters"] == {
        "main": 671026404352,
        "mtp": 11610067968,
        "activated_per_token": 36625603584,
        "trained": 682636472320,
        "frozen": 0,
    }
    assert len(plan["ranks"]) == 16
    for rank in plan["ranks"]:
        parts = [v for k, v in rank.items() if k.endswith("_bytes") and k not in ("total_bytes", "limit_bytes")]
        assert sum(parts) == rank["total_bytes"] <= rank["limit_bytes"] == 80 * 2**30
    step = plan["step"]
    assert step["tokens_per_second"] == pytest.approx(step["tokens"] / step["seconds"])
    assert step["gpu_hours_per_trillion_tokens"] == pytest.approx(1e12 / step["tokens_per_second"] * 2048 / 3600)
    out = capsys.readouterr().out
    assert "671,026,404,352" in out
    assert "tightest is rank" in out


def test_a_cluster_without_hardware_facts_leaves_prices_null_and_every_key_there(tmp_path):
    _, priced = _plan(tmp_path, "recipe=dsv3_671b", "--fast", "advice=false")
    code, plan = _plan(tmp_path, "recipe=dsv3_671b", "cluster=slurm", "cluster.nodes=256", "--fast", "advice=false")
    assert code == 0
    assert plan["step"].keys() == priced["step"].keys()
    assert plan["step"].pop("tokens") == priced["step"]["tokens"] == 62_914_560
    assert set(plan["step"].values()) == {None}


@pytest.mark.parametrize("recipe", options("recipe"))
def test_every_shipped_recipe_has_a_plan(tmp_path, recipe):
    code, plan = _plan(tmp_path, f"recipe={recipe}", "--fast", "advice=false")
    assert plan["ranks"]
    # The article's model is larger than the paper's, and is there to be compared.
    assert (code, plan["fits"]) == ((3, False) if recipe == "dsv3_article" else (0, True))


def test_what_does_not_fit_is_exit_code_3_and_the_table_all_the_same(tmp_path, capsys):
    code, plan = _plan(tmp_path, "recipe=dsv3_671b", "parallel.recompute=[]", "--fast", "advice=false")
    assert code == 3
    assert not plan["fits"]
    assert "does not fit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["cluster=h8_2048"], "did you mean h800_2048"),
        (["cluster=h100_8"], "needs 1,024 GPUs, but cluster=h100_8 has 8; nearest that can be: parallel."),
        (["world=4096"], "has 2,048 GPUs"),
        (["world=none"], "world = none: input should be a valid integer"),
        (["parallel.expert=48"], "nearest that do: 32, 64"),
        (["output=/nowhere/plan.json", "advice=false"], "cannot be written"),
        (["calibrate=/nowhere/times.json"], "cannot be read"),
    ],
)
def test_what_cannot_be_is_one_line(arguments, says):
    with pytest.raises(UserError, match=re.escape(says)) as caught:
        main(["recipe=dsv3_671b", "--fast", *arguments])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("cluster", names_in_lanes(["h100_8", "h200_1", "h800_256"], "h800_256"))
def test_the_nearest_layout_that_is_named_can_be(tmp_path, cluster):
    arguments = ["recipe=dsv3_671b", f"cluster={cluster}", "--fast", "advice=false"]
    with pytest.raises(UserError) as caught:
        main(arguments)
    named = str(caught.value).split("nearest that can be: ")[1].split()
    code, plan = _plan(tmp_path, *arguments, *named)
    assert code == (0 if plan["fits"] else 3)


def test_report_holds_timeline_and_bars_and_needs_nothing_else(tmp_path):
    page = tmp_path / "plan.html"
    _plan(tmp_path, "recipe=dsv3_671b", "--fast", "advice=false", f"report={page}")
    text = page.read_text()
    assert text.count("<svg") == 2
    assert not re.search(r'(src|href)="', text)


@pytest.mark.full
def test_search_ranks_layouts_and_writes_the_first_as_a_recipe(tmp_path, monkeypatch, capsys):
    from dsv3_megatron.planning import search

    monkeypatch.setattr(search, "_SCHEDULES", (("dualpipe", 1), ("1f1b", 1)))
    monkeypatch.setattr(search, "_REFINED", 1)
    monkeypatch.setattr(search_view, "RECIPES", tmp_path)
    (tmp_path / "recipe").mkdir()
    code = main(
        ["recipe=dsv3_671b", "cluster=h200_256", "optim.global_batch=1024", "search=true", "top=3", "save=found"]
    )
    out = capsys.readouterr().out
    assert code == 0
    rows = [line.split() for line in out.splitlines() if re.match(r"\s+\d+\.\d\d ", line)]
    seconds = [float(row[0]) for row in rows[:3]]
    assert seconds == sorted(seconds)
    saved = (tmp_path / "recipe" / "found.yaml").read_text()
    assert "pipeline:" in saved
    assert "not measured" in saved


def test_the_recipe_that_a_search_writes_is_what_was_asked_for_with_the_layout_found():
    asked = ["recipe=dsv3_671b", "cluster=h200_256", "logging=default", "backend=torch", "optim.global_batch=1024"]
    asked += ["precision.fp8.dispatch=high", "parallel.expert=8"]
    layout = ("parallel.pipeline=8", "parallel.expert=32", "parallel.recompute=[norm,mla_up]", "optim.micro_batch=2")
    text = search_view.recipe_file(compose(asked), asked, Found(layout, 1.0, 0.1, 0.1, 1, True), "found")
    saved = yaml.safe_load(text)
    assert saved["optim"] == {"global_batch": 1024, "micro_batch": 2}
    assert saved["backend"] == "torch"
    assert saved["precision"] == {"fp8": {"dispatch": "high"}}
    assert saved["parallel"] == {"expert": 32, "pipeline": 8, "recompute": ["norm", "mla_up"], "stages": None}
    assert {"override /cluster": "h200_256"} in saved["defaults"]
    assert saved["defaults"][0] == "dsv3_671b"
    assert {"override /logging": "default"} in saved["defaults"]
