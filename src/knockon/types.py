"""The nouns that every part of knockon shares.

Dimension names, the same in every signature:

========  ==================================================================
sets      sets of cells that share one condition (the batch)
cells     cells of one set
genes     genes of the panel, in the order of ``Spec.genes``
slots     perturbations that one cell can carry at once (2 for doubles)
covs      covariates of a cell: cell type, donor, batch
dim       width of a network
steps     steps of a solver or a schedule
========  ==================================================================
"""

import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Units = Literal["log1p", "counts"]
"""Scale of expression values: natural ``log1p`` of normalized counts, or raw integer ``counts``."""

CP10K = 10_000.0
"""Counts per cell to which cells are brought where a convention says so, whatever the screen's own total."""

CONTROL = "control"
"""How a cell without perturbation is written, whatever its file called it."""


class UserError(ValueError):
    """A mistake in the user's input: what was found, what was expected, and what mends it.

    The command line prints it as one message and ends with exit status 2.

    Parameters
    ----------
    found
        What is wrong, in plain words.
    expected
        What would have been right.
    offenders
        The values at fault; the first three are named and the rest counted.
    mend
        The flag or the step that mends it.
    """

    def __init__(
        self, found: str, *, expected: str = "", offenders: Sequence[object] = (), mend: str = ""
    ) -> None:
        self.offenders = tuple(offenders)
        shown = ", ".join(str(value) for value in offenders[:3])
        if len(offenders) > 3:
            shown += f" and {len(offenders) - 3} more"
        parts = [f"{found}: {shown}." if shown else f"{found}."]
        if expected:
            parts.append(f"Expected: {expected}.")
        if mend:
            parts.append(f"To mend it: {mend}.")
        super().__init__(" ".join(parts))


@dataclass(frozen=True, order=True)
class Label:
    """One condition by its names: what was done to the cells, how strongly, and to which cells.

    Canonical: perturbations are sorted by name, and a dose travels with its perturbation, so two
    spellings of one condition are equal.

    Parameters
    ----------
    perturbations
        Names, sorted; empty for control.
    doses
        One for each perturbation, in the screen's dose unit; 0 where the screen has none.
    covariates
        One level for each covariate of the screen, in its order; empty where the condition is meant
        in every context.
    """

    perturbations: tuple[str, ...] = ()
    doses: tuple[float, ...] = ()
    covariates: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, perturbations: Sequence[str], doses: Sequence[float] = (), covariates: Sequence[str] = ()
    ) -> "Label":
        """Make a label from names in any order; doses default to 0."""
        doses = tuple(doses) or (0.0,) * len(perturbations)
        pairs = sorted(zip(perturbations, doses, strict=True))
        return cls(tuple(n for n, _ in pairs), tuple(float(d) for _, d in pairs), tuple(covariates))

    @property
    def is_control(self) -> bool:
        """Whether nothing was done to these cells."""
        return not self.perturbations

    @property
    def perturbation(self) -> str:
        """The perturbation alone, as text: ``control``, ``A+B`` or ``drugA@10+drugB@0.5``."""
        parts = [
            f"{name}@{dose:g}" if dose else name
            for name, dose in zip(self.perturbations, self.doses, strict=True)
        ]
        return "+".join(parts) or CONTROL

    @property
    def everywhere(self) -> "Label":
        """The same perturbation, in every context."""
        return Label(self.perturbations, self.doses)

    def control(self) -> "Label":
        """Name the control of the same context."""
        return Label(covariates=self.covariates)

    def __str__(self) -> str:
        return " | ".join((self.perturbation, *self.covariates))


