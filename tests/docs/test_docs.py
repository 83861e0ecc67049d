"""The documentation holds: links lead somewhere, commands exist with keys they take, the reference is in step."""

import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from launcher import dashboard, demo, evaluate, export_hf, generate, import_hf, plan
from launcher.command_line.compose import compose, compose_config
from launcher.command_line.recipe_files import RECIPES, options
from launcher.command_line.start_ranks import split_torchrun
from launcher.views import reference
from launcher.views.reference import reference as written_reference
from parallel.errors import UserError
from testing.pages import DOCKER_FILES, PAGES, commands, shell_lines

ROOT = RECIPES.parent
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
RECIPE_COMMANDS = ("pretrain.py", "submit.py", "plan.py")
OWN_KEYS = ("dry_run", "chain", "run", "lines", "rank", *plan.PlanArguments.model_fields)


def anchors(page):
    """Return the anchors of a page as forges make them."""
    heads = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_link_leads_to_a_file_or_heading(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    for target in LINK.findall(text):
        if re.match(r"(https?|mailto):", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), f"{page.name}: {target}"


@pytest.mark.parametrize("page", [*PAGES, *DOCKER_FILES], ids=lambda p: p.name)
def test_every_command_names_what_exists(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for command in commands(page):
        words = shlex.split(command, comments=True)
        words = words[next(i for i, w in enumerate(words) if w in ("python", "torchrun", "dsv3", "make")) :]
        if words[0] == "make":
            asked = [w for w in words[1:] if "=" not in w]
            assert set(asked) <= targets, f"{page.name}: {command}"
            continue
        if words[:2] == ["dsv3", "train"]:
            _, overrides = split_torchrun(words[2:])
            check_overrides(page, command, overrides)
            continue
        script = next((w for w in words if w.endswith(".py")), None)
        if words[:2] == ["python", "-m"] and words[2].partition(".")[0] in ("benchmarks", "testing"):
            assert find_spec(words[2]), f"{page.name}: {command}"
            continue
        if script is None or script.startswith("<"):
            continue
        assert (ROOT / script).exists(), f"{page.name}: {command}"
        if Path(script).name in RECIPE_COMMANDS and script.startswith("launcher/"):
            check_overrides(page, command, words[words.index(script) + 1 :])


@pytest.mark.parametrize("page", [ROOT / "docs" / "containers.md", *DOCKER_FILES], ids=lambda p: p.name)
def test_images_are_built_from_what_is_there_and_run_as_they_are_named(page):
    lines = [line.strip() for line in shell_lines(page) if line.strip().startswith("docker ")]
    built = [
        re.fullmatch(r"docker build -f (\S+) -t (\S+) \.\s*(#.*)?", line) for line in lines if "docker build" in line
    ]
    assert built and all(built), lines
    assert all((ROOT / match[1]).is_file() for match in built)
    for line in lines:
        assert any(re.search(rf"{re.escape(match[2])}\b", line) for match in built), line


def check_overrides(page, command, words):
    """Keys must be a recipe's; groups must name a file. Placeholders in capitals are the reader's."""
    if words and words[0] in ("status", "logs", "cancel"):
        return
    kept = []
    for word in words:
        key, equals, value = word.partition("=")
        if (
            not equals
            or word.startswith("-")
            or key in OWN_KEYS
            or "..." in word
            or re.search(r"\b[A-Z][A-Z_]+\b", value)
        ):
            continue
        if key in ("recipe", "cluster") and (re.fullmatch("[A-Z]", value) or value.endswith(".yaml")):
            continue
        kept.append(word)
    if "," in "".join(kept) and ("-m" in words or "--multirun" in words):
        kept = [re.sub(r"=([^,]+),.*", r"=\1", word) for word in kept]
    try:
        compose_config(kept)
    except UserError as error:
        if "did you mean" not in (ROOT / page).read_text():  # a page may show a mistake and its answer
            raise AssertionError(f"{page.name}: {command}: {error}") from None


def test_the_reference_is_in_step_with_the_schema():
    """To renew: make docs."""
    assert (ROOT / "docs" / "recipes.md").read_text() == written_reference()


def test_every_recipe_file_is_in_the_reference():
    text = written_reference()
    for name in options("recipe"):
        assert f"| [`{name}`]" in text
        compose([f"recipe={name}"])


def test_every_page_is_reachable_from_the_readme():
    seen, todo = set(), [ROOT / "README.md"]
    while todo:
        page = todo.pop()
        if page in seen:
            continue
        seen.add(page)
        for target in LINK.findall(page.read_text()):
            file = (page.parent / target.partition("#")[0]).resolve()
            if file.suffix == ".md" and file.exists():
                todo.append(file)
    assert set(PAGES) <= seen, f"not linked: {sorted(p.name for p in set(PAGES) - seen)}"


def test_the_citation_is_yaml_with_what_a_reader_cites():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0" and citation["title"] == "dsv3-megatron"
    assert any("2412.19437" in str(reference) for reference in citation["references"])


@pytest.mark.parametrize("command", [dashboard, demo, evaluate, export_hf, generate, import_hf, reference])
def test_every_command_teaches_itself(command, capsys):
    assert command.main(["--help"]) == 0
    assert "Keys" in capsys.readouterr().out
