"""The end of a rank that failed: what it failed of reaches the terminal, with rank and host, and once a host.

torchrun ends the ranks of a host as soon as it sees one of them leave, and prints seven lines for every rank that left
with an error of its own. So the ranks of a host agree, by files in the folder that torchrun made for their error files:

- A rank with something to say that no rank of its host has said speaks at once. The first of all has its whole
  traceback shown; later ones, mostly the loss of a peer, one line with the place of the whole.
- The first to speak leaves when all others of the host have failed too, or after ``GRACE_SECONDS``: by then ranks that
  were about to fail have had their say. torchrun takes it for the root cause, and repeats its line in its report.
- A rank that had nothing new to say leaves with 0 when the first is about to go, which keeps it out of torchrun's
  report. One that had waits until torchrun ends it. Until then none closes a connection that others wait on.

- The first to speak also looks which other ranks of the host are gone without a word, as after SIGKILL.

Every host speaks for itself: its output may be a file of its own (SLURM). What is said is noted in the run directory
too (run/failures), from which the next start tells which rank of all hosts failed first. Imports nothing slow: most
mistakes are found before torch is imported.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from dsv3_megatron.run.exclusive import exclusive
from dsv3_megatron.run.failures.records import FailedRank, Kind, failed_now, note_failure
from launcher.command_line.refusal import VOTE_SECONDS, Vote
from parallel.errors import RankFault, UserError, one_line
from parallel.world import host_name

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # environment variable: one file a rank, read for torchrun's report
GRACE_SECONDS = 3.0  # ranks of one host that make the same mistake come to it within a second, if it is not busy
ENDED_SECONDS = 10.0  # torchrun looks ten times a second, and ends its ranks at once
LEAVE_SECONDS = 0.2  # in which waiting processes, which look fifty times a second, are gone
ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # with which torchrun ends a rank


@dataclass(frozen=True)
class Failure:
    """What a rank failed of, in one line and as a whole (a traceback; empty where the line says all), and its code.

    Attributes:
        kind: whether it met that itself, or lost another rank.
        of_host: whether it can be its host's fault.
    """

    line: str
    whole: str
    code: int
    kind: Kind = "own"
    of_host: bool = False

    @classmethod
    def of(cls, error: Exception) -> Failure:
        """Return the failure that an exception is."""
        if isinstance(error, (UserError, RankFault)):
            line = str(error).replace("\n", " ")
            of_other = isinstance(error, RankFault) and not line.startswith(f"fault: rank {_rank()} on ")
            return cls(line, "", error.exit_code, "follows" if of_other else "own", not of_other)
        whole = "".join(traceback.format_exception(error))
        frames = traceback.extract_tb(error.__traceback__)
        place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
        said = " ".join(traceback.format_exception_only(error)[-1].split())
        line = one_line(said) + place
        is_loss = bool(_LOSSES.search(said))
        return cls(line, whole, 1, "follows" if is_loss else "own", not is_loss and _is_of_host(error, said))

    @property
    def key(self) -> str:
        """What makes two failures the same: a user's mistake its words; else all but numbers, such as ports."""
        text = re.sub(r"0x[0-9a-f]+|\d+", "#", self.line) if self.whole else self.line
        return hashlib.sha256(text.encode()).hexdigest()[:16]


# What gloo, NCCL and torch's store say of a rank that is gone (torch 2.11 and 2.13): the loss of another, no failure.
_LOSSES = re.compile(
    r"gloo/transport|Connection (closed|reset|refused)|Broken pipe|remote process exited|ncclRemoteError|"
    r"ncclSystemError|DistNetworkError|DistStoreError|TCPStore|Timed out waiting|was aborted"
)
# What a device, a disk or a limit of this host says. Memory of a device that is too small is the recipe's.
_OF_DEVICE = re.compile(r"CUDA error|cuDNN|cuBLAS|CUBLAS|uncorrectable|NVML|ncclUnhandledCudaError")


def _is_of_host(error: Exception, said: str) -> bool:
    return isinstance(error, (OSError, MemoryError)) or bool(_OF_DEVICE.search(said))


def _rank() -> str:
    return os.environ.get("RANK", "0")


def arrived() -> Callable[[], None]:
    """Note that this rank lives, for those of its host that may miss it; return what takes that back when it leaves as
    it should."""
    file = os.environ.get(ERROR_FILE, os.devnull)
    if file == os.devnull:
        return lambda: None
    here = _living(Path(file)) / _rank()
    with suppress(OSError):
        here.parent.mkdir(exist_ok=True)
        here.write_text(str(os.getpid()))

    def leave() -> None:
        with suppress(OSError):
            here.unlink()

    return leave


def last_words(failure: Failure, vote: Vote | None = None, note_in: Path | None = None) -> int:
    """Say what this rank failed of; return, when it is time to leave, the code to leave with.

    Args:
        vote: this rank's that all refuse the recipe, if it does; the host leaves when it is over. Where not all refuse,
            that is told, and the code is 1.
        note_in: where a run's start notes who failed (run/failures); None where no run directory is known yet.
    """
    ended = _listen()
    file = os.environ.get(ERROR_FILE, os.devnull)
    if file == os.devnull:  # no torchrun, or one that keeps nothing: nothing to agree by
        _say(failure, is_first=True)
        return _outcome(failure, vote, ended)
    with suppress(OSError):
        host = _Host(Path(file), note_in)
        is_first, is_new = host.enter(failure)
        if is_first:
            _wait(GRACE_SECONDS, lambda: ended() or host.all_are_here())
            code = _outcome(failure, vote, ended)
            host.close(failure)
            return code
        seconds = GRACE_SECONDS + ENDED_SECONDS + (VOTE_SECONDS if vote else 0.0)
        _wait(seconds, lambda: ended() or (host.is_closed() and not is_new))
        return 0 if host.is_closed() and not is_new else failure.code
    _say(failure, is_first=True)  # a full disk, say
    return _outcome(failure, vote, ended)


