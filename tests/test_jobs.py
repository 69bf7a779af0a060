import logging
import os
import re

import dask.config
import pytest

from knockon import cluster
from knockon.jobs import Outcome, _told, do_all
from knockon.predict import refuse_few
from knockon.types import UserError


def halve(number: int) -> int:
    if number % 2:
        raise UserError(f"{number} is odd")
    return number // 2


def test_a_job_that_fails_leaves_the_others_alone(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="knockon"):
        ended = do_all(halve, {"a": 4, "b": 3, "c": 8})
    assert ended == Outcome(done={"a": 2, "c": 4}, failed={"b": "3 is odd."})
    assert "b failed. 3 is odd." in caplog.messages
    with pytest.raises(UserError, match=r"Failed: b \(3 is odd\)\. .* the same command"):
        ended.refuse_failed()


def test_one_mistake_in_all_jobs_is_told_once() -> None:
    with pytest.raises(UserError) as told:
        do_all(halve, {"a": 3, "b": 3}).refuse_failed()
    assert str(told.value) == "3 is odd."
    do_all(halve, {"a": 2}).refuse_failed()


def test_other_mistakes_are_no_jobs_end() -> None:
    """An error that is the program's is not told as if it were the user's."""
    with pytest.raises(TypeError):
        do_all(halve, {"a": "text"})  # pyright: ignore[reportArgumentType]
    with pytest.raises(RuntimeError, match="shapes do not match"):
        do_all(failing, {"a": RuntimeError("shapes do not match")})


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError("Unable to allocate 8 EiB"), r"Memory is exhausted \(Unable to allocate 8 EiB\)"),
        (RuntimeError("CUDA out of memory. Tried to"), r"Memory is exhausted \(CUDA out of memory\)"),
        (OSError(28, "No space left on device", "/x/log"), "No space left on device: /x/log"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_the_machine_refuses_is_one_jobs_end(error: Exception, words: str) -> None:
    """In this process and, as the other ones do it, in what a process tells."""
    ended = do_all(failing, {"a": None, "b": error, "c": None})
    assert ended.done == {"a": "done", "c": "done"}
    assert re.search(words, ended.failed["b"])
    with pytest.raises(UserError, match=words):
        ended.refuse_failed()
    report = _told(failing, "b", error, None)
    assert report.failure == ended.failed["b"]
    assert report.said == ((logging.ERROR, f"failed. {report.failure}"),)


def failing(error: Exception | None) -> str:
    if error is not None:
        raise error
    return "done"


@pytest.mark.slow
def test_a_cluster_that_is_none() -> None:
    pytest.importorskip("distributed")
    with pytest.raises(UserError, match=r"No dask cluster answers at tcp://127\.0\.0\.1:9"):
        do_all(halve, {"a": 2}, cluster="tcp://127.0.0.1:9")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the cluster's own end
def test_a_killed_worker_is_told_and_a_living_one_knows_its_limit() -> None:
    distributed = pytest.importorskip("distributed")
    kind = {"dashboard_address": None, "processes": True, "memory_limit": "1GB"}
    once = dask.config.set({"distributed.scheduler.allowed-failures": 0})
    with once, distributed.LocalCluster(n_workers=1, threads_per_worker=1, **kind) as found:
        address = found.scheduler_address
        with distributed.Client(address) as client:
            assert client.submit(cluster.limit).result() == 10**9
        with pytest.raises(UserError, match=r"killed in the middle of its job.*fewer"):
            do_all(os._exit, {"a": 1}, cluster=address)


@pytest.mark.slow
def test_processes_tell_what_was_said_in_them(caplog: pytest.LogCaptureFixture) -> None:
    """Functions of this library, for processes cannot import the tests."""
    with caplog.at_level("INFO", logger="knockon"):
        ended = do_all(logging.getLogger("knockon").warning, {"a": "one", "b": "two"}, at_once=2)
    assert ended.done == {"a": None, "b": None}
    assert {"  one", "  two"} <= set(caplog.messages)
    lines = [text for text in caplog.messages if not text.startswith("  ")]
    assert sorted(line[:2] for line in lines) == ["a:", "b:"]


@pytest.mark.slow
def test_other_processes_fail_alone_too() -> None:
    ended = do_all(refuse_few, {"some": 3, "none": 0}, at_once=2)
    assert list(ended.done) == ["some"]
    assert "0 cells per condition" in ended.failed["none"]
