"""Arguments of commands: every value is read right or refused in one line; none is ignored."""

from pathlib import Path

import pytest
from pydantic import Field

from launcher import layout, plan, schedule, submit
from launcher.command_line.arguments import Arguments, parse_arguments, split_words
from parallel.errors import UserError


class Some(Arguments):
    """Keys of no command."""

    count: int | None = Field(None, gt=0, description="how many")
    quick: bool = Field(False, description="less of it")
    place: Path = Field(Path("here"), description="where")
    forward: float = Field(1.0, alias="times.forward", description="of a stage")


@pytest.mark.parametrize("word", ["quick=true", "quick=True", "quick=yes", "quick=1", "quick=on", "--quick"])
def test_true_may_be_written_in_any_way(word):
    assert parse_arguments(Some, [word]).quick is True


def test_values_are_typed_and_null_is_the_value_of_what_is_left_out():
    read = parse_arguments(Some, ["count=null", "place=a=b", "times.forward=2", "quick=no"])
    assert (read.count, read.place, read.forward, read.quick) == (None, Path("a=b"), 2.0, False)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["cuont=1"], "cuont is not a key of this command; did you mean count?"),
        (["forward=1"], "did you mean times.forward?"),
        (["count=abc"], "count = abc: input should be a valid integer"),
        (["count=0"], "count = 0: input should be greater than 0; it can be: integer > 0 or null"),
        (["count=1", "count=2"], "count is given twice"),
        (["count="], "count = is empty; write count=VALUE (integer > 0 or null)"),
        (["quick=maybe"], "quick = maybe"),
        (["place"], "'place' is not key=value"),
        (["--place"], "'--place' is not key=value"),
    ],
)
def test_a_mistake_is_one_line_with_the_nearest_right_one(words, says):
    with pytest.raises(UserError) as caught:
        parse_arguments(Some, words)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2


def test_other_words_are_left_for_the_recipe_but_not_a_misspelt_key():
    own, others = split_words(Some, ["count=1", "run.steps=2", "--quick", "parallel=pp2_ep2", "~data", "+run.name=x"])
    assert own == ["count=1", "--quick"]
    assert others == ["run.steps=2", "parallel=pp2_ep2", "~data", "+run.name=x"]
    with pytest.raises(UserError, match=r"quikc is not a key .* did you mean quick\?"):
        split_words(Some, ["quikc=true"])


@pytest.mark.parametrize(
    ("command", "words", "says"),
    [
        (plan, ["search=maybe"], "search = maybe"),
        (plan, ["search=yes", "--fast"], "fast has no effect beside search=true; leave it out, it belongs to the plan"),
        (plan, ["search=on", "report=a.html"], "report has no effect beside search=true"),
        (plan, ["search=true", "show=regime"], "show has no effect beside search=true"),
        (plan, ["search=true", "save="], "save = is empty"),
        (plan, ["search=true", "save=../x"], "save = ../x"),
        (plan, ["show=regime", "report=a.html"], "report has no effect beside show=regime"),
        (
            plan,
            ["show=precision", "at=1T"],
            "at has no effect beside show=precision; leave it out, it belongs to show=re",
        ),
        (plan, ["show=regime", "at=1T", "svg=a.svg"], "svg has no effect beside at"),
        (plan, ["show=regim"], "show = regim: input should be 'precision', 'optimizer' or 'regime'"),
        (plan, ["show=precision", "format=yaml"], "format = yaml: input should be 'text' or 'json'"),
        (plan, ["show=regime", "at=soon"], "at = soon"),
        (plan, ["format=json"], "format has no effect beside the plan"),
        (plan, ["top=abc", "search=true"], "top = abc: input should be a valid integer"),
        (plan, ["top=3"], "top has no effect beside the plan; leave it out, it belongs to search=true"),
        (plan, ["advice=perhaps"], "advice = perhaps"),
        (plan, ["world=x"], "world = x: input should be a valid integer"),
        (plan, ["assume=all"], "assume = all: input should be 'overlap'"),
        (plan, ["serach=true"], "did you mean search?"),
        (plan, ["--fats"], "'--fats' is not an override"),
        (layout, ["rank=-1"], "rank = -1"),
        (layout, ["wrold=8"], "did you mean world?"),
        (schedule, ["name=1f1b", "pipline=2"], "did you mean pipeline?"),
        (submit, ["dry_run=maybe"], "dry_run = maybe"),
        (submit, ["chain=0"], "chain = 0: input should be greater than or equal to 1"),
        (submit, ["status", "run=x", "lines=3"], "lines is not a key of this command"),
        (submit, ["logs", "run=x", "lines=0"], "lines = 0"),
        (submit, ["dryrun=true"], "did you mean dry_run?"),
    ],
)
def test_no_command_ignores_or_misreads_a_word(command, words, says):
    with pytest.raises(UserError) as caught:
        command.main(words)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2


@pytest.mark.parametrize("word", ["advice=no", "advice=False", "advice=0"])
def test_advice_is_left_out_in_whatever_way_it_is_said(word):
    assert parse_arguments(plan.PlanArguments, [word]).advice is False


def test_every_key_of_every_command_is_described():
    from launcher import (
        dashboard,
        demo,
        evaluate,
        export_hf,
        generate,
        import_hf,
        prepare_data,
        train_tokenizer,
    )
    from launcher.data_commands import check, merge, pack, trace
    from launcher.views import reference

    modules = (dashboard, demo, evaluate, export_hf, generate, import_hf, layout, plan, prepare_data, reference)
    for module in (*modules, schedule, submit, train_tokenizer, check, merge, pack, trace):
        models = [m for m in vars(module).values() if isinstance(m, type) and issubclass(m, Arguments)]
        assert len(models) > 1, module
        for model in models:
            for name, field in model.model_fields.items():
                assert field.description, f"{module.__name__}: {name}"