def note_alone(failure: Failure, note_in: Path | None) -> None:
    """Note what the only rank of a start has failed of."""
    _note(note_in, failed_now(0, failure.line, failure.kind, of_host=failure.of_host))


def _outcome(failure: Failure, vote: Vote | None, ended: Callable[[], bool]) -> int:
    """Wait for the vote, if there is one; return the code to leave with."""
    if vote is None:
        return failure.code
    _wait(VOTE_SECONDS + ENDED_SECONDS, lambda: ended() or vote.is_over)
    if not vote.is_over or vote.unanimous:
        return failure.code
    _write(f"{_who()} not every rank refuses this: a fault of this host, not of the recipe; the job may start again\n")
    return 1


class _Host:
    """The failed ranks of this host and start: a file for each, and one for all that was said, with whose it is."""

    def __init__(self, error_file: Path, note_in: Path | None):
        self._error_file, self._note_in = error_file, note_in
        self._folder = error_file.parent.parent / "failed"  # torchrun makes attempt_N/LOCAL_RANK/error.json
        self._folder.mkdir(exist_ok=True)

    def enter(self, failure: Failure) -> tuple[bool, bool]:
        """Take this rank in and let it speak if it has something new; return whether it is first, and whether new."""
        with self._alone():
            is_first = not any(self._folder.glob("rank_*"))
            said = self._folder / failure.key
            is_new = not said.exists()
            if is_first:
                self._miss()
            if is_new:
                self._error_file.write_text(json.dumps(_for_torchrun(failure)))
                _say(failure, is_first=is_first, whole_at=self._error_file)
                _note(self._note_in, failed_now(int(_rank()), failure.line, failure.kind, of_host=failure.of_host))
            with said.open("a") as ranks:
                ranks.write(f"{_rank()}\n")
            (self._folder / f"rank_{os.environ['RANK']}").touch()
        return is_first, is_new

    def _miss(self) -> None:
        """Say which ranks of this host are gone without a word."""
        living = _living(self._error_file)
        for file in sorted(living.iterdir()) if living.is_dir() else ():
            if file.name.isdecimal() and not _lives(file.read_text()):
                said = "gone without a word: killed, crashed, or out of the host's memory"
                _write(f"[rank {file.name} on {host_name()}] {said}\n")
                _note(self._note_in, failed_now(int(file.name), said, "silent", of_host=True))

    def all_are_here(self) -> bool:
        """Return whether every rank of this host has failed."""
        return len(list(self._folder.glob("rank_*"))) >= int(os.environ.get("LOCAL_WORLD_SIZE", 1))

    def is_closed(self) -> bool:
        """Return whether the first rank is about to leave."""
        return (self._folder / "closed").exists()

    def close(self, failure: Failure) -> None:
        """Name the ranks of this host that failed of the same, and let them go first."""
        others = sorted(int(rank) for rank in (self._folder / failure.key).read_text().split())
        others.remove(int(os.environ["RANK"]))
        if others:
            _write(f"[the same from rank{'s' * (len(others) > 1)} {', '.join(map(str, others))}]\n")
        (self._folder / "closed").touch()
        time.sleep(LEAVE_SECONDS if others else 0.0)

    def _alone(self) -> AbstractContextManager[None]:
        """One rank at a time: what is said stays together."""
        return exclusive(self._folder / "lock")


def _living(error_file: Path) -> Path:
    """Return the folder in which the ranks of this host and start note that they live."""
    return error_file.parent.parent / "living"


def _lives(process: str) -> bool:
    """Return whether a process is there, and no zombie: one that its parent has not asked for yet."""
    try:
        state = Path(f"/proc/{int(process)}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return not Path("/proc/self/stat").exists()  # no Linux: nothing is known
    except (OSError, ValueError, IndexError):
        return True
    return state not in "ZX"


def _note(folder: Path | None, failed: FailedRank) -> None:
    if folder is not None:
        with suppress(OSError):  # the run's disk may be what failed
            note_failure(folder, failed)


def _say(failure: Failure, *, is_first: bool, whole_at: Path | None = None) -> None:
    if failure.whole and is_first:
        _write(f"{_who()}\n{failure.whole}")
    else:
        _write(f"{_who()} {failure.line}" + (f"; whole traceback in {whole_at}" if failure.whole else "") + "\n")


def _who() -> str:
    return f"[rank {os.environ.get('RANK', 0)} on {host_name()}]"


def _write(text: str) -> None:
    with suppress(OSError):  # nobody reads any more
        sys.stderr.write(text)
        sys.stderr.flush()


def _for_torchrun(failure: Failure) -> dict[str, object]:
    """Return the content of an error file (torch.distributed.elastic.multiprocessing.errors): its report shows
    ``py_callstack``, whole, so it gets the line."""
    extra = {"py_callstack": failure.line, "timestamp": str(int(time.time()))}
    return {"message": {"message": failure.line, "extraInfo": extra}, "traceback": failure.whole}


def _listen() -> Callable[[], bool]:
    """Survive torchrun's signal from now on; return what tells whether it came."""
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)

    for number in ENDING:
        signal.signal(number, note)
    return lambda: bool(came)


def _wait(seconds: float, over: Callable[[], bool]) -> None:
    deadline = time.monotonic() + seconds
    while not over() and time.monotonic() < deadline:
        time.sleep(0.02)
