"""report.html: from files alone, every panel filled, no network, readable on a phone; looked at by a real browser."""

import json
import math
import os
import re
import shutil
import subprocess
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_megatron.data.settings import MixturePhase
from dsv3_megatron.optim.regime import Regime
from dsv3_megatron.report.charts import Chart, Series, draw, heat_map, short, thinned
from dsv3_megatron.report.facts import read_run
from dsv3_megatron.report.page import page, write_report
from dsv3_megatron.report.panels import PANELS
from dsv3_megatron.report.sound import is_drawing
from dsv3_megatron.report.writer import schedule_drawing
from launcher.command_line.compose import compose, resolved_yaml

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
)  # fmt: skip


def metrics(step, tokens):
    return {
        "step": step, "tokens": tokens, "loss": 8.0 / step, "lm_loss": 7.0 / step + 1, "mtp_loss": 7.5 / step + 1,
        "balance_loss": 1e-4, "learning_rate": 1e-3, "grad_norm": 1.0 + 50 * (step == 40), "global_batch": 8,
        "step_seconds": 2.0, "tokens_per_second": 1000.0, "tflops_per_device": 0.5, "mfu": None,
        "bubble_fraction": 0.2, "memory_peak_bytes": 3 * 2**30, "max_violation": 0.5, "max_violation_running": 0.2,
        "layer_violation": [0.4, 0.6], "rerouted_choices": None, "dropped_choices": None, "skipped": 1,
        "data_seconds": 0.1, "pipeline_seconds": 1.5, "update_seconds": 0.4,
    }  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run directory as a pipeline of two leaves it after sixty steps, a skip and a restart."""
    directory = tmp_path_factory.mktemp("report") / "run"
    directory.mkdir()
    name = "<script>alert('x')</script> & a very long name " + "x" * 60
    recipe = compose(["recipe=dsv3_tiny", "parallel.pipeline=2", "parallel.schedule=dualpipe", f'run.name="{name}"'])
    (directory / "recipe.yaml").write_text(resolved_yaml(recipe))
    (directory / "environment.json").write_text(json.dumps({"world": {"size": 2}, "git_commit": "0123456789abc"}))
    lines = [metrics(step, 4096 * step) for step in range(1, 61)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 61, "tok')
    stamp = "2026-01-01T00:0{}:00+00:00"
    events = [
        {"event": "started", "time": stamp.format(0)},
        {
            "event": "held_out",
            "time": stamp.format(1),
            "step": 20,
            "held_out_loss": 1.5,
            "bits_per_byte": 1.0,
            "held_out/<i>web": 1.25,
            "bits_per_byte/<i>web": 0.5,
            "held_out/code": 1.75,
        },
        {"event": "task", "time": stamp.format(1), "step": 20, "task": "quiz", "acc": 0.25, "acc_norm": 0.5},
        {"event": "task", "time": stamp.format(2), "step": 21, "task": "quiz", "acc": 0.75},
        {"event": "saved", "time": stamp.format(1), "step": 20, "path": "step_20", "stall_seconds": 1.0},
        {"event": "resumed", "time": stamp.format(2), "step": 20, "path": "step_20"},
        {"event": "skipped", "time": stamp.format(3), "step": 40, "reason": "<b>gradient</b>"},
    ]
    (directory / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    loads = [[100.0 + 10 * layer + expert for expert in range(16)] for layer in range(4)]
    (directory / "expert_load.jsonl").write_text(json.dumps({"step": 50, "loads": loads}) + "\n")
    (directory / "schedule.svg").write_text(schedule_drawing(recipe, 8))
    write_report(directory)
    return directory


def test_every_panel_is_filled(run):
    facts = read_run(run)
    for title, panel in PANELS.items():
        assert 'class="none">n' not in panel(facts), title
    text = (run / "report.html").read_text()
    assert "60 of 200" in text and "skipped</dt><dd>1" in text and "0123456789"[:9] in text
    assert "skipped at step 40" in text and "resumed at step 20" in text


def test_a_mixture_is_drawn_where_the_recipe_has_one(run):
    facts = read_run(run)
    assert "Mixture of sources" not in page(facts), "this recipe has none"
    tables = {
        "at": {f"s{n}": n + 1 for n in range(7)},
        "to": {"s0": 1},
        "shape": "linear",
        "until": facts.budget_tokens,
    }
    changed = facts.recipe.data.model_copy(update={"mixture": (MixturePhase(**tables),)})
    facts = replace(facts, recipe=facts.recipe.model_copy(update={"data": changed}))
    panel = PANELS["Mixture of sources"](facts)
    assert all(f"</i>{name}<" in panel for name in ("s0", "s6", "s5", "s4", "3 others"))
    assert "Mixture of sources" in page(facts)


def test_attention_logits_are_drawn_beside_the_threshold_of_qk_clip(run, tmp_path):
    assert "Attention logits" not in page(read_run(run)), "this recipe has no threshold"
    recipe = compose(["recipe=dsv3_tiny", "optim.qk_clip=100"])
    (tmp_path / "recipe.yaml").write_text(resolved_yaml(recipe))
    measured = [([90.0, 120.5], 3), ([None, 80.0], 0), ([None, None], 0), ([70.0, 60.0], 1)]
    lines = [
        {**metrics(step, 4096 * step), "max_attention_logit": logits, "clipped_heads": heads}
        for step, (logits, heads) in enumerate(measured, 1)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    facts = read_run(tmp_path)
    assert facts.curve("max_attention_logit") == [(4096, 120.5), (8192, 80.0), (16384, 70.0)]
    panel = PANELS["Attention logits"](facts)
    assert "largest logit of all layers <b>70</b>" in panel and "threshold <b>100</b>" in panel
    assert "clipped heads <b>1</b>" in panel
    recipe = compose(["recipe=dsv3_tiny", "optim.qk_clip=1e9"])
    (tmp_path / "recipe.yaml").write_text(resolved_yaml(recipe))
    far = PANELS["Attention logits"](read_run(tmp_path))
    assert "threshold <b>" not in far and "before the softmax; threshold 1e+09" in far, "the curve would be flat"


def test_sources_and_tasks_have_curves(run):
    facts = read_run(run)
    assert facts.by_tokens(facts.events.sources["code"]) == [(20 * 4096, 1.75)]
    assert facts.by_tokens(facts.events.tasks["quiz"]) == [(20 * 4096, 0.25), (21 * 4096, 0.75)]
    assert "&lt;i&gt;web <b>1.250</b>" in PANELS["Held-out loss by source"](facts)
    assert "quiz <b>0.750</b>" in PANELS["Tasks"](facts)


def test_what_others_wrote_cannot_become_markup(run):
    text = (run / "report.html").read_text()
    assert "<script" not in text and "<b>gradient" not in text
    assert "&lt;script&gt;" in text and "&lt;b&gt;gradient" in text


def test_the_report_asks_for_nothing_from_anywhere(run):
    text = (run / "report.html").read_text()
    assert "default-src 'none'; style-src 'unsafe-inline'; form-action 'none'; base-uri 'none'" in text
    outside = re.sub(r'xmlns="[^"]*"', "", text)
    assert not re.search(r"https?://|@import|url\((?!#)", outside)


BAD_EVENTS = [
    "null", "[]", "3", "{", "\0\0", '{"event": "saved"}', '{"event": 3, "time": "2026-01-01T00:00:00+00:00"}',
    '{"event": "saved", "time": 5}', '{"event": "saved", "time": "yesterday"}',
    '{"event": "saved", "time": "2026-01-01T00:00:00"}',
    '{"event": "skipped", "time": "2026-01-01T00:00:00+00:00", "step": "</td><meta http-equiv=refresh>"}',
    '{"event": "held_out", "time": "2026-01-01T00:00:00+00:00", "step": 20, "held_out_loss": "low"}',
    '{"event": "held_out", "time": "2026-01-01T00:00:00+00:00", "held_out_loss": 1.0}',
    '{"event": "held_out", "time": "2026-01-01T00:00:00+00:00", "step": 20, "held_out/web": [1]}',
    '{"event": "task", "time": "2026-01-01T00:00:00+00:00", "step": 20, "task": {}, "acc": 1}',
]  # fmt: skip
BAD_STEPS = [
    "null", '{"step": 61}', '{"step": 1e400, "tokens": 1, "step_seconds": 1}',
    '{"step": 61, "tokens": "<b>", "step_seconds": 1}', '{"step": 61, "tokens": 1, "step_seconds": NaN}',
    '{"step": true, "tokens": 1, "step_seconds": 1}', '{"step": 61, "tokens": -1, "step_seconds": 1}',
    '{"step": 61, "tokens": 1, "step_seconds": 1, "lm_loss": "1"}',
    '{"step": 61, "tokens": 1, "step_seconds": 1, "grad_norm": Infinity}',
    '{"step": 61, "tokens": 1, "step_seconds": 1, "max_attention_logit": [[1]]}',
    '{"step": 61, "tokens": 1' + 400 * "0" + ', "step_seconds": 1}',
]  # fmt: skip


def test_rows_that_are_not_sound_are_counted_and_cost_the_report_nothing_else(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "events.jsonl").write_text(
        "\n".join(BAD_EVENTS) + "\n" + (run / "events.jsonl").read_text() + "\n".join(BAD_EVENTS) + "\n"
    )
    (tmp_path / "run" / "metrics.jsonl").write_text("\n".join(BAD_STEPS) + "\n" + (run / "metrics.jsonl").read_text())
    (tmp_path / "run" / "expert_load.jsonl").write_text('{"step": 3, "loads": [[1], [-1e999, "x"]]}\n')
    text = write_report(tmp_path / "run").read_text()
    told = f"{2 * len(BAD_EVENTS)} rows of events.jsonl; {len(BAD_STEPS)} rows of metrics.jsonl; the newest row of"
    assert f"<dt>left out</dt><dd>{told} expert_load.jsonl</dd>" in text
    assert "http-equiv=refresh>" not in text
    same = [PANELS[name](read_run(tmp_path / "run")) == PANELS[name](read_run(run)) for name in ("Loss", "Events")]
    assert all(same) and "60 of 200" in text


@pytest.mark.parametrize("name", ["events.jsonl", "metrics.jsonl", "expert_load.jsonl", "schedule.svg"])
def test_a_file_that_cannot_be_read_is_named_and_the_report_made_of_the_others(run, tmp_path, name):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / name).unlink()
    os.mkfifo(tmp_path / "run" / name)
    assert f"<dt>left out</dt><dd>{name} (not a regular file)</dd>" in write_report(tmp_path / "run").read_text()


def test_what_lies_in_memory_and_on_the_page_of_one_event_is_short(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    event = {"event": "saved", "time": "2026-01-01T00:00:00+00:00", "step": 1}
    event |= {f"k{n}": ["x" * 10_000] * 100 for n in range(100)}
    (tmp_path / "run" / "events.jsonl").write_text(json.dumps(event) + "\n")
    assert len(PANELS["Events"](read_run(tmp_path / "run"))) < 20_000


@pytest.mark.parametrize(
    "change",
    [
        lambda svg: svg.replace("</svg>", "<script>x</script></svg>"),
        lambda svg: svg.replace("<rect ", '<rect onclick="x()" ', 1),
        lambda svg: svg.replace("<rect ", '<rect style="x" ', 1),
        lambda svg: svg.replace("url(#hatch)", "url(http://x/y)", 1),
        lambda svg: svg.replace('fill="#ffffff"', 'fill="&#104;ttp"', 1),
        lambda svg: svg + '<meta http-equiv="refresh" content="0;url=http://x">',
        lambda svg: '<?xml version="1.0"?><!DOCTYPE svg [<!ENTITY a "b">]>' + svg,
        lambda svg: svg.replace("</svg>", '<image href="http://x/y"/></svg>'),
        lambda svg: svg.replace("</svg>", "<!-- "),
        lambda svg: "hello",
        lambda svg: "",
    ],
)
def test_a_schedule_that_is_no_drawing_of_ours_does_not_become_part_of_the_page(run, tmp_path, change):
    shutil.copytree(run, tmp_path / "run")
    drawing = (run / "schedule.svg").read_text()
    assert is_drawing(drawing) and "F0: forward of microbatch 0" in PANELS["Pipeline schedule"](read_run(run))
    (tmp_path / "run" / "schedule.svg").write_text(change(drawing))
    assert "schedule.svg (no drawing of a schedule)" in (text := write_report(tmp_path / "run").read_text())
    assert "http://x" not in text and "onclick" not in text


def test_a_panel_that_cannot_be_drawn_says_so_and_the_others_are_there(run, monkeypatch):
    sections = page(read_run(run)).count("<section")
    monkeypatch.setitem(PANELS, "Memory", lambda facts: 1 / 0)
    text = page(read_run(run))
    assert "not drawn: division by zero" in text and text.count("<section") == sections


def test_a_recipe_of_an_older_run_that_holds_a_secret_is_not_shown(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    recipe = tmp_path / "run" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("environment: {}", "environment: {HF_TOKEN: hf_abc}"))
    text = write_report(tmp_path / "run").read_text()
    assert "hf_abc" not in text and "recipe.yaml (cluster.slurm.environment.HF_TOKEN" in text


def test_effective_time_is_useful_seconds_over_all(run):
    assert read_run(run).effective_time == pytest.approx(120 / 180)


def test_a_run_that_has_just_begun_has_a_report(run, tmp_path):
    shutil.copy(run / "recipe.yaml", tmp_path / "recipe.yaml")
    text = page(read_run(tmp_path))
    assert text.count('class="none"') >= 5 and 'http-equiv="refresh"' in text


def test_the_plan_shows_where_the_run_stands(run):
    facts = read_run(run)
    recipe = facts.recipe
    now = Regime(recipe.optim, recipe.data.sequence_length).learning_rate(facts.last["tokens"])
    assert f"now <b>{now:.2e}</b>" in PANELS["Learning rate"](facts)
    assert facts.budget_tokens == 200 * recipe.optim.global_batch * 256


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=3000))
def test_thinning_keeps_the_extremes_and_the_order(values):
    points = list(enumerate(values))
    kept = thinned(points, most=50)
    assert len(kept) <= 100 and kept == sorted(kept)
    assert min(v for _, v in kept) == min(values) and max(v for _, v in kept) == max(values)


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), max_size=20), st.booleans())
def test_any_numbers_can_be_drawn(values, logarithmic):
    svg = draw(Chart([Series("a", list(enumerate(values)))], "x", "y", logarithmic=logarithmic))
    assert "nan" not in svg and "inf" not in svg.replace("info", "")
    finite = [v for v in values if math.isfinite(v) and (v > 0 or not logarithmic)]
    assert bool(finite) == ("<svg" in svg)


def test_an_axis_says_numbers_shortly():
    given = ("4.00e-03", "0.00e+00", "2.20e-04", "1.00e+10", "7.000", "0.25", "100", "1.500K", "0")
    assert [short(g) for g in given] == ["4e-3", "0", "2.2e-4", "1e10", "7", "0.25", "100", "1.500K", "0"]


def test_the_heat_map_shows_who_is_busy():
    svg = heat_map([[0, 0, 4, 0], [1, 1, 1, 1]], "layers", "experts")
    assert re.search(r'class="h8" d="M2 0h1v1h-1z"', svg)
    assert re.search(r'class="h4" d="(M\d 1h1v1h-1z){4}"', svg)
    assert re.search(r'class="h0" d="(M\d 0h1v1h-1z){3}"', svg)


def browser(directory, *words):
    words = ("timeout", "120", CHROMIUM, *FLAGS, f"--user-data-dir={directory / 'profile'}", *words)
    return subprocess.run(words, capture_output=True, text=True, timeout=150)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here; install with: apt-get install chromium")
def test_a_browser_shows_it_on_desk_and_phone(run, tmp_path):
    """The page is framed at three widths by a page of ours that reports what the browser laid out."""
    text = (run / "report.html").read_text()
    text = re.sub(r'<meta http-equiv="(Content-Security-Policy|refresh)"[^>]*>', "", text)  # lets our probe run
    probe = (
        "<script>onload=()=>{const wide=document.documentElement.scrollWidth-innerWidth;"
        "const low=[...document.querySelectorAll('section')].filter(s=>s.getBoundingClientRect().height<40).length;"
        "const cut=[...document.querySelectorAll('section>svg text')].filter(t=>{const a=t.getBoundingClientRect(),"
        "b=t.closest('svg').getBoundingClientRect();return a.left<b.left-1||a.right>b.right+1}).length;"
        "const font=matchMedia('(prefers-color-scheme:dark)').matches;"
        "const back=getComputedStyle(document.body).backgroundColor;"
        "parent.postMessage([innerWidth,wide,low,cut,document.querySelectorAll('svg').length,font,back].join(' '),'*')}"
        "</script>"
    )
    (tmp_path / "inner.html").write_text(text.replace("</body>", probe + "</body>"))
    frames = "".join(f'<iframe src="inner.html" width="{w}" height="900"></iframe>' for w in (360, 768, 1280))
    listen = "<script>onmessage=e=>document.querySelector('pre').append(e.data+';')</script>"
    outer = f"<!doctype html><pre></pre>{frames}{listen}"
    (tmp_path / "outer.html").write_text(outer)
    page_url = f"file://{tmp_path}/outer.html"
    for scheme, dark in (("1", "false"), ("0", "true")):
        done = browser(tmp_path, f"--blink-settings=preferredColorScheme={scheme}", "--virtual-time-budget=5000",
                       "--allow-file-access-from-files", "--dump-dom", page_url)  # fmt: skip
        found = re.search(r"<pre>(.*?);?</pre>", done.stdout, re.S)
        assert found and found[1], done.stderr[-2000:]
        told = [line.split(" ", 6) for line in found[1].split(";") if line]
        assert sorted(int(t[0]) for t in told) == [360, 768, 1280]
        for width, overflow, low, cut, drawings, is_dark, background in told:
            assert int(overflow) <= 0, f"scrolls sideways at {width}"
            assert cut == "0", f"{cut} texts are cut off at {width}"
            assert low == "0" and int(drawings) >= 11
            assert is_dark == dark and background == ("rgb(16, 21, 27)" if dark == "true" else "rgb(246, 247, 249)")
