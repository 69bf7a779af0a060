"""Commands of knockon in processes of their own, which start at once: everything is imported already."""

import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from knockon.cli import main

PATIENCE = 120.0
"""Seconds after which a command is taken to hang."""


@dataclass(frozen=True)
class Exit:
    """How a command ended."""

    status: int
    """Exit status; negative where a signal ended it."""
    message: str
    """What it wrote to stderr."""
    seconds: float


@dataclass(frozen=True)
class Child:
    """A command that runs in its own process group."""

    pid: int
    log: Path
    began: float

    @classmethod
    def start(cls, arguments: Sequence[str], log: Path, before: Callable[[], None] = lambda: None) -> "Child":
        """Fork: the child leads a group, so that all it starts can be killed with it.

        Parameters
        ----------
        before
            Called in the child, to limit what it may use.
        """
        began = time.monotonic()
        pid = os.fork()
        if pid == 0:
            _run(arguments, log, before)
        return cls(pid, log, began)

    def wait(self) -> Exit:
        """Wait for the end."""
        _, status = os.waitpid(self.pid, 0)
        return self._ended(status)

    def until(self, there: Callable[[], bool]) -> None:
        """Wait for something that the command makes before its end."""
        while not there():
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                raise RuntimeError(f"The command ended too soon:\n{self._ended(status).message}")
            time.sleep(0.001)

    def kill_after(self, seconds: float, number: int = signal.SIGKILL) -> Exit | None:
        """Send a signal to the whole group after so long; None where the command was killed by it."""
        while time.monotonic() < self.began + seconds:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return self._ended(status)
            time.sleep(min(0.002, max(0.0, self.began + seconds - time.monotonic())))
        try:
            os.killpg(self.pid, number)
        except ProcessLookupError:  # it does not lead its group yet
            os.kill(self.pid, number)
        ended = self.wait()
        return None if ended.status == -number else ended

    def _ended(self, status: int) -> Exit:
        code = os.waitstatus_to_exitcode(status)
        return Exit(code, self.log.read_text(errors="replace"), time.monotonic() - self.began)


def run(arguments: Sequence[str], log: Path, before: Callable[[], None] = lambda: None) -> Exit:
    """Run a command to its end; one that has none is killed, and said to have ended so."""
    hung = Exit(-signal.SIGKILL, "no end", PATIENCE)
    return Child.start(arguments, log, before).kill_after(PATIENCE) or hung


def finish(arguments: Sequence[str], log: Path) -> Exit:
    """Run a command that must succeed."""
    ended = run(arguments, log)
    if ended.status:
        raise RuntimeError(f"{' '.join(arguments)} ended with {ended.status}: {ended.message}")
    return ended


def limit_memory(mebibytes: int) -> Callable[[], None]:
    """Leave so much address space beyond what is used already."""

    def limit() -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        size = pages * resource.getpagesize() + mebibytes * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (size, size))

    return limit


def limit_files(size: int) -> Callable[[], None]:
    """Let no file grow beyond so many bytes, which is how a full disk looks where none can be mounted."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def _run(arguments: Sequence[str], log: Path, before: Callable[[], None]) -> None:
    status = 70
    try:
        os.setsid()
        with log.open("wb") as file:
            os.dup2(file.fileno(), 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        before()
        main(arguments)
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 1
    except BaseException:  # noqa: BLE001 (a traceback is what is looked for)
        sys.excepthook(*sys.exc_info())
        status = 1
    finally:
        sys.stderr.flush()
        os._exit(status)
