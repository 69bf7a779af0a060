from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)

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
