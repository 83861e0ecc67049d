"""The counters of benchmarks/at_scale.py find exactly what was done: so many reads, messages, bytes of memory."""

import mmap
import os
import shutil
import subprocess
import sys
import threading

import pytest
import torch
import torch.distributed as dist

from parallel.groups import start_processes
from parallel.world import World
from testing.counting.files import counted_files
from testing.counting.memory import forget_peak, give_back_at_once, peak_bytes, resident_bytes
from testing.counting.phases import counted
from testing.counting.tally import Tally, threads_keep_their_phase
from testing.pages import ROOT
from testing.ranks import run_ranks


def found(work, folder):
    """Return what is counted in ``folder`` while ``work`` is done."""
    tally = Tally("work")
    with counted_files(tally, lambda path: "here" if path.startswith(str(folder)) else None):
        work()
    return {name.removesuffix("/here"): n for name, n in tally.of("work").items() if name.endswith("/here")}


@pytest.fixture
def file(tmp_path):
    """A file of a hundred thousand bytes, more than a buffer holds."""
    path = tmp_path / "file"
    path.write_bytes(bytes(100_000))
    return path


def read_with(call):
    """Return a function that reads five bytes through a call of os."""

    def work(path):
        descriptor = os.open(path, os.O_RDONLY)
        call(descriptor)
        os.close(descriptor)

    return work


READS = {
    "whole": (lambda path: path.read_bytes(), 100_000),
    "text": (lambda path: path.read_text(), 100_000),
    "not buffered": (lambda path: path.open("rb", buffering=0).read(7), 7),
    "into a buffer": (lambda path: path.open("rb", 0).readinto(bytearray(9)), 9),
    "os.read": (read_with(lambda fd: os.read(fd, 5)), 5),
    "os.pread": (read_with(lambda fd: os.pread(fd, 5, 100)), 5),
    "os.preadv": (read_with(lambda fd: os.preadv(fd, [bytearray(2), bytearray(3)], 100)), 5),
    "os.readv": (read_with(lambda fd: os.readv(fd, [bytearray(5)])), 5),
    "past the end": (read_with(lambda fd: os.pread(fd, 5, 99_998)), 2),
}  # fmt: skip


@pytest.mark.parametrize("way", READS)
def test_every_way_of_reading_counts_its_bytes(way, file):
    work, number = READS[way]
    assert found(lambda: work(file), file.parent) == {"opened": 1, "read": number}


def test_what_is_mapped_counts_whole(file):
    def work():
        with file.open("rb") as opened:
            mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ).close()
            mmap.mmap(opened.fileno(), 4096, access=mmap.ACCESS_READ).close()

    assert found(work, file.parent) == {"opened": 1, "mapped": 104_096}


def write_descriptor(path):
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
    os.write(descriptor, b"1234")
    os.pwrite(descriptor, b"567", 4)
    os.writev(descriptor, [b"8", b"9"])
    os.close(descriptor)


WRITES = {
    "bytes": (lambda path: path.write_bytes(bytes(70_000)), 70_000),
    "text": (lambda path: path.write_text("äöü\n"), 7),
    "a little often": (lambda path: [path.open("ab").write(b"x") for _ in range(3)], 3),
    "by its descriptor": (write_descriptor, 9),
}


@pytest.mark.parametrize("way", WRITES)
def test_every_way_of_writing_counts_its_bytes(way, tmp_path):
    work, number = WRITES[way]
    counted_here = found(lambda: work(tmp_path / "new"), tmp_path)
    assert counted_here == {"opened": 3 if "often" in way else 1, "written": number}


def test_torch_saves_and_loads_through_what_is_counted(tmp_path):
    """A file of Python's, as checkpoints use; the file's size says how much it must have been."""

    def work():
        with (tmp_path / "tensors").open("wb") as file:
            torch.save({"a": torch.zeros(1000)}, file)

    written = found(work, tmp_path)
    assert written == {"opened": 1, "written": (tmp_path / "tensors").stat().st_size}
    read = found(lambda: torch.load(tmp_path / "tensors"), tmp_path)
    assert read["opened"] == 1 and read["read"] >= 4000


def test_names_count_by_what_is_asked_of_them(file):
    folder = file.parent

    def work():
        file.exists()
        os.path.getsize(file)
        file.lstat()
        os.access(file, os.R_OK)
        os.stat("file", dir_fd=os.open(folder, os.O_RDONLY))
        os.listdir(folder)
        list(folder.iterdir())
        (folder / "a").mkdir()
        os.replace(file, folder / "a" / "file")
        (folder / "a" / "file").unlink()

    assert found(work, folder) == {"stat": 5, "opened": 1, "listed": 2, "changed": 3}


def test_a_copy_is_read_and_written(file):
    counted_here = found(lambda: shutil.copyfile(file, file.with_name("copy")), file.parent)
    assert (counted_here["read"], counted_here["written"], counted_here["opened"]) == (100_000, 100_000, 2)


def test_nothing_is_counted_outside(file):
    tally = Tally("work")
    with counted_files(tally):
        pass
    file.read_bytes()
    assert not tally.counts


