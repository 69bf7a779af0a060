import signal
from collections.abc import Callable

import pytest
import torch

from knockon.cli import COMMANDS, main
from knockon.evaluate.report import page
from knockon.interrupt import Ended
from knockon.limits import LESS, explained


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 8 EiB for an array"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has ..."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:120] . DefaultCPUAllocator: can't allocate memory"),
        OSError(12, "Cannot allocate memory"),
        RuntimeError("can't start new thread"),
        ImportError("_loss.so: failed to map segment from shared object"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_exhausted_memory_says_what_to_lower(error: Exception) -> None:
    assert "--train.cells" in str(explained(error, "train"))
    assert "--train" not in str(explained(error, "report"))


def test_every_command_that_reads_cells_says_what_to_lower() -> None:
    assert set(COMMANDS) - set(LESS) == {"inspect", "split", "export", "report"}
    assert set(LESS) <= set(COMMANDS)


def test_what_torch_says_of_a_tensor_that_is_too_large_is_known() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    assert "Memory is exhausted" in str(explained(raised.value, "predict"))


def test_what_the_system_refuses_is_named() -> None:
    told = str(explained(PermissionError(13, "Permission denied", "/x/y.csv"), "report"))
    assert "Permission denied: /x/y.csv" in told


def test_an_error_of_the_program_stays_one() -> None:
    assert explained(RuntimeError("shapes do not match"), "train") is None


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError("Unable to allocate"), "Memory is exhausted"),
        (OSError(28, "No space left on device", "/x/log"), "No space left on device: /x/log"),
        (ImportError("a.so: failed to map segment from shared object"), "Memory is exhausted"),
    ],
)
def test_a_command_ends_in_one_message(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, error: Exception, words: str
) -> None:
    monkeypatch.setattr(page, "write", raising(error))
    assert words in refused("report", "folder", "--out", "page.html")


def test_an_error_of_the_program_is_no_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "write", raising(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        main(["report", "folder", "--out", "page.html"])


@pytest.mark.parametrize(
    ("error", "status"),
    [(KeyboardInterrupt(), 130), (Ended(signal.SIGTERM, "stopped at step 3 of 9"), 143)],
)
def test_an_end_that_was_asked_for_says_how_it_goes_on(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: KeyboardInterrupt,
    status: int,
) -> None:
    monkeypatch.setattr(page, "write", raising(error))
    with pytest.raises(SystemExit) as ended:
        main(["report", "folder", "--out", "page.html"])
    assert ended.value.code == status
    told = capsys.readouterr().err
    assert "the same command continues" in told
    assert ("step 3" in told) == (status == 143)


def raising(error: BaseException) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise error

    return fail
