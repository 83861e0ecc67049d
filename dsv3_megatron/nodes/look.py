"""All that one rank finds out about its node, and the facts of all ranks on the first."""

from __future__ import annotations

import uuid
from hashlib import sha256
from pathlib import Path

import torch

from dsv3_megatron.nodes.facts import RankFacts
from dsv3_megatron.nodes.health import gpu_problems
from dsv3_megatron.nodes.measure import Place, clock_seconds, message_speed, product_tflops
from dsv3_megatron.nodes.seen import code_digest, data_digest, missing_paths
from dsv3_megatron.recipe import Recipe
from dsv3_megatron.run.directory import RunDirectory
from parallel.agree import agreed, from_first, gathered
from parallel.errors import RecipeError
from parallel.world import host_name


def gather_facts(
    recipe: Recipe, resolved_recipe: str, code: Path, place: Place, device: torch.device
) -> list[RankFacts]:
    """Return the facts of all ranks on the first; nothing elsewhere. All ranks together, in the default process group.

    ``code``: the folder that this project's packages lie in.
    Raises: RecipeError: the first rank cannot make the run directory. RankFault: a rank met something unforeseen.
    """
    directory, mark = RunDirectory(recipe.run.directory), from_first(lambda: uuid.uuid4().hex[:8])
    with agreed(looked=place.rank == 0):
        if place.rank == 0:
            directory.create()
            directory.leave_mark(mark)
    with agreed():
        digests, problems, remarks = dict[str, str](), list[str](), list[str]()
        if place.local_rank == 0:
            digests, problems = _seen(recipe, resolved_recipe, code, directory, mark)
            if device.type == "cuda":
                wrong, remarks = gpu_problems(place.local_size)
                problems += wrong
        tflops = product_tflops(device)
    if place.rank == 0:
        directory.remove_mark(mark)
    mine = RankFacts(
        rank=place.rank,
        node=place.node,
        local_rank=place.local_rank,
        host=host_name(),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        tflops=tflops,
        within=message_speed(place, device, within=True),
        between=message_speed(place, device, within=False),
        clock_seconds=clock_seconds(place),
        digests=digests,
        problems=tuple(problems),
        remarks=tuple(remarks),
    )
    return gathered(mine)


def _seen(
    recipe: Recipe, resolved_recipe: str, code: Path, directory: RunDirectory, mark: str
) -> tuple[dict[str, str], list[str]]:
    """Return the digests of what this node sees, and what it should see and does not."""
    problems = []
    try:
        directory.check_mark(mark)
    except RecipeError as error:
        problems.append(str(error).removeprefix("recipe: "))
    data, wrong = data_digest(recipe)
    problems += [*([wrong] if wrong else []), *missing_paths(recipe)]
    digests = {"code": code_digest(code), "recipe": sha256(resolved_recipe.encode()).hexdigest()}
    return digests | ({"data": data} if data else {}), problems