def test_the_system_counts_as_many_opened_files(tmp_path):
    """strace is the witness: every open of a file in the folder, whoever makes it."""
    if shutil.which("strace") is None:
        pytest.skip("no strace here")
    code = (
        "import os, sys; from pathlib import Path; from testing.counting.files import counted_files\n"
        "from testing.counting.tally import Tally\n"
        "tally, folder = Tally('x'), Path(sys.argv[1])\n"
        "with counted_files(tally, lambda path: 'here' if path.startswith(sys.argv[1]) else None):\n"
        "    for n in range(5): (folder / str(n)).write_text('x' * n)\n"
        "    sys.path.insert(0, sys.argv[1]); Path(folder, 'module.py').write_text('a = 1'); import module\n"
        "    [path.read_text() for path in folder.glob('*.py')]; os.stat(folder / '1')\n"
        "print(tally.of('x', 'opened/')['here'])"
    )
    log = tmp_path.with_suffix(".log")
    strace = ["strace", "-f", "-o", str(log), "-e", "trace=open,openat,creat", sys.executable, "-B"]
    done = subprocess.run([*strace, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"strace may not trace here: {done.stderr.splitlines()[:1]}")
    files = [line for line in log.read_text().splitlines() if f'"{tmp_path}/' in line and "O_DIRECTORY" not in line]
    assert int(done.stdout) == len(files) > 6


def test_a_thread_counts_for_the_phase_that_started_it():
    tally, go = Tally("save"), threading.Event()

    def work():
        go.wait(10)
        tally.add("written")

    with threads_keep_their_phase(tally):
        thread = threading.Thread(target=work)
        thread.start()
        tally.phase = "step"
        go.set()
        thread.join()
        tally.add("written")
    assert tally.counts == {"save": {"written": 1}, "step": {"written": 1}}


def growth_of_a_block(size):
    """Return by how many bytes the peak grows while a block is held, and after it."""
    give_back_at_once()
    before = resident_bytes()
    forget_peak()
    block = bytearray(os.urandom(size))  # twice for a moment: the bytes and their copy
    held = peak_bytes() - before
    del block
    forget_peak()
    return held, peak_bytes() - before


def test_memory_grows_by_what_is_held_and_only_for_as_long():
    """In a process of its own: threads that other tests have left may allocate."""
    ((held, after),) = run_ranks(1, growth_of_a_block, [50 << 20])[0]
    assert 95 << 20 < held < 110 << 20
    assert after < 10 << 20


def exchange(case):
    """Send a known number of messages of each kind."""
    os.environ["TORCH_GLOO_LAZY_INIT"] = "0"  # a group sends messages when it is made
    with counted("start", lambda path: None) as phases:
        world = World.from_environment()
        start_processes(world, torch.device("cpu"), timeout_seconds=60)
        phases.enter("store")
        store = dist.distributed_c10d._get_default_store()
        store.set(f"key{world.rank}", "1")
        store.get("key0"), store.get("key1")
        store.wait(["key0", "key1"])
        store.add("sum", 1)
        phases.enter("groups")
        groups = [dist.new_group([rank]) for rank in range(world.size)] + [dist.new_group([0, 1])]
        phases.enter("calls")
        dist.all_reduce(torch.zeros(3))
        dist.all_reduce(torch.zeros(5), group=groups[-1])
        dist.all_gather_into_tensor(torch.zeros(8), torch.zeros(4), group=groups[-1]) if world.rank < 2 else None
        dist.barrier()
        phases.enter("objects")
        dist.all_gather_object([None] * world.size, "x" * 1000)
        dist.broadcast_object_list(["x" * 1000], src=0)
        dist.gather_object("x", [None] * world.size if world.rank == 0 else None)
        phases.enter("end")
        dist.destroy_process_group()
    return phases.found()


@pytest.fixture(scope="module")
def exchanged():
    """What each of three ranks has counted."""
    return run_ranks(3, exchange, [None])[0]


def test_messages_to_the_store_count_those_of_torch_too(exchanged):
    for rank, counts in enumerate(each["counts"] for each in exchanged):
        # Gloo's full mesh: a rank says where it is, and asks for everybody's place.
        assert counts["start"] == {"store/set": 1, "store/wait": 3, "store/get": 3} | elsewhere(counts["start"])
        assert {k: v for k, v in counts["store"].items() if k.startswith("store/")} == {
            "store/set": 1, "store/get": 2, "store/wait": 1, "store/add": 1,
        }  # fmt: skip
        mine = [1, 2] if rank < 2 else [1]  # sizes of the groups that it is in
        assert counts["groups"]["store/get"] == counts["groups"]["store/wait"] == sum(mine)
        assert counts["groups"]["store/set"] == len(mine)


def elsewhere(counts):
    """Return the counts that are not the store's."""
    return {name: number for name, number in counts.items() if not name.startswith("store/")}


def test_groups_and_calls_count_by_kind(exchanged):
    for rank, each in enumerate(exchanged):
        member = rank < 2
        counts = each["counts"]
        assert counts["groups"]["groups/called"] == 4 and counts["groups"]["groups/joined"] == (2 if member else 1)
        calls = {k: v for k, v in counts["calls"].items() if k.startswith(("calls/", "bytes/"))}
        expected = {"calls/all_reduce": 2, "bytes/all_reduce": 32} if member else {}
        expected |= {"calls/all_gather": 1, "bytes/all_gather": 32} if member else {}
        expected |= {"calls/barrier": 1, "bytes/barrier": 0}
        assert calls == ({"calls/all_reduce": 1, "bytes/all_reduce": 12} | expected)
        used = {(name, size): number for name, size, number in each["used"]}
        assert used.get(("undefined", 2), 0) == (2 if member else 0) and ("undefined", 1) not in used


def test_what_an_object_sends_counts_as_its_bytes_and_not_as_calls(exchanged):
    for each in exchanged:
        counts = each["counts"]["objects"]
        calls = {k: v for k, v in counts.items() if k.startswith("calls/")}
        assert calls == {"calls/all_gather_object": 1, "calls/broadcast_object_list": 1, "calls/gather_object": 1}
        assert 3000 < counts["bytes/all_gather_object"] < 3500 and 1000 < counts["bytes/broadcast_object_list"] < 1300
