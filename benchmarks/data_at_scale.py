"""Does a run over 14.8 trillion tokens start in a minute? A folder of 231,000 shards, opened as a rank of 2,048 does.

    python -m benchmarks.data_at_scale [shards=231000] [ranks=2048] [output=FILE.json]

14.8T tokens are 231,000 shards of the 64M that prepare_data makes. The shards here are as many and tiny (names of a few
files), for what a start costs is asked of files and not of tokens. At a hundredth, a tenth and all of them one process
does what one rank does: check and pack its share, open the data, and make the samples of a first step; counted are
files that it asks for, files that it opens, and afterwards descriptors, mappings and memory. What packing costs grows
with tokens, and is timed on one shard of 64M tokens.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.work import machine
from dsv3_megatron.data.settings import DataSettings
from dsv3_megatron.data.source.packing import PackingRule, pack
from dsv3_megatron.data.source.shard_folder import ShardFolder
from dsv3_megatron.data.source.shard_table import write_table
from dsv3_megatron.data.source.shards import MANIFEST, TOKENIZER, Manifest, Shard, ShardWriter, Source
from dsv3_megatron.data.tokenizer import Tokenizer
from dsv3_megatron.run.files import write_json

SHARDS, RANKS, LINKS = 231_000, 2048, 20_000  # of one file: file systems have a limit
LENGTH, STEP_SAMPLES = 64, 120  # tokens of a sequence here; DeepSeek-V3's 15,360 sequences over 128 data-parallel ranks
SHARD_TOKENS, MEAN_DOCUMENT = 64_000_000, 1_000
VOCABULARY = 300


def make_folder(folder: Path, count: int) -> None:
    """Write a folder of ``count`` tiny shards, one of them held out."""
    tokenizer = Tokenizer.train(["a few words to begin with"], VOCABULARY)
    folder.mkdir(parents=True)
    tokenizer.save(folder / TOKENIZER)
    (folder / "00_text").mkdir()
    documents = [np.full(length, 7, dtype=np.int32) for length in (30, 90, 50, 20)]
    shards: list[Shard] = []
    model: Shard | None = None
    for number in range(count):
        split = "train" if number else "held_out"
        name = f"00_text/{split}_{max(0, number - 1):05d}"
        if model is None or number % LINKS == 1:
            writer = ShardWriter(folder, name, tokenizer.vocab_size)
            writer.add(documents)
            model = writer.commit()
        else:
            for suffix in ("bin", "idx", "sums"):
                os.link(folder / f"{model.name}.{suffix}", folder / f"{name}.{suffix}")
        shards.append(model.model_copy(update={"name": name}))
    source = Source(name="00_text", input="text", documents=4 * count, tokens=190 * count)
    sources, digest = write_table(folder, [source], shards)
    manifest = Manifest(
        tokenizer_sha256=tokenizer.sha256, vocab_size=tokenizer.vocab_size, options={}, sources=sources,
        table_sha256=digest, has_sums=True,
    )  # fmt: skip
    write_json(folder / MANIFEST, manifest.model_dump())


class Counting:
    """Counts the files that this process asks for and opens while the block lasts."""

    def __init__(self) -> None:
        self.stats = self.opens = 0
        self._active = False
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._active and event == "open" and not isinstance(arguments[0], int):  # which is open already
            self.opens += 1

    def __enter__(self) -> Counting:
        self._active, self._lstat = True, os.lstat

        def counted(*arguments: Any, **keys: Any) -> os.stat_result:
            self.stats += 1
            return self._lstat(*arguments, **keys)

        os.lstat = counted
        return self

    def __exit__(self, *_: object) -> None:
        self._active, os.lstat = False, self._lstat


def settings_of(folder: str | Path) -> DataSettings:
    """Return what a recipe says of a folder."""
    return DataSettings(source="indexed", path=str(folder), sequence_length=LENGTH, held_out_sequences=8)


def resident_bytes() -> int:
    """Return what this process holds in memory now, pages of mapped files included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def as_rank(folder: str, rank: int, ranks: int) -> dict[str, Any]:
    """Do in this process what a rank does until it has a first step's samples, where the others have made theirs."""
    from dsv3_megatron.data.source.build import build  # torch: counted in no figure

    settings = settings_of(folder)
    before = resident_bytes()
    counting = Counting()
    with counting:
        start = time.perf_counter()
        shards = ShardFolder.of(settings)
        place = shards.choose_place()
        shards.make_ready(place, (rank, ranks))
        ready = time.perf_counter() - start
        checked, opened = counting.stats, counting.opens
        start = time.perf_counter()
        if rank == 0:
            shards.seal(place)
        sealed = time.perf_counter() - start
        start = time.perf_counter()
        data = build(settings, vocab_size=VOCABULARY, seed=1, folder=shards, place=place)
        numbers = range(rank * STEP_SAMPLES, (rank + 1) * STEP_SAMPLES)
        samples = [data.train.sample(number) for number in numbers]
        reading = time.perf_counter() - start
    assert len(samples) == STEP_SAMPLES and all(sample.weights.sum() > 0 for sample in samples)
    return {
        "share_seconds": ready, "seal_seconds": sealed, "samples_seconds": reading,
        "stat_calls": counting.stats, "of_the_share": checked, "opens": counting.opens, "opens_of_the_share": opened,
        "descriptors": len(os.listdir("/proc/self/fd")),
        "mappings": len(Path("/proc/self/maps").read_text().splitlines()),
        "memory_mib": (resident_bytes() - before) / 2**20,
    }  # fmt: skip


