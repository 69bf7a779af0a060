from collections.abc import Callable, Mapping

import numpy as np
import pytest
import scipy.sparse as sp

from knockon.data.screen import Screen
from knockon.types import Covariate, Label

Maker = Callable[[Mapping[Label, np.ndarray]], Screen]


@pytest.fixture
def make_screen() -> Maker:
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
