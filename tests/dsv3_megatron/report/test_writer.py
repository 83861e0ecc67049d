"""The report of a run that goes on: a process apart, one at a time, in bounded memory; its failures end nothing."""

import json
import os
import socket
import time
import tracemalloc
from dataclasses import fields
from itertools import pairwise

import pytest

import dsv3_megatron.run.resilient as resilient
from dsv3_megatron.metrics.step_metrics import StepMetrics, json_line
from dsv3_megatron.report.facts import Events, Steps, read_run
from dsv3_megatron.report.page import write_report
from dsv3_megatron.report.thinning import Envelope, Sample
from dsv3_megatron.report.writer import ReportWriter
from launcher.command_line.compose import compose, resolved_yaml

METRICS = StepMetrics(**{f.name: [0.5] if "list" in f.type else 1 for f in fields(StepMetrics)})
STARTED = {"event": "started", "time": "2026-01-01T00:00:00+00:00"}


def row(step):
    return {f.name: getattr(METRICS, f.name) for f in fields(METRICS)} | {"step": step, "tokens": 256 * step}


@pytest.fixture
def run(tmp_path):
    """A run directory after three steps."""
    (tmp_path / "recipe.yaml").write_text(resolved_yaml(compose(["recipe=dsv3_tiny"])))
    (tmp_path / "events.jsonl").write_bytes(json_line(STARTED))
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(json_line(row(step)) for step in (1, 2, 3)))
    return tmp_path


class Told(list):
    def __call__(self, name, values, text):
        self.append((name, text))


@pytest.fixture
def told():
    return Told()


def writer_of(run, told, every=0.0):
    return ReportWriter(run, every, resilient.Outages(told))


