"""What a run writes down of tasks is what others measure on the export of that step: transformers with plain code, and
lm-evaluation-harness where it is installed."""

import json

import numpy as np
import pytest
import torch

from dsv3_megatron.data.tasks.requests import read_tasks
from dsv3_megatron.inference.trained_model import trained_model
from dsv3_megatron.train.evaluation.scoring import score_requests
from launcher import evaluate, export_hf
from launcher.command_line.compose import load_resolved
from testing.training.whole_runs import events, refusal, train

LENGTH = 64
BEGIN = "<｜begin▁of▁sentence｜>"
MEASURES = ("acc", "acc_norm", "acc_bytes")
DUAL = ("parallel.pipeline=2", "parallel.schedule=dualpipe", "optim.micro_batch=1")


def examples():
    """Questions that end in blanks and line breaks, begin with a special token, are empty, or too long."""
    random = np.random.default_rng(3)
    words = ["return", "self", "import os", "naïve", "→ ✓", "x = 1\n", "(", "class A:", "0123456789"]
    contexts = ["def read(self, size=-1):\n    ", "import ", "The answer is", "x\n\n", f"{BEGIN}import", "", "α = "]
    contexts += ["for line in file:\n    print(line)\n" * 12]
    for number in range(48):
        picked = random.choice(len(words), size=int(random.integers(2, 5)), replace=False)
        choices = [words[i] * int(random.integers(1, 4)) for i in picked]
        context = contexts[number % len(contexts)] + " ".join(random.choice(words[:3], int(random.integers(0, 3))))
        yield {"context": context, "choices": choices, "answer": int(random.integers(len(choices)))}
    yield {"context": "", "choices": [f"{BEGIN}import", "class"], "answer": 0}


def endings():
    """Continuations of one choice."""
    return [{"context": "def __init__(self", "choices": [text], "answer": 0} for text in ("):", ", x", " = 0\n")]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on two ranks that was measured at its end, and its export."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, rows in (("choices", list(examples())), ("endings", endings())):
        lines = "".join(json.dumps({"id": n, **row}) + "\n" for n, row in enumerate(rows))
        (folder / f"{name}.jsonl").write_text(lines)
    words = (
        "data=stdlib", "model.vocab_size=512", f"data.sequence_length={LENGTH}", "run.steps=4",
        "optim.learning_rate=0.01", f"run.directory={folder}/run",
        f"evaluate.tasks=[{folder}/choices.jsonl,{folder}/endings.jsonl]", "evaluate.every_steps=3",
    )  # fmt: skip
    assert refusal(train(2, *words, *DUAL)) is None
    assert export_hf.main([f"run={folder}/run", f"output={folder}/exported", "dtype=fp32", "processes=1"]) == 0
    return folder


def measured(run):
    return json.loads((run / "run/summary.json").read_text())["tasks"]


@pytest.fixture(scope="module")
def likelihoods(run):
    """Log-likelihoods and greedy of the run's checkpoint, in one process."""
    recipe = load_resolved(run / "run/recipe.yaml")
    with trained_model(recipe, run / "run") as model:
        tasks = read_tasks(recipe.evaluate, model.tokenizer, LENGTH)
        found = score_requests(model.parts, [request for task in tasks for request in task.requests])
        return found, tasks


