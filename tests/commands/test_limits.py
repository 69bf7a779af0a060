import pytest
import torch

from knockon.commands.limits import explained


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


def test_what_torch_says_of_a_tensor_that_is_too_large_is_known() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    assert "Memory is exhausted" in str(explained(raised.value, "predict"))


def test_what_the_system_refuses_is_named() -> None:
    told = str(explained(PermissionError(13, "Permission denied", "/x/y.csv"), "report"))
    assert "Permission denied: /x/y.csv" in told


def test_an_error_of_the_program_stays_one() -> None:
    assert explained(RuntimeError("shapes do not match"), "train") is None
