"""What a batch script asks once its ranks have ended without finishing the run: which hosts to keep away from.

    python -m launcher.slurm.after run=RUN_DIRECTORY failures=2 slow=0

Prints their names with commas between them, for SLURM's ExcNodeList, and on the other stream who failed first and why a
host is excluded. What was found becomes events of the run.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

from pydantic import Field, NonNegativeInt

from dsv3_megatron.metrics.step_metrics import append_event
from dsv3_megatron.run.directory import RunDirectory
from dsv3_megatron.run.failures.blame import EVENT, hosts_to_exclude, take_blames
from dsv3_megatron.run.files import iterate_json_lines
from dsv3_megatron.run.resilient import ResilientFiles
from launcher.command_line.arguments import Arguments, takes
from launcher.command_line.console import guarded


class AfterArguments(Arguments):
    """Keys of the command."""

    run: Path = Field(description="run directory, in which nobody trains now")
    failures: NonNegativeInt = Field(0, description="exclude a host that was the first to fail so often; 0 = never")
    slow: NonNegativeInt = Field(0, description="exclude a host that was named the slowest so often; 0 = never")


@takes(AfterArguments, __doc__)
def main(given: AfterArguments) -> int:
    """Note who failed, and name the hosts to keep away from; return the exit code."""
    directory = RunDirectory(given.run)
    files = ResilientFiles(lambda name, values, text: print(text, file=sys.stderr))
    for blame in take_blames(directory.path):
        append_event(files, directory, EVENT, asdict(blame))
        print(f"the start failed: {blame}", file=sys.stderr)
    files.close()
    excluded = hosts_to_exclude(iterate_json_lines(directory.events), failures=given.failures, slow=given.slow)
    for host, why in excluded.items():
        print(f"{host} is excluded from the next start: it {why}", file=sys.stderr)
    print(",".join(excluded))
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
