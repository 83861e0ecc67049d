"""Who failed first, from what ranks left; and which hosts a run keeps away from."""

import json
import os
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_megatron.run.failures.blame import first_to_fail, hosts_to_exclude
from dsv3_megatron.run.failures.records import (
    FailedRank,
    FailedStart,
    failed_starts,
    forget,
    note_failure,
    note_hosts,
    start_name,
)

HOSTS = {f"node{n}": list(range(4 * n, 4 * n + 4)) for n in range(3)}


def failed(rank, kind="follows", time=10.0, said="Connection closed by peer", of_host=None):
    return FailedRank(rank, f"node{rank // 4}", time, said, kind, kind != "follows" if of_host is None else of_host)


def blamed(*ranks, hosts=HOSTS):
    return first_to_fail(FailedStart("start", hosts, ranks))


def test_what_a_rank_met_itself_counts_before_what_others_lost_earlier():
    found = blamed(failed(0, time=9.0), failed(5, "own", 10.0, "CUDA error"), failed(8, time=8.0))
    assert (found.rank, found.host, found.of_host, found.others) == (5, "node1", True, 2)
    assert str(found) == "rank 5 on node1: CUDA error"


def test_a_rank_gone_without_a_word_counts_before_one_that_speaks():
    assert blamed(failed(1, "own", 9.5, "ValueError"), failed(6, "silent", 10.0, "gone")).rank == 6


def test_a_host_that_says_nothing_while_others_do_was_lost():
    found = blamed(failed(0), failed(8))
    assert (found.rank, found.host, found.of_host) == (None, "node1", True)
    assert str(found) == "node1: the host was lost with all its ranks"


def test_of_several_lost_hosts_none_is_blamed():
    found = blamed(failed(0))
    assert (found.host, found.of_host) == (None, False) and "2 hosts were lost together (node1, node2)" in str(found)


@pytest.mark.parametrize(
    ("ranks", "said"),
    [((), "it ended without a word"), ((0, 4, 8), "every rank lost another one; which failed first is not known")],
)
def test_where_nobody_is_known_nobody_is_named(ranks, said):
    found = blamed(*(failed(rank) for rank in ranks))
    assert (found.rank, found.host, found.of_host, str(found)) == (None, None, False, said)


def test_what_ranks_of_several_hosts_meet_alike_is_no_hosts_fault():
    full = {"kind": "own", "said": "OSError: [Errno 28] No space left on device"}
    assert blamed(failed(1, **full), failed(9, **full)).of_host is False
    assert blamed(failed(1, **full), failed(2, **full)).of_host is True


@given(st.lists(st.tuples(st.integers(0, 11), st.sampled_from(["own", "silent", "follows"]), st.floats(0, 100))))
def test_no_order_of_files_changes_who_is_blamed(rows):
    ranks = [failed(rank, kind, time, said=f"{kind} {rank}") for rank, kind, time in rows]
    assert blamed(*ranks) == blamed(*sorted(ranks, key=lambda each: (each.host, each.time, each.rank, each.kind)))


def test_what_was_noted_is_read_again_and_told_once(tmp_path):
    first, second = (tmp_path / "failures" / name for name in ("job-7-0-0", "job-7-1-0"))
    note_hosts(first, [host for host, ranks in HOSTS.items() for _ in ranks])
    note_failure(first, failed(5, "silent"))
    note_failure(first, failed(4, said="x" * 10_000))
    note_hosts(second, ["node0"])
    os.utime(first, (1, 1))
    (first / "node9.jsonl").write_text('{"rank": "5"}\nno line\n{"rank": 1, "host": "node0"')  # torn, or another's
    (_, one), (_, two) = failed_starts(tmp_path)
    assert (one.name, one.hosts) == ("job-7-0-0", HOSTS)
    assert [each.rank for each in one.ranks] == [5, 4] and len(one.ranks[1].said) == 500
    assert (two.name, two.ranks) == ("job-7-1-0", ())
    forget(first)
    forget(second)
    assert failed_starts(tmp_path) == []


def test_a_run_directory_that_is_missing_here_is_not_made(tmp_path):
    note_failure(tmp_path / "gone" / "failures" / "start", failed(1, "own"))
    assert not (tmp_path / "gone").exists()


def test_every_start_has_a_name_of_its_own(monkeypatch):
    for name in ("RANK", "SLURM_JOB_ID", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    assert start_name() == f"alone-{os.getpid()}-0"
    torchrun = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}
    slurm = torchrun | {"SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": "3"}
    by_hand = torchrun | {"WORLD_SIZE": "4", "MASTER_PORT": "29500"}
    for variables, name in (
        (torchrun, f"none-{os.getppid()}-2"),
        (slurm, "job-12-3-2"),
        (by_hand, "none-29500-2"),
    ):
        with monkeypatch.context() as each:
            for key, value in {**variables, "TORCHELASTIC_RESTART_COUNT": "2"}.items():
                each.setenv(key, value)
            assert start_name() == name


NOW = datetime(2026, 11, 27, tzinfo=UTC)


def event(host, kind="failed", days=0.0, **more):
    return {"event": kind, "time": (NOW - timedelta(days=days)).isoformat(), "host": host, "of_host": True, **more}


def test_a_host_that_failed_twice_is_kept_away_from():
    events = [event("a"), event("b"), event("a", days=3), event("b", of_host=False), event("c", days=8), event("c")]
    events += [event(None), event("d", "straggler"), event("d", "straggler"), {"event": "failed"}, {"host": "e"}]
    events += [{"event": "failed", "host": "f", "time": time, "of_host": True} for time in (None, "x", "2026-11-27")]
    assert hosts_to_exclude(events, failures=2, now=NOW) == {"a": "was the first to fail 2 times in the last 7 days"}
    assert sorted(hosts_to_exclude(events, failures=1, slow=2, now=NOW)) == ["a", "b", "c", "d"]
    unfit = [event("g", "unfit"), event("h", "unfit", of_host=False)]
    assert hosts_to_exclude(unfit, failures=2, now=NOW) == {"g": "was not fit once in the last 7 days"}
    assert hosts_to_exclude(events, failures=0, now=NOW) == {}
    assert json.dumps(hosts_to_exclude([], failures=1, slow=1, now=NOW)) == "{}"
