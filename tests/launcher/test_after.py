"""What a batch script is told once its ranks have ended: who failed, and which hosts to exclude."""

import json

from dsv3_megatron.run.failures.records import FailedRank, note_failure, note_hosts
from launcher.slurm import after


def fail(run, start, *, host="node2", kind="silent"):
    folder = run / "failures" / start
    note_hosts(folder, ["node1", "node2"])
    note_failure(folder, FailedRank(1, host, 1.0, "gone without a word", kind, True))


def asked(run, capsys, **words):
    capsys.readouterr()
    assert after.main([f"run={run}", *(f"{key}={value}" for key, value in words.items())]) == 0
    return capsys.readouterr()


def test_a_host_that_fails_twice_is_printed_for_the_next_start(tmp_path, capsys):
    run = tmp_path / "run"
    fail(run, "job-1-0-0")
    first = asked(run, capsys, failures=2)
    assert first.out == "\n" and first.err == "the start failed: rank 1 on node2: gone without a word\n"
    fail(run, "job-1-1-0")
    second = asked(run, capsys, failures=2)
    assert second.out == "node2\n"
    assert "node2 is excluded from the next start: it was the first to fail 2 times in the last 7 days" in second.err
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [(event["event"], event["host"], event["rank"]) for event in events] == [("failed", "node2", 1)] * 2
    assert asked(run, capsys, failures=2).err.count("the start failed") == 0, "told once"
