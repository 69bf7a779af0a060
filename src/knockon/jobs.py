"""Jobs side by side: in processes of this machine or on a cluster, each with its own end."""

import logging
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import joblib

from knockon import limits
from knockon.cluster import do, killed
from knockon.progress import bar
from knockon.types import UserError

J = TypeVar("J")
T = TypeVar("T")

log = logging.getLogger("knockon")


@dataclass(frozen=True, kw_only=True)
class Outcome(Generic[T]):
    """What became of some jobs, by their names: what they returned, or why they failed."""

    done: Mapping[str, T] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)

    def __or__(self, other: "Outcome[Any]") -> "Outcome[Any]":
        """Join with other jobs."""
        return Outcome(done={**self.done, **other.done}, failed={**self.failed, **other.failed})

    def refuse_failed(self) -> None:
        """Name the jobs that failed.

        Raises
        ------
        UserError
            If there is one; ``Unfinished``, if something is done. What all of them failed of is told once.
        """
        if self.done and self.failed:
            raise Unfinished(self)
        texts = {text.rstrip(".") for text in self.failed.values()}
        if len(texts) == 1 < len(self.failed):
            raise UserError(texts.pop())
        if texts:
            raise UserError(
                "Failed", offenders=self.reasons, mend="the same command does only what is missing"
            )

    @property
    def reasons(self) -> list[str]:
        """Why jobs failed, by name."""
        return [f"{name} ({text.rstrip('.')})" for name, text in self.failed.items()]


class Unfinished(UserError):  # noqa: N818 (not the program's error)
    """Some jobs failed, and the others are done.

    Parameters
    ----------
    outcome
        What became of all of them.
    """

    def __init__(self, outcome: Outcome[Any]) -> None:
        mend = "the others are kept; the same command does only what is missing"
        super().__init__("Failed", offenders=outcome.reasons, mend=mend)
        self.done = outcome.done


@dataclass(frozen=True, kw_only=True)
class _Report:
    """What a process tells of its job."""

    name: str
    value: Any
    failure: str
    said: tuple[tuple[int, str], ...]
    seconds: float


def do_all(
    work: Callable[[J], T],
    jobs: Mapping[str, J],
    *,
    at_once: int = 1,
    cluster: str | None = None,
    quiet: bool = True,
) -> Outcome[T]:
    """Do jobs, whatever becomes of the others.

    Parameters
    ----------
    work
        Does one; importable, as are the jobs' types. Large arrays reach other processes of this machine as
        files in shared memory, once for all of them.
    jobs
        By name.
    at_once
        Processes on this machine, each with its share of the threads. With one, nothing leaves this process.
    cluster
        Address of a dask scheduler, whose workers do the jobs instead.
    quiet
        Show no bar of the jobs that are done.

    Raises
    ------
    UserError
        If a process was killed, or the cluster cannot be reached or has workers of several threads.
    """
    if cluster is None and min(at_once, len(jobs)) <= 1:
        return _one_by_one(work, jobs)
    reports: dict[str, _Report] = {}
    parent = os.getpid() if cluster is None else None
    calls = [(work, name, job, parent) for name, job in jobs.items()]
    with bar("jobs", total=len(jobs), quiet=quiet) as advance:
        try:
            for report in _in_processes(calls, at_once) if cluster is None else do(cluster, _told, calls):
                reports[report.name] = report
                log.info("%s: %.0f s", report.name, report.seconds)
                for level, text in report.said:
                    log.log(level, "  %s", text)
                advance(report.name)
        except (BrokenProcessPool, *killed()) as error:
            raise UserError(
                "A process was killed in the middle of its job, as happens when memory runs out",
                offenders=[name for name in jobs if name not in reports],
                mend="with fewer --jobs or workers, the same command does only what is missing",
            ) from error
    found = [reports[name] for name in jobs]
    return Outcome(
        done={one.name: one.value for one in found if not one.failure},
        failed={one.name: one.failure for one in found if one.failure},
    )


def _one_by_one(work: Callable[[J], T], jobs: Mapping[str, J]) -> Outcome[T]:
    done, failed = dict[str, T](), dict[str, str]()
    for name, job in jobs.items():
        log.info("%s ...", name)
        try:
            done[name] = work(job)
        except (UserError, *limits.ERRORS) as error:
            failed[name] = _reason(error)
            log.error("%s failed. %s", name, failed[name])
    return Outcome(done=done, failed=failed)


def _told(work: Callable[[J], T], name: str, job: J, parent: int | None) -> _Report:
    """Do a job in another process, and keep what it says for this one, so that lines do not mix."""
    if parent is not None:
        _end_with(parent)
    said: list[tuple[int, str]] = []
    handler = _Keeping(said)
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    began, value, failure = time.monotonic(), None, ""
    try:
        value = work(job)
    except (UserError, *limits.ERRORS) as error:
        failure = _reason(error)
        said.append((logging.ERROR, f"failed. {failure}"))
    finally:
        log.removeHandler(handler)
        log.propagate = True
    return _Report(
        name=name, value=value, failure=failure, said=tuple(said), seconds=time.monotonic() - began
    )


def _reason(error: Exception) -> str:
    """Say why a job failed, by the user's mistake or the machine's; one of the program ends them all."""
    told = error if isinstance(error, UserError) else limits.explained(error, "compare")
    if told is None:
        raise error
    return str(told)


class _Keeping(logging.Handler):
    def __init__(self, said: list[tuple[int, str]]) -> None:
        super().__init__()
        self.said = said

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append((record.levelno, record.getMessage()))


def _end_with(parent: int) -> None:
    """End this process when the one that gave it the job was killed: nobody would wait for it."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    if all(thread.name != "knockon-watch" for thread in threading.enumerate()):
        threading.Thread(target=watch, name="knockon-watch", daemon=True).start()


def _in_processes(calls: Sequence[tuple[Any, ...]], at_once: int) -> Iterator[_Report]:
    """Do jobs in processes of this machine."""
    with joblib.parallel_config("loky", n_jobs=at_once), warnings.catch_warnings():
        # a process that has grown is replaced between two jobs, as it should be
        warnings.filterwarnings("ignore", "A worker stopped while some jobs were given")
        launch: Any = joblib.Parallel(pre_dispatch="all", mmap_mode="c", return_as="generator_unordered")
        yield from launch(joblib.delayed(_told)(*call) for call in calls)
