"""The road of docs/continue.md, by the commands themselves: a model that transformers trained and saved is imported,
trained on under DualPipe x EP on text of one's own with some of the old, and goes back to transformers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from launcher import evaluate, export_hf, generate, import_hf, prepare_data
from testing.torchrun import torchrun
from testing.trained_elsewhere import BEGIN, END, PAD, SHAPE, as_recipe, old_text, own_text, publish
from testing.training.whole_runs import events, steps

PUBLISHED = "runs/moonlight_16b_published"


@pytest.fixture(scope="module")
def road(tmp_path_factory):
    """The folder in which all was done, and what the terminal showed of the training."""
    place, before = tmp_path_factory.mktemp("road"), Path.cwd()
    os.chdir(place)
    try:
        publish(place / "published", old_text(place / "old"), steps=60)
        own_text(place / "own")
        import_hf.main(["input=published", f"output={PUBLISHED}", "recipe=moonlight_16b", "processes=1"])
        shared = ["tokenizer=published", "held_out=0.1", "workers=1"]
        prepare_data.main(["input=own,old", "weights=0.75,0.25", "output=shards", *shared])
        for text in ("own", "old"):
            prepare_data.main([f"input={text}", f"output={text}_shards", *shared])
        root = Path(__file__).resolve().parents[2]
        words = ["recipe=moonlight_16b", "parallel=pp2_ep2", "data.path=shards", *as_recipe(60)]
        shown, code = torchrun(4, root / "launcher" / "pretrain.py", *words, folder=place)
        assert code == 0, "\n".join(shown[-20:])
        export_hf.main(["run=runs/moonlight_16b", "output=exported", "dtype=fp32", "processes=1"])
        yield place, shown
    finally:
        os.chdir(before)


def held_out(capsys, run, text):
    """Return what evaluate.py prints of a run on the held-out documents of a text."""
    capsys.readouterr()
    evaluate.main([f"run={run}", f"data={text}_shards"])
    return json.loads(capsys.readouterr().out)


def test_the_start_says_what_comes_along_and_balance_is_kept(road):
    place, shown = road
    (started,) = events(place / "runs/moonlight_16b", "started_from")
    tensors = load_file(place / "published" / "model.safetensors")
    largest = max(t.abs().max().item() for name, t in tensors.items() if name.endswith("e_score_correction_bias"))
    assert started["moments"] is False and started["learning_rate"] == 0
    assert started["largest_bias"] == pytest.approx(largest) and largest > 0.05
    assert any(f"router biases as they are there (largest {largest:.2g})" in line for line in shown)
    first = [line["max_violation"] for line in steps(place / "runs/moonlight_16b")[:10]]
    assert sum(first) / 10 < 0.7, "with biases of zero it is above 1 (benchmarks/continuing.py)"


def test_its_own_text_gets_better_and_the_old_no_worse(road, capsys):
    before = {text: held_out(capsys, PUBLISHED, text) for text in ("own", "old")}
    after = {text: held_out(capsys, "runs/moonlight_16b", text) for text in ("own", "old")}
    assert {found["step"] for found in after.values()} == {60}
    assert after["own"]["bits_per_byte"] < before["own"]["bits_per_byte"] - 0.3
    assert after["old"]["bits_per_byte"] < before["old"]["bits_per_byte"] + 0.05


def test_it_goes_back_to_where_it_came_from(road, capsys):
    place, _ = road
    published, exported = (json.loads((place / name / "config.json").read_text()) for name in ("published", "exported"))
    for key in ("architectures", "model_type", *SHAPE, "bos_token_id", "eos_token_id"):
        assert exported[key] == published[key], key
    from transformers import AutoModelForCausalLM, AutoTokenizer  # seconds

    model = AutoModelForCausalLM.from_pretrained(place / "exported")
    tokenizer = AutoTokenizer.from_pretrained(place / "exported")
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (BEGIN, END, PAD)
    prompt = "import asyncio\n"
    found = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=40, do_sample=False)
    capsys.readouterr()
    generate.main(["run=runs/moonlight_16b", f"prompt={prompt}", "tokens=40", "temperature=0"])
    assert capsys.readouterr().out == tokenizer.decode(found[0], skip_special_tokens=True) + "\n"


def test_commands_of_an_import_need_no_data(road, capsys):
    place, _ = road
    capsys.readouterr()
    generate.main([f"run={PUBLISHED}", "prompt=The", "tokens=5", "temperature=0"])
    assert capsys.readouterr().out.startswith("The")
    command = [sys.executable, Path(evaluate.__file__), f"run={PUBLISHED}"]
    refused = subprocess.run(command, capture_output=True, text=True, cwd=place)
    assert refused.returncode == 2 and "data.path = null" in refused.stderr
