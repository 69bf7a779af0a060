import os

os.environ["OMP_NUM_THREADS"] = "1"  # small steps are ten times faster on one thread

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from knockon.data.arrays import own_threads
from knockon.data.screen import Screen
from knockon.types import Covariate, Label

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """No test leaves torch another number of threads, as packages with numba would."""
    with own_threads():
        yield


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real screens and parity files, beside the repository."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the real screens and parity files in {SHARED.resolve()}")
    return SHARED


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Give a command that must end in one message and exit status 2; return the message."""

    from knockon.cli import main  # noqa: PLC0415 (most tests need no command)

    def give(*arguments: str | Path) -> str:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        message = capsys.readouterr().err
        assert ended.value.code == 2, message
        assert "Traceback" not in message
        return " ".join(message.split())

    return give


@pytest.fixture
def make_screen() -> Callable[[Mapping[Label, np.ndarray]], Screen]:
    """A screen in which each condition has the given cells (cells x genes) and nothing else."""

    def make(cells: Mapping[Label, np.ndarray], genes: tuple[str, ...] = ()) -> Screen:
        ends = np.cumsum([len(block) for block in cells.values()])
        width = len(next(iter(cells)).covariates)
        levels = [sorted({label.covariates[i] for label in cells}) for i in range(width)]
        matrix = np.concatenate(list(cells.values())).astype(np.float32)
        return Screen(
            matrix=sp.csr_matrix(matrix),
            genes=genes or tuple(f"g{i}" for i in range(matrix.shape[1])),
            cells=[str(i) for i in range(len(matrix))],
            rows={
                label: np.arange(end - len(block), end)
                for (label, block), end in zip(cells.items(), ends, strict=True)
            },
            covariates=tuple(Covariate(f"c{i}", tuple(level)) for i, level in enumerate(levels)),
            vocabulary=tuple(cells),
        )

    return make