def until(condition):
    """Wait for another process."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "nothing has come in a minute"
        time.sleep(0.01)


def test_the_process_has_nothing_of_the_run_and_yields_to_it(run, told):
    """It is held in the middle, at a metrics.jsonl that has nothing to read yet, and looked at."""
    (run / "metrics.jsonl").unlink()
    os.mkfifo(run / "metrics.jsonl")
    writer = writer_of(run, told)
    with socket.socket() as connection:
        os.set_inheritable(connection.fileno(), True)
        writer.write(METRICS)
        process = writer._process.pid
        until(lambda: os.getpriority(os.PRIO_PROCESS, process) == 19)
        writer.write(METRICS)
        assert writer._process.pid == process, "a second one was started beside it"
        links = [os.readlink(f"/proc/{process}/fd/{n}") for n in os.listdir(f"/proc/{process}/fd")]
        assert not any("socket:" in link for link in links), links
    with open(f"/proc/{process}/environ") as file:
        assert "CUDA_VISIBLE_DEVICES=" in file.read().split("\0")
    with open(f"/proc/{process}/maps") as file:
        assert "libtorch" not in file.read()
    assert os.getsid(process) != os.getsid(0), "Ctrl-C in a terminal would reach it"
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").write_bytes(json_line(row(7)))
    writer.close()
    assert "<dt>step</dt><dd>7 of 200</dd>" in (run / "report.html").read_text() and not told
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


def test_the_last_report_is_there_when_the_writer_is_closed(run, told):
    writer = writer_of(run, told, every=3600)
    writer.write(METRICS)
    assert not (run / "report.html").exists()
    (run / "finished").touch()
    writer.close()
    text = (run / "report.html").read_text()
    assert "<dt>step</dt><dd>3 of 200</dd>" in text and "finished</dd>" in text and not told


def test_a_report_that_fails_is_told_once_and_its_end_too(run, told):
    text = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text("model: 3\n")
    writer = writer_of(run, told)
    for _ in range(2):
        writer._due = 0.0
        writer.write(METRICS)  # starts one
        until(lambda: writer._process.poll() is not None)
        writer.write(METRICS)  # sees what became of it
    assert [name for name, _ in told] == ["write_failed"]
    assert "report.html cannot be written (ValidationError: " in told[0][1] and "\n" not in told[0][1]
    (run / "recipe.yaml").write_text(text)
    writer.close()
    assert [name for name, _ in told] == ["write_failed", "write_recovered"] and (run / "report.html").exists()


def test_a_disk_that_refuses_the_report_is_named(run, told):
    (run / "report.html.tmp").mkdir()
    writer_of(run, told).close()
    ((name, text),) = told
    assert name == "write_failed" and "report.html cannot be written (Is a directory)" in text


def bytes_read():
    with open("/proc/thread-self/io") as file:
        return int(file.readline().split()[1])


def test_training_reads_no_file_for_a_report(run, told):
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(json_line(row(4)) * 20_000)
    writer, before = writer_of(run, told), bytes_read()
    writer.write(METRICS)
    until(lambda: writer._process.poll() is not None)
    writer.write(METRICS)
    assert bytes_read() - before < 100_000 and (run / "report.html").exists()
    writer.close()


def peak_bytes(work):
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_the_memory_of_a_report_does_not_grow_with_the_run(run):
    """Ten times the steps and marks, and expert loads that are larger than all that must be read."""
    loads = {"loads": [[1000 + n for n in range(256)] for _ in range(60)]}
    sizes = []
    for steps in (1_000, 10_000):
        with (run / "metrics.jsonl").open("wb") as file:
            file.writelines(json_line(row(step)) for step in range(1, steps + 1))
        with (run / "events.jsonl").open("wb") as file:
            file.write(json_line(STARTED))
            file.writelines(json_line({**STARTED, "event": "skipped", "step": s}) for s in range(1, steps + 1, 4))
        with (run / "expert_load.jsonl").open("wb") as file:
            file.writelines(json_line({"step": step, **loads}) for step in range(50, steps + 1, 50))
        write_report(run)  # what is imported and cached once
        before = bytes_read()
        sizes.append(peak_bytes(lambda: write_report(run)))
        read = bytes_read() - before
    assert sizes[1] < 1.5 * sizes[0] < 30e6, sizes
    others = sum((run / name).stat().st_size for name in ("metrics.jsonl", "events.jsonl", "recipe.yaml"))
    assert read < others + 500_000 < (run / "expert_load.jsonl").stat().st_size + others


def test_a_long_run_keeps_its_extremes_sums_and_marks(run):
    count = 50_000
    with (run / "metrics.jsonl").open("wb") as file:
        for step in range(1, count + 1):
            spike = {12_345: 99.0, 23_456: -5.0}.get(step, 1.0 + step / count)
            file.write(json_line({**row(step), "grad_norm": spike, "step_seconds": 0.5}))
    with (run / "events.jsonl").open("wb") as file:
        file.writelines(json_line({**STARTED, **e}) for e in ({}, {"event": "skipped", "step": 12_345}))
    facts = read_run(run)
    values = [y for _, y in facts.curve("grad_norm")]
    assert max(values) == 99.0 and min(values) == -5.0 and len(values) <= 1600
    assert facts.curve("grad_norm") == sorted(facts.curve("grad_norm"))
    assert facts.steps.seconds == count / 2 and facts.last["step"] == count
    assert facts.steps.tokens_at == {12_345: 12_345 * 256}
    numbers = [s["step"] for s in facts.steps.sample]
    assert 150 <= len(numbers) <= 300 and len({b - a for a, b in pairwise(numbers)}) == 1


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 16, 17, 1000])
def test_thinning_on_the_way_keeps_extremes_and_ends_within_its_bound(count):
    envelope, sample = Envelope(8), Sample(8)
    values = [(n * 7919) % 101 for n in range(count)]
    for n, value in enumerate(values):
        envelope.add(n, value)
        sample.add({"n": n})
    points = envelope.points()
    assert points == sorted(points) and len(points) <= 16 and len(sample.rows) <= 8
    assert {y for _, y in points} >= ({min(values), max(values)} if values else set())
    if count <= 8:
        assert points == list(enumerate(values)) and len(sample.rows) == count


def test_events_count_once_and_the_newest_are_kept():
    events, steps = Events(), Steps({3})
    for number in range(1000):
        events.add({"event": "held_out", "time": STARTED["time"], "step": number % 10, "held_out_loss": float(number)})
    for number in range(1, 5):
        steps.add(json.loads(json_line(row(number))))
    assert len(events.held_out) == 10 and events.held_out[9] == 999.0 and len(events.newest) == 200
    assert steps.tokens_at == {3: 768} and steps.first["step"] == 1 and steps.last["step"] == 4
