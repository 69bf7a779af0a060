"""What the tests against released programs share."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Parity:
    """A parity file in one precision; the truth is always what was computed in float64."""

    arrays: Mapping[str, np.ndarray]
    dtype: torch.dtype

    def __getitem__(self, key: str) -> Tensor:
        value = torch.from_numpy(np.asarray(self.arrays[key]))
        return value.to(self.dtype) if value.is_floating_point() else value

    @property
    def exact(self) -> bool:
        return self.dtype == torch.float64
