"""The rules of the house (docs/architecture.md): imports go down, settings need nothing, rooms stay small."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("parallel", "dsv3_megatron", "launcher")
# From the ground: an import goes to a floor further down, or stays in its room.
FLOORS = [
    line.split()
    for line in re.search(r"```floors\n(.*?)```", (ROOT / "docs/architecture.md").read_text(), re.S)[1].splitlines()
][::-1]
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in (*PACKAGES, "benchmarks")
    for path in (ROOT / package).rglob("*.py")
}
SETTINGS = [name for name in FILES if name.endswith(".settings")]


def room(module: str) -> str:
    """Return the folder of dsv3_megatron that a module lies in, or its package."""
    package, _, rest = module.partition(".")
    return rest.partition(".")[0] if package == "dsv3_megatron" and rest else package


def imported(module: str) -> set[str]:
    """Return the modules of ours that a module imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name for name in whole if name in FILES} or {node.module}
    return {name for name in found if name in FILES}


def test_every_room_has_a_floor_and_every_floor_a_room():
    rooms = {room(name) for name in FILES if name != "dsv3_megatron"}
    assert sorted(name for floor in FLOORS for name in floor) == sorted(rooms)


def test_the_product_needs_no_test():
    for name, path in FILES.items():
        if name.startswith(PACKAGES):
            assert not re.search(r"^\s*(from|import) (testing|tests|benchmarks)\b", path.read_text(), re.M), path


def test_imports_go_down():
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    climbs = [
        f"{module} ({room(module)}) imports {other} ({room(other)})"
        for module in FILES
        for other in imported(module)
        if module != "dsv3_megatron"
        and room(other) != room(module)
        and floor[room(other)] >= floor[room(module)]
        # every room's settings are read by the recipe; they need nothing themselves, as the next test says
        and not (module == "dsv3_megatron.recipe" and other in SETTINGS)
    ]
    assert not climbs, "\n".join(climbs)


@pytest.mark.parametrize("module", SETTINGS)
def test_settings_need_parallel_and_pydantic_alone(module):
    names = set()
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        names |= {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
        names |= {node.module} if isinstance(node, ast.ImportFrom) else set()
    strangers = {
        name for name in names if name.partition(".")[0] not in {*sys.stdlib_module_names, "parallel", "pydantic"}
    }
    assert not strangers


def test_settings_are_read_without_torch():
    code = f"import sys, {', '.join(SETTINGS)}, dsv3_megatron.recipe; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_a_package_says_in_a_sentence_what_it_is_for():
    """Two of them are more: the table of schedules, and the search over them."""
    for name, path in FILES.items():
        if (
            path.name == "__init__.py"
            and name.startswith(PACKAGES)
            and name not in ("parallel.schedules", "parallel.search")
        ):
            (only,) = ast.parse(path.read_text()).body
            assert isinstance(only.value, ast.Constant) and only.value.value.count("\n") == 0, path


def test_an_import_inside_a_function_says_why():
    """On its line, or above the block it stands in. The room megatron says it once a file: all of it waits for
    the process to be prepared."""
    silent = []
    for name, path in FILES.items():
        if not name.startswith(PACKAGES) or room(name) == "megatron":
            continue
        text = path.read_text()
        lines = text.splitlines()
        functions = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef))
        for node in {n for f in functions for n in ast.walk(f) if isinstance(n, (ast.Import, ast.ImportFrom))}:
            first, last = node.lineno - 1, node.end_lineno
            while lines[first - 1].strip().startswith(("import ", "from ", "#")):
                first -= 1
            while last < len(lines) and lines[last].strip().startswith(("import ", "from ")):
                last += 1
            if "#" not in "".join(lines[first:last]):
                silent.append(f"{path}:{node.lineno}")
    assert not silent, "\n".join(silent)


def test_rooms_stay_small_and_nothing_lies_between_them():
    assert {path.name for path in (ROOT / "dsv3_megatron").glob("*.py")} == {"__init__.py", "recipe.py", "settings.py"}
    for package in PACKAGES:
        for folder in {path.parent for path in (ROOT / package).rglob("*.py")}:
            assert len(list(folder.glob("*.py"))) <= 16, f"{folder} has more than fifteen files beside __init__.py"
