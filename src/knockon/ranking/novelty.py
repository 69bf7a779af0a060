"""What a prediction has to extrapolate, in plain words."""

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from knockon.data.screen import Screen
from knockon.types import Label


@dataclass(frozen=True, kw_only=True, eq=False)
class Experience:
    """What a model was trained on.

    Parameters
    ----------
    labels
        Perturbed conditions.
    largest
        Length of the largest effect among them, in natural log1p units.
    with_vectors
        Perturbations of which the model has a vector.
    """

    labels: Collection[Label]
    largest: float
    with_vectors: Collection[str] = ()

    @classmethod
    def of(cls, measured: Screen, with_vectors: Collection[str] = ()) -> "Experience":
        """Look at the training part of a screen, in log1p."""
        return cls(labels=measured.conditions, largest=_largest(measured), with_vectors=with_vectors)

    def warnings(self, label: Label, effect: float) -> list[str]:
        """Say what of a condition is unlike training.

        Parameters
        ----------
        label
            A condition.
        effect
            Length of its predicted change.
        """
        found = [text for name in label.perturbations if (text := self._never_alone(name))]
        found += self._new_doses(label)
        wide = [x for x in self.labels if len(x.perturbations) > 1]
        combined = {name for x in wide for name in x.perturbations}
        if len(label.perturbations) > 1 and not combined.issuperset(label.perturbations):
            new = [name for name in label.perturbations if name not in combined]
            found.append(
                f"never combined with anything: {', '.join(new)}"
                if wide
                else "no combination at all was measured"
            )
        found += self._new_context(label)
        if effect > self.largest:
            found.append(f"larger than any measured effect ({self.largest:.2f})")
        return found

    def _never_alone(self, name: str) -> str:
        holding = [label for label in self.labels if name in label.perturbations]
        if any(len(label.perturbations) == 1 for label in holding):
            return ""
        if holding:
            return f"{name} was measured in combinations only"
        return f"{name} was never measured" + (
            ", only its vector is known" if name in self.with_vectors else ""
        )

    def _new_doses(self, label: Label) -> list[str]:
        doses = defaultdict(set)
        for known in self.labels:
            for name, dose in zip(known.perturbations, known.doses, strict=True):
                doses[name].add(dose)
        return [
            f"{name}@{dose:g} is outside the measured doses {min(doses[name]):g} to {max(doses[name]):g}"
            for name, dose in zip(label.perturbations, label.doses, strict=True)
            if name in doses and not min(doses[name]) <= dose <= max(doses[name])
        ]

    def _new_context(self, label: Label) -> list[str]:
        here = [known for known in self.labels if known.covariates == label.covariates]
        context = " | ".join(label.covariates)
        if not here:
            return [f"no perturbation was measured in {context}"]
        names = {name for known in here for name in known.perturbations}
        everywhere = {name for known in self.labels for name in known.perturbations}
        new = [name for name in label.perturbations if name in everywhere - names]
        return [f"not measured in {context}: {', '.join(new)}"] if new else []


def _largest(measured: Screen) -> float:
    """Length of the largest measured effect, without the part that the noise of its mean adds."""
    squares = [0.0]
    for label in measured.conditions:
        sides = measured.moments[label], measured.control_moments(label)
        noise = sum(float(np.square(side.std).sum()) / side.cells for side in sides)
        squares.append(float(np.square(sides[0].mean - sides[1].mean).sum()) - noise)
    return float(np.sqrt(max(squares)))
