"""What does a save cost a run, how fast is an export, how soon does a killed run go on?

Save: wall time of a few steps with a synchronous save, an asynchronous one, and none, interleaved in one process on the
same model; what a save costs is the difference to none, of medians. Export: MB/s of export_hf's path (read, convert,
write, read back, compare, checksum) in BF16 with one process, beside safetensors' plain save_file of the same tensors,
interleaved. Restart: seconds from kill -9 of a rank under torchrun --max-restarts to the first step done again.

python -m benchmarks.checkpoints [repeats=5] [steps=4] [hidden=256] [output=FILE.json]
"""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
from benchmarks.checkpoint_export import exports
from benchmarks.checkpoint_restart import restart
from benchmarks.checkpoint_saves import saves


def main(arguments: list[str]) -> None:
    """Measure, print and write."""
    given = dict(argument.split("=", 1) for argument in arguments)
    repeats, steps = int(given.get("repeats", 5)), int(given.get("steps", 4))
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        found = {"save": saves(place, repeats, steps, int(given.get("hidden", 256)))}
        print(json.dumps(found["save"], indent=1), flush=True)
        found["export"] = exports(place, repeats)
        print(json.dumps(found["export"], indent=1), flush=True)
        found["restart"] = restart(place)
        print(json.dumps(found["restart"], indent=1), flush=True)
    found["machine"] = {
        "cpus": os.cpu_count(),
        "load_average_at_the_end": os.getloadavg()[0],
        "python": platform.python_version(),
        "command": f"python -m benchmarks.checkpoints repeats={repeats} steps={steps}",
    }
    output = Path(given.get("output", ROOT / "benchmarks" / "results" / "checkpoints.json"))
    output.write_text(json.dumps(found, indent=1) + "\n")
    print(f"wrote {output}")


if __name__ == "__main__":
    main(sys.argv[1:])