def in_a_process(folder: Path, rank: int, ranks: int) -> dict[str, Any]:
    """Return :func:`as_rank` of a process of its own."""
    words = [sys.executable, "-m", "benchmarks.data_at_scale", "as_rank", str(folder), str(rank), str(ranks)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(folder: Path, count: int, ranks: int) -> dict[str, Any]:
    """Return what a start over ``count`` shards costs: as one of ``ranks``, as the first of them, and as the only."""
    make_folder(folder, count)
    start = time.perf_counter()
    shards = ShardFolder.of(settings_of(folder))
    place = shards.choose_place()
    shards.make_ready(place)
    packed = time.perf_counter() - start
    shards.seal(place)
    own = shards.packings(place)[0]
    rank = (ranks - 1) % own.files  # one that has a share; of what it packs, nothing is there yet
    for number in range(own.files)[rank::ranks]:
        own.file(number).unlink()
    found: dict[str, Any] = {"shards": count, "all_packed_seconds": packed}
    found["rank"] = in_a_process(folder, rank, ranks)
    found["first_rank"] = in_a_process(folder, 0, ranks)
    found["alone"] = in_a_process(folder, 0, 1)
    return found


def packing_seconds(rounds: int = 3) -> float:
    """Return how long the packing of one shard of 64M tokens takes, median."""
    random = np.random.default_rng(0)
    lengths = np.maximum(2, random.lognormal(np.log(MEAN_DOCUMENT) - 0.5, 1.0, SHARD_TOKENS // MEAN_DOCUMENT))
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        pack(lengths.astype(np.int64), PackingRule(4096), bytes(32))
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def main() -> None:
    """Print the table, and write the numbers where they are asked for."""
    given = dict(word.split("=", 1) for word in sys.argv[1:])
    shards, ranks = int(given.get("shards", SHARDS)), int(given.get("ranks", RANKS))
    folder = Path(tempfile.mkdtemp())
    try:
        rows = [measure(folder / str(part), shards // part, ranks) for part in (100, 10, 1)]
    finally:
        shutil.rmtree(folder)
    each = packing_seconds()
    result = {
        "command": " ".join(["python -m benchmarks.data_at_scale", *sys.argv[1:]]),
        "machine": machine(),
        "ranks": ranks, "packing_seconds_of_a_shard": each,
        "packing_seconds_of_a_rank": each * -(-shards // ranks), "rows": rows,
    }  # fmt: skip
    names = ("stat_calls", "opens", "descriptors", "mappings", "memory_mib", "share_seconds", "samples_seconds")
    for who in ("rank", "first_rank", "alone"):
        print(f"{who}: shards | " + " | ".join(names))
        for row in rows:
            print(f"    {row['shards']:,} | " + " | ".join(f"{row[who][name]:,.4g}" for name in names))
    print(f"packing of 64M tokens: {each:.2f} s, of a rank's share: {result['packing_seconds_of_a_rank']:.0f} s")
    if "output" in given:
        write_json(Path(given["output"]), result)


if __name__ == "__main__":
    if sys.argv[1:2] == ["as_rank"]:
        print(json.dumps(as_rank(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))))
    else:
        main()
