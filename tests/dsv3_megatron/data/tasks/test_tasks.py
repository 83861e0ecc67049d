"""Task files and what is made of them: every mistake named by file and line, requests cut as documented, results."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_megatron.data.tasks.read import read_task
from dsv3_megatron.data.tasks.requests import encode, read_tasks
from dsv3_megatron.data.tasks.results import result_of
from dsv3_megatron.data.tasks.settings import EvaluateSettings
from dsv3_megatron.data.tokenizer import Tokenizer
from dsv3_megatron.data.tokenizer_files.names import BEGIN
from launcher import submit
from launcher.command_line import start_ranks
from launcher.command_line.compose import compose
from parallel.errors import DataError, RecipeError

GOOD = {"context": "one two", "choices": [" three", " 3"], "answer": 1}


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["one two three four\n", "one: two\n"] * 20, 300)


def written(folder, *rows, name="task"):
    path = folder / f"{name}.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("{", ":2: Invalid JSON"),
        ("[1]", ":2: Input should be an object"),
        ({"context": "a", "choices": ["b"]}, ":2: answer is missing"),
        (GOOD | {"answer": 2}, ":2: answer = 2, but there are 2 choices; count them from 0"),
        (GOOD | {"answer": -1}, ":2: answer: input should be greater than or equal to 0"),
        (GOOD | {"answer": "1"}, ":2: answer: input should be a valid integer"),
        (GOOD | {"answer": True}, ":2: answer: input should be a valid integer"),
        (GOOD | {"choices": []}, ":2: choices: "),
        (GOOD | {"choices": ["a", ""]}, ":2: choices.1: string should have at least 1 character"),
        (GOOD | {"choices": ["a", 3]}, ":2: choices.1: input should be a valid string"),
        (GOOD | {"context": None}, ":2: context: input should be a valid string"),
        (GOOD | {"label": 1}, ":2: label is no field of an example"),
        (GOOD | {"choices": [" three"], "answer": 0}, ":2: choices has 1 entries, but 2 in line 1"),
    ],
)
def test_a_line_that_is_no_example_is_named(tmp_path, row, said):
    with pytest.raises(DataError) as refused:
        read_task(written(tmp_path, GOOD, row, GOOD))
    assert said in str(refused.value) and "\n" not in str(refused.value)
    assert str(refused.value).startswith(f"data: {tmp_path}/task.jsonl:2: ")


def test_a_file_that_is_no_task_is_named(tmp_path):
    with pytest.raises(DataError, match=r"none.jsonl cannot be read \(No such file or directory\)"):
        read_task(f"{tmp_path}/none.jsonl")
    with pytest.raises(DataError, match=r"task.jsonl holds no example"):
        read_task(written(tmp_path, "", " "))
    (tmp_path / "latin.jsonl").write_bytes(json.dumps(GOOD).encode() + b"\n\xe9\n")
    with pytest.raises(DataError, match=r"latin.jsonl cannot be read \(it is no UTF-8\)"):
        read_task(f"{tmp_path}/latin.jsonl")


def test_a_byte_order_mark_is_no_part_of_the_first_example(tmp_path):
    path = tmp_path / "marked.jsonl"
    path.write_text('{"context": "a", "choices": ["b", "c"], "answer": 1}\n', encoding="utf-8-sig")
    assert read_task(str(path)).examples[0].context == "a"


def test_examples_are_the_lines_that_are_not_empty(tmp_path):
    task = read_task(written(tmp_path, GOOD, "", GOOD | {"id": "x", "context": "a\u2028b"}, GOOD), 2)
    assert (task.name, task.lines) == ("task", (1, 3))
    assert [(e.context, e.choices, e.answer, e.id) for e in task.examples] == [
        ("one two", (" three", " 3"), 1, None),
        ("a\u2028b", (" three", " 3"), 1, "x"),
    ]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"every_steps": 5}, "evaluate.every_steps = 5, but evaluate.tasks names no file"),
        ({"examples": 5}, "evaluate.examples = 5, but evaluate.tasks names no file"),
        ({"tasks": ("a/x.jsonl", "b/x.jsonl")}, "a/x.jsonl and b/x.jsonl: both are called x"),
        ({"tasks": ("x.jsonl", "x.jsonl")}, "both are called x"),
    ],
)
def test_keys_without_effect_and_names_twice_are_refused(settings, said):
    with pytest.raises(RecipeError, match=said):
        EvaluateSettings(**settings).check()
    words = [f"evaluate.{key}={list(v) if isinstance(v, tuple) else v}".replace("'", "") for key, v in settings.items()]
    with pytest.raises(RecipeError, match=said):
        compose(["recipe=dsv3_tiny", *words])


@pytest.mark.parametrize("source", ["synthetic", "recall"])
def test_tasks_need_text(source):
    with pytest.raises(RecipeError, match=f"are text, but data.source = {source} has no tokenizer"):
        compose(["recipe=dsv3_tiny", f"data={source}", "evaluate.tasks=[a.jsonl]"])
    assert read_tasks(EvaluateSettings(), None, 16) == []


def test_a_bad_task_ends_a_start_before_torchrun_and_before_a_job(tmp_path):
    words = [f"evaluate.tasks=[{written(tmp_path, GOOD, '{')}]", f"run.directory={tmp_path}/run"]
    with pytest.raises(DataError, match=r"task.jsonl:2: Invalid JSON"):
        start_ranks.train(["--nproc-per-node", "2", *words])
    recipe = compose(["recipe=dsv3_tiny", *words])
    with pytest.raises(DataError, match=r"task.jsonl:2: Invalid JSON"):
        submit.send(SimpleNamespace(recipe=recipe), "", 1, test_only=True)


def test_a_choice_without_tokens_or_with_too_many_is_named(tmp_path, tokenizer):
    path = written(tmp_path, GOOD, GOOD | {"choices": ["x", "one two three four\n" * 9]})
    with pytest.raises(DataError, match=r"task.jsonl:2: choices.1 has \d+ tokens, and 1 to 8 can be scored"):
        encode(read_task(path), tokenizer, 8)
    # "a b" is fewer tokens than "a" where merges cross the border of context and choice.
    joined = Tokenizer.train(["abcdefgh"] * 20, 300)
    path = written(tmp_path, {"context": "abcdefg", "choices": ["h", "xxx"], "answer": 0})
    with pytest.raises(DataError, match=r"task.jsonl:1: choices.0 adds no token to the context"):
        encode(read_task(path), joined, 8)


CONTEXTS = st.text(alphabet="one two:\n", max_size=30)
CHOICES = st.text(alphabet="one two:\nx", min_size=1, max_size=12)


@given(CONTEXTS, CHOICES, st.integers(1, 24))
def test_a_request_is_cut_as_documented(tokenizer, tmp_path_factory, context, choice, length):
    row = {"context": context, "choices": [choice], "answer": 0}
    task = read_task(written(tmp_path_factory.getbasetemp(), row, name="cut"))
    alone, whole = (tokenizer.encode(text).tolist() for text in (context.rstrip(), context + choice))
    if not context.rstrip():
        alone, whole = [tokenizer.begin], [tokenizer.begin, *whole]
    scored = len(whole) - len(alone)
    if not 1 <= scored <= length:
        with pytest.raises(DataError, match=r"cut.jsonl:1: choices.0 (has|adds)"):
            encode(task, tokenizer, length)
        return
    ids = [*alone, *whole[len(alone) :]]
    encoded = encode(task, tokenizer, length)
    (request,) = encoded.requests
    assert request.ids.tolist() == ids[-length - 1 :] and request.scored == scored
    assert encoded.cut == (len(ids) > length + 1)
    sample = request.sample(length + 3)
    targets = sample.weights > 0
    assert sample.labels[targets].tolist() == ids[len(ids) - scored :] and len(sample.tokens) == length + 3
    (places,) = np.nonzero(targets)
    assert (sample.labels[places[:-1]] == sample.tokens[places[:-1] + 1]).all()


def test_the_name_of_a_special_token_is_that_token(tokenizer):
    (ids,) = tokenizer.encode_prompts([f"{BEGIN}one"])
    assert ids[0] == tokenizer.begin and tokenizer.begin not in tokenizer.encode(f"{BEGIN}one")
    assert tokenizer.decode_bytes(ids) == b"one"


def test_results_are_counted_by_hand(tmp_path, tokenizer):
    rows = [
        {"context": "a", "choices": ["12345678", "1"], "answer": 0},  # likeliest by itself: 1; by character: 0
        {"context": "a", "choices": ["éééé", "123456"], "answer": 1},  # by character: 1; by byte: 0
        {"context": "a", "choices": ["x", "y", "z"], "answer": 2},
    ]
    encoded = encode(read_task(written(tmp_path, *rows)), tokenizer, 64)
    likelihoods = np.asarray([-4.0, -1.0, -6.0, -7.0, -3.0, -2.0, -1.0])
    result = result_of(encoded, likelihoods, np.zeros(7, dtype=bool))
    assert (result.acc, result.acc_norm, result.acc_bytes) == pytest.approx((1 / 3, 1.0, 2 / 3))
    assert result.values() == {
        "task": "task", "examples": 3, "requests": 7, "cut": 0,
        "acc": result.acc, "acc_norm": 1.0, "acc_bytes": result.acc_bytes,
    }  # fmt: skip
    assert "perplexity" not in result.line() and "cut" not in result.line()
    broken = result_of(encoded, np.where(np.arange(7) == 5, np.nan, likelihoods), np.zeros(7, dtype=bool))
    assert np.isnan([broken.acc, broken.acc_norm, broken.acc_bytes]).all()


def test_one_choice_is_measured_by_whether_the_model_would_write_it(tmp_path, tokenizer):
    rows = [{"context": "a", "choices": [text], "answer": 0} for text in ("x", "y")]
    encoded = encode(read_task(written(tmp_path, *rows)), tokenizer, 64)
    result = result_of(encoded, np.asarray([-1.0, -3.0]), np.asarray([True, False]))
    assert (result.acc, result.perplexity) == (0.5, pytest.approx(np.exp(2.0)))
    assert result.acc_norm is None and "acc_norm" not in result.values()
    assert result_of(encoded, np.asarray([-1e4, -1e4]), np.asarray([True, False])).perplexity == np.inf
