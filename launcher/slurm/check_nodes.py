"""Whether the nodes of a job are fit for its run: what a batch script starts on all ranks before it trains.

    torchrun ... -m launcher.slurm.check_nodes recipe=NAME key=value ...    with the words of the run

Looks, in less than a minute: GPUs and their health, a matrix product on each, messages within and between nodes, the
run directory, the data and other paths of the recipe, one code and one recipe everywhere, clocks. A host that is
not fit is named in a line, and the exit code is 1; what is slow beside the others is named, and the run starts.
Everything that was measured is in the file that DSV3_NODES_FILE names.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from dsv3_megatron.metrics.step_metrics import append_event
from dsv3_megatron.recipe import Recipe
from dsv3_megatron.run.directory import RunDirectory
from dsv3_megatron.run.failures.blame import UNFIT
from dsv3_megatron.run.files import write_atomically
from dsv3_megatron.run.made import for_owner
from dsv3_megatron.run.resilient import ResilientFiles
from launcher.command_line.compose import resolved_yaml
from launcher.command_line.console import guarded
from launcher.command_line.hydra_flags import run_command
from launcher.command_line.recipe_files import PACKAGE
from launcher.pretrain import attempt, prepare_process
from parallel.world import World

if TYPE_CHECKING:
    from dsv3_megatron.nodes.facts import Finding, RankFacts

FACTS = "DSV3_NODES_FILE"  # environment variable: where what was measured goes
MEETING_SECONDS = 120.0  # in which all ranks must have come


def check(recipe: Recipe) -> int:
    """Look and measure on this rank of the world that torchrun started; return the exit code, on all ranks alike."""
    for_owner(recipe.run.readable_by)
    world = World.from_environment()
    device = prepare_process(recipe, world)
    # torch, and what reads how the process was prepared
    from dsv3_megatron.nodes.judge import judge
    from dsv3_megatron.nodes.look import gather_facts
    from dsv3_megatron.nodes.measure import Place
    from parallel.agree import from_first
    from parallel.groups import start_processes, stop_processes

    start = time.perf_counter()
    place = Place(world.rank, world.size, int(os.environ.get("LOCAL_WORLD_SIZE", world.size)))
    start_processes(world, device, MEETING_SECONDS)
    facts = gather_facts(recipe, resolved_yaml(recipe), PACKAGE.parent, place, device)

    def conclude() -> int:
        findings = judge(facts)
        code = int(any(finding.unfit for finding in findings))
        _note(RunDirectory(recipe.run.directory), facts, findings)
        _say(facts, [str(finding) for finding in findings], time.perf_counter() - start, code)
        return code

    code = from_first(conclude)
    stop_processes()
    return code


def _note(directory: RunDirectory, facts: list[RankFacts], findings: list[Finding]) -> None:
    """Make an event of the run of each host that is not fit. Where most hosts are not, it is no host's own fault."""
    unfit = {finding.host for finding in findings if finding.unfit}
    of_host = len(unfit) <= len({each.host for each in facts}) / 2
    files = ResilientFiles(lambda name, values, text: print(text))
    for finding in findings:
        if finding.unfit:
            append_event(files, directory, UNFIT, {"host": finding.host, "said": finding.said, "of_host": of_host})
    files.close()


def _say(facts: list[RankFacts], findings: list[str], seconds: float, code: int) -> None:
    """Print what was found, and keep what was measured."""
    for line in dict.fromkeys(remark for each in facts for remark in each.remarks):
        print(f"nodes: {line}")
    for line in findings:
        print(f"nodes: {line}")
    nodes = len({each.node for each in facts})
    fit = f"nodes: {nodes:,} with {len(facts):,} ranks checked in {seconds:.0f} s: fit"
    unfit = (
        f"nodes: {nodes:,} with {len(facts):,} ranks checked in {seconds:.0f} s: not fit, and the run does not start"
    )
    print(unfit if code else fit, flush=True)
    if file := os.environ.get(FACTS):
        content = {"seconds": seconds, "findings": findings, "ranks": [asdict(each) for each in facts]}
        write_atomically(Path(file), json.dumps(content, indent=1) + "\n")


def main(arguments: Sequence[str]) -> int:
    """Return the exit code: 0 fit, 1 unfit, 2 bad input."""
    return run_command(check, arguments, __doc__)


if __name__ == "__main__":
    sys.exit(guarded(lambda words: attempt(words, main), speaks=os.environ.get("RANK", "0") == "0"))