@dataclass(frozen=True, kw_only=True)
class Condition:
    """What was done to each set of cells, as codes of a ``Spec``; one row for each set."""

    perturbation: Int[Tensor, "sets slots"]
    """Codes; order-free; 0 is nothing, code i + 1 is ``Spec.perturbations[i]``."""
    dose: Float[Tensor, "sets slots"]
    """In ``Spec.dose_unit``; 0 where the screen has none; travels with its perturbation."""
    covariates: Int[Tensor, "sets covs"]
    """Index of the level of each covariate."""

    def __len__(self) -> int:
        return len(self.perturbation)

    def to(self, device: torch.device | str) -> "Condition":
        """Move to a device."""
        return type(self)(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    def ordered(self, slots: int) -> "Condition":
        """Put perturbations in the order of codes, then of doses, so that equal conditions look equal.

        Slots are filled up to ``slots`` with nothing.
        """
        by_dose = self.dose.argsort(dim=1, descending=True)
        codes, doses = self.perturbation.gather(1, by_dose), self.dose.gather(1, by_dose)
        order = codes.argsort(dim=1, descending=True, stable=True)
        missing = (0, max(0, slots - codes.shape[1]))
        return replace(
            self,
            perturbation=torch.nn.functional.pad(codes.gather(1, order), missing),
            dose=torch.nn.functional.pad(doses.gather(1, order), missing),
        )

    def same_treatment(self, other: "Condition") -> Bool[Tensor, "sets others"]:
        """Whether the very same perturbations, at the very same doses, were done to each pair of sets."""
        slots = max(self.perturbation.shape[1], other.perturbation.shape[1])
        one, two = self.ordered(slots), other.ordered(slots)
        same = (one.perturbation[:, None] == two.perturbation) & (one.dose[:, None] == two.dose)
        return same.all(-1)

    def __getitem__(self, index: slice | Tensor) -> "Condition":
        return type(self)(**{f.name: getattr(self, f.name)[index] for f in fields(self)})


@dataclass(frozen=True, kw_only=True)
class CellSets:
    """Sets of perturbed cells, each with control cells of the same covariates: the batch of every model."""

    target: Float[Tensor, "sets cells genes"]
    control: Float[Tensor, "sets cells genes"]
    condition: Condition
    real: Bool[Tensor, "sets cells"] | None = None
    """Cells that were measured, the first of each set; the others are copies of them that fill the set up.
    None where there are no copies."""
    embedded: Float[Tensor, "sets cells embedding"] | None = None
    """What ``Model.embed`` made of the target cells, for a model that learns from that; target and control
    cells are then zeros."""

    def to(self, device: torch.device | str) -> "CellSets":
        """Move to a device."""
        return type(self)(
            target=self.target.to(device),
            control=self.control.to(device),
            condition=self.condition.to(device),
            real=None if self.real is None else self.real.to(device),
            embedded=None if self.embedded is None else self.embedded.to(device),
        )

    def trimmed(self) -> "CellSets":
        """Drop places that no set fills; not on a GPU, where asking for their number would wait for it."""
        if self.real is None or self.real.device.type != "cpu":
            return self
        most = int(self.real.sum(1).max())
        real = None if self.real[:, :most].all() else self.real[:, :most]
        embedded = None if self.embedded is None else self.embedded[:, :most]
        return replace(
            self, target=self.target[:, :most], control=self.control[:, :most], real=real, embedded=embedded
        )


class Noise:
    """Random numbers for sets of cells: of one generator for all sets, or of one for each.

    With one for each, what a set draws does not depend on the sets beside it.
    """

    def __init__(self, *generators: torch.Generator) -> None:
        self.generators = generators

    def each(self, sets: int) -> tuple[torch.Generator, ...]:
        """Name the generator of each set."""
        return self.generators if len(self.generators) > 1 else self.generators * sets

    def normal(self, like: Float[Tensor, "sets *shape"]) -> Float[Tensor, "sets *shape"]:
        """Draw standard normal numbers, as many and of the kind of ``like``."""
        return self._draw(like, torch.randn)

    def uniform(self, like: Float[Tensor, "sets *shape"]) -> Float[Tensor, "sets *shape"]:
        """Draw from [0, 1)."""
        return self._draw(like, torch.rand)

    def poisson(self, rates: Float[Tensor, "sets *shape"]) -> Float[Tensor, "sets *shape"]:
        """Draw counts with these expectations."""
        return torch.cat([torch.poisson(x, generator=g) for x, g in self._parts(rates)])

    def gamma(self, shape: Float[Tensor, "sets *shape"]) -> Float[Tensor, "sets *shape"]:
        """Draw gamma numbers of scale 1."""
        # torch.distributions takes no generator
        drawn = [torch._standard_gamma(x, generator=g) for x, g in self._parts(shape)]  # pyright: ignore[reportPrivateImportUsage]
        return torch.cat(drawn)

    def binomial(
        self, number: Float[Tensor, "sets *shape"], probability: Float[Tensor, "sets *shape"]
    ) -> Float[Tensor, "sets *shape"]:
        """Draw how many of so many things happen."""
        parts = zip(self._parts(number), self._parts(probability), strict=True)
        return torch.cat([torch.binomial(n, p, generator=g) for (n, g), (p, _) in parts])

    def negative_binomial(
        self, mean: Float[Tensor, "sets *shape"], inverse: Float[Tensor, "sets *shape"]
    ) -> Float[Tensor, "sets *shape"]:
        """Draw counts of variance ``mean + mean^2 / inverse``: Poisson counts of gamma rates."""
        return self.poisson(self.gamma(inverse) * mean / inverse)

    def _draw(self, like: Tensor, draw: Callable[..., Tensor]) -> Tensor:
        return torch.cat(
            [draw(x.shape, generator=g, dtype=x.dtype, device=x.device) for x, g in self._parts(like)]
        )

    def _parts(self, like: Tensor) -> Iterable[tuple[Tensor, torch.Generator]]:
        """Pair sets with the generator that they draw from."""
        whole = len(self.generators) == 1
        return zip([like] if whole else like.split(1), self.generators, strict=True)


@dataclass(frozen=True)
class Covariate:
    """A property of cells that was not perturbed, such as the cell type, with its levels sorted."""

    name: str
    levels: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Spec:
    """All that a model may know before it sees data.

    Parameters
    ----------
    genes
        Names of the panel, in the order of every matrix.
    perturbations
        Names; the code of the i-th is i + 1, and 0 stands for nothing.
    covariates
        Each with its levels; the code of a level is its index.
    slots
        Perturbations that one cell can carry at once, at least 1.
    units, total
        Scale of the values, and the sum that the counts of a cell were normalized to before
        ``log1p`` (None for counts, or where the file does not tell).
    dose_unit
        Unit of all doses, such as ``"uM"``, empty where the file does not tell; None where it has no doses.
    vectors
        Fixed vector of each perturbation, such as a gene embedding or a fingerprint. With it, an
        unseen perturbation can be predicted.
    """

    genes: tuple[str, ...]
    perturbations: tuple[str, ...]
    covariates: tuple[Covariate, ...] = ()
    slots: int = 1
    units: Units = "log1p"
    total: float | None = None
    dose_unit: str | None = None
    vectors: Float[np.ndarray, "perturbations width"] | None = None

    @property
    def classes(self) -> tuple[str, ...]:
        """What of a condition can be given, and weighed, on its own: what was done, and each covariate."""
        return "perturbation", *(covariate.name for covariate in self.covariates)

    def encode(self, labels: Sequence[Label]) -> Condition:
        """Turn names into codes.

        Raises
        ------
        UserError
            If a perturbation or a level is unknown, or a label has more perturbations than slots.
        """
        codes = {name: i + 1 for i, name in enumerate(self.perturbations)}
        unknown = sorted({p for label in labels for p in label.perturbations if p not in codes})
        if unknown:
            near = {m for p in unknown[:3] for m in difflib.get_close_matches(p, self.perturbations, 2)}
            raise UserError(
                "Unknown perturbation",
                offenders=unknown,
                expected=f"one of the {len(codes)} perturbations that this run knows"
                + (f" (did you mean {', '.join(sorted(near))}?)" if near else ""),
                mend="check the spelling, or train with --vectors TABLE that has a vector for it",
            )
        wide = [label for label in labels if len(label.perturbations) > self.slots]
        if wide:
            raise UserError(
                "Too many perturbations at once",
                offenders=wide,
                expected=f"at most {self.slots}, as in the screen",
            )
        perturbation = torch.zeros(len(labels), self.slots, dtype=torch.long)
        dose = torch.zeros(len(labels), self.slots)
        for row, label in enumerate(labels):
            for slot, (name, amount) in enumerate(zip(label.perturbations, label.doses, strict=True)):
                perturbation[row, slot] = codes[name]
                dose[row, slot] = amount
        return Condition(perturbation=perturbation, dose=dose, covariates=self._levels(labels))

    def _levels(self, labels: Sequence[Label]) -> Int[Tensor, "sets covs"]:
        codes = torch.zeros(len(labels), len(self.covariates), dtype=torch.long)
        for row, label in enumerate(labels):
            if len(label.covariates) != len(self.covariates):
                raise UserError(
                    "A condition without its context",
                    offenders=[label],
                    expected="a level for " + ", ".join(c.name for c in self.covariates),
                )
            for column, (covariate, level) in enumerate(zip(self.covariates, label.covariates, strict=True)):
                if level not in covariate.levels:
                    raise UserError(
                        f"Unknown {covariate.name}",
                        offenders=[level],
                        expected="one of " + ", ".join(covariate.levels[:10]),
                    )
                codes[row, column] = covariate.levels.index(level)
        return codes
