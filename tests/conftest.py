import os

os.environ["OMP_NUM_THREADS"] = "1"  # small steps are ten times faster on one thread

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

SHARED = Path(__file__).parents[2] / "shared"


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
