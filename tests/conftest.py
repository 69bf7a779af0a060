import os

os.environ["OMP_NUM_THREADS"] = "1"  # small steps are ten times faster on one thread

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