def test_transformers_measures_the_same_on_the_export(run, likelihoods):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(run / "exported", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(run / "exported")
    expected, greedy, correct = [], [], {name: [] for name in MEASURES}
    for row in [*examples(), *endings()]:
        scores = []
        for choice in row["choices"]:
            context = row["context"].rstrip()
            before, whole = tokenizer.encode(context), tokenizer.encode(row["context"] + choice)
            if not context:
                before = [tokenizer.bos_token_id]
                whole = whole if whole[0] == before[0] else before + whole
            scored = len(whole) - len(before)
            ids = torch.tensor((before + whole[len(before) :])[-LENGTH - 1 :])
            with torch.no_grad():
                chances = model(ids[None, :-1]).logits[0, -scored:].log_softmax(-1)
            scores.append(chances.gather(1, ids[-scored:, None]).double().sum().item())
            greedy.append(bool((chances.argmax(-1) == ids[-scored:]).all()))
        expected += scores
        if len(scores) > 1:
            sizes = {
                "acc": np.ones(len(scores)),
                "acc_norm": np.asarray([len(c) for c in row["choices"]]),
                "acc_bytes": np.asarray([len(c.encode()) for c in row["choices"]]),
            }
            for name, size in sizes.items():
                correct[name].append(np.argmax(np.asarray(scores) / size) == row["answer"])
    scores, tasks = likelihoods
    assert scores.log_likelihoods == pytest.approx(expected, abs=1e-4)
    assert scores.greedy.tolist() == greedy
    found = measured(run)
    for name in MEASURES:
        assert found["choices"][name] == pytest.approx(np.mean(correct[name])), name
    assert len({found["choices"][name] for name in MEASURES}) > 1, "the normalisations tell the measures apart"
    assert found["endings"]["acc"] == pytest.approx(np.mean(greedy[-3:]))
    assert found["endings"]["perplexity"] == pytest.approx(np.exp(-np.mean(expected[-3:])), rel=1e-4)
    assert found["choices"]["cut"] == tasks[0].cut > 0 and found["choices"]["requests"] == len(expected) - 3


def test_a_run_measures_tasks_every_so_many_steps_and_at_its_end(run):
    found = events(run / "run", "task")
    assert [(e["step"], e["task"]) for e in found] == [(s, n) for s in (3, 4) for n in ("choices", "endings")]
    for name, values in measured(run).items():
        (last,) = (e for e in found if e["step"] == 4 and e["task"] == name)
        assert {key: last[key] for key in values} == values


def test_evaluate_measures_the_same_of_a_checkpoint(run, capsys):
    assert evaluate.main([f"run={run}/run"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tasks"] == {
        name: {k: v if isinstance(v, str) else pytest.approx(v, rel=1e-5) for k, v in values.items()}
        for name, values in measured(run).items()
    }
    assert evaluate.main([f"run={run}/run", f"tasks=[{run}/endings.jsonl]", "examples=2"]) == 0
    found = json.loads(capsys.readouterr().out)["tasks"]
    assert list(found) == ["endings"] and found["endings"]["examples"] == 2


TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {file}}}}}
output_type: {kind}
validation_split: validation
doc_to_text: context
target_delimiter: ""
metric_list: [{metrics}]
"""
CHOICE = "doc_to_choice: choices\ndoc_to_target: answer\n"
ENDING = 'doc_to_target: "{{choices[0]}}"\n'


def test_lm_evaluation_harness_measures_the_same_on_the_export(run, likelihoods, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="pip install -e '.[lm-eval]'")
    for variable in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(variable, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    for name, kind, metrics, rest in (
        ("choices", "multiple_choice", MEASURES, CHOICE),
        ("endings", "loglikelihood", ("acc", "perplexity"), ENDING),
    ):
        listed = ", ".join(f"{{metric: {metric}}}" for metric in metrics)
        text = TASK.format(name=name, file=run / f"{name}.jsonl", kind=kind, metrics=listed)
        (tmp_path / f"{name}.yaml").write_text(text + rest)
    # Its cache would take the wrong logits where two texts are the same and what is scored of them is not (0.4.13).
    found = simple_evaluate(
        "hf",
        f"pretrained={run / 'exported'},dtype=float32,max_length={LENGTH},logits_cache=False",
        tasks=["choices", "endings"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        device="cpu",
        batch_size=1,
        log_samples=True,
    )
    said, mine = found["results"], measured(run)
    for name in MEASURES:
        assert said["choices"][f"{name},none"] == pytest.approx(mine["choices"][name]), name
    assert said["endings"]["acc,none"] == pytest.approx(mine["endings"]["acc"])
    assert said["endings"]["perplexity,none"] == pytest.approx(mine["endings"]["perplexity"], rel=1e-4)
    theirs = []
    for name in ("choices", "endings"):
        for sample in sorted(found["samples"][name], key=lambda sample: sample["doc_id"]):
            theirs += [(float(likelihood), bool(greedy)) for ((likelihood, greedy),) in sample["resps"]]
    scores, _ = likelihoods
    assert scores.log_likelihoods == pytest.approx([likelihood for likelihood, _ in theirs], abs=1e-4)
    assert scores.greedy.tolist() == [greedy for _, greedy in theirs]
