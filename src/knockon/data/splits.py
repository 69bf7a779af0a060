"""Which conditions are held out, by kind.

A held-out perturbation is held out in every context where it occurs, except where contexts are split.
"""

import difflib
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from knockon.data.leaks import Leak, audit
from knockon.data.screen import Screen
from knockon.data.split_file import (
    Part,
    Split,
    assemble,
    carve,
    everything,
    part,
    read,
    seen,
    share,
    training,
    without,
)
from knockon.types import Label, UserError

__all__ = [
    "KINDS", "Kind", "Leak", "Part", "Split", "additive", "additive_test", "audit", "combinations15",
    "context", "everything", "make", "part", "random", "read", "seen", "training", "unseen",
]  # fmt: skip

Kind = Literal["additive", "combinations15", "unseen", "context", "random", "none"]
KINDS: tuple[str, ...] = get_args(Kind)
"""Kinds that ``make`` knows by name; anything else is the path of a file."""


def additive(screen: Screen, *, seed: int = 42, fraction: float = 0.3, validation: float = 0.1) -> Split:
    """Hold out combinations, by the published algorithm; fold f of [scdfm, section 2] has seed 42 + f.

    Only combinations whose single perturbations are all measured are held out, so that the additive
    baseline is defined for each; the others are trained on.
    """
    test = _expand(_additive_order(screen, seed, fraction), screen)
    carved = carve(without(screen, test), test, validation, seed)
    return assemble(screen, kind="additive", seed=seed, test=test, validation=carved)


def combinations15(
    screen: Screen, *, seed: int = 42, fraction: float = 0.3, validation: float = 0.1
) -> Split:
    """Hold out the first 15 of the additive list and the singles of their perturbations.

    Other combinations with the same perturbations stay in training [scdfm, section 2], so this is
    not ``unseen``.
    """
    first = _additive_order(screen, seed, fraction)[:15]
    test = _expand([*first, *sorted({s for label in first for s in singles(label)})], screen)
    carved = carve(without(screen, test), test, validation, seed)
    return assemble(screen, kind="combinations15", seed=seed, test=test, validation=carved)


def unseen(
    screen: Screen,
    *,
    seed: int = 42,
    fraction: float = 0.1,
    validation: float = 0.1,
    holdout: Sequence[str] = (),
) -> Split:
    """Hold out perturbations, with every condition that touches one of them.

    ``seen`` tells of a test condition how many of its perturbations were trained on.

    Parameters
    ----------
    screen, seed, validation
        As for all kinds; validation perturbations are held out in the same way.
    fraction
        Of the perturbations.
    holdout
        The perturbations to hold out, instead of drawing them.
    """
    names = sorted({name for label in screen.conditions for name in label.perturbations})
    _require_known(holdout, names, "perturbation")
    rng = np.random.default_rng(seed)
    shuffled = [names[i] for i in rng.permutation(len(names))]
    held = tuple(sorted(holdout or shuffled[: max(1, int(fraction * len(names)))]))
    test = _touching(screen.conditions, held)
    rest = [label for label in screen.conditions if label not in set(test)]
    left = [name for name in shuffled if any(name in label.perturbations for label in rest)]
    chosen = left[: max(1, int(validation * len(left)))] if len(left) >= 4 and validation else []
    carved = _touching(rest, chosen)
    return assemble(screen, kind="unseen", seed=seed, test=test, validation=carved, heldout=held)


def context(
    screen: Screen,
    *,
    seed: int = 42,
    fraction: float = 1.0,
    validation: float = 0.1,
    holdout: Sequence[str] = (),
) -> Split:
    """Hold out perturbed cells of a level of the first covariate, such as a cell type.

    Its controls stay: a prediction starts from them.

    Parameters
    ----------
    screen, seed, validation
        As for all kinds.
    fraction
        Share of the level's perturbations that is held out, at all their doses; the others stay in training.
    holdout
        The levels to hold out; without it one is drawn.
    """
    if not screen.covariates:
        raise UserError(
            "The screen has no contexts",
            expected="a column with the cell type, cell line or donor of each cell",
            mend="name it with --covariate-keys COLUMN",
        )
    levels = sorted({label.covariates[0] for label in screen.conditions})
    _require_known(holdout, levels, screen.covariates[0].name)
    drawn = levels[int(np.random.default_rng(seed).integers(len(levels)))]
    held = tuple(sorted(holdout or (drawn,)))
    there = [label for label in screen.conditions if label.covariates[0] in held]
    treatments = sorted({label.perturbations for label in there})
    order = np.random.default_rng([seed, 1]).permutation(len(treatments))
    chosen = {treatments[i] for i in order[: max(1, share(fraction, len(treatments)))]}
    test = [label for label in there if label.perturbations in chosen]
    carved = carve(without(screen, test), test, validation, seed)
    whole = len(chosen) == len(treatments)
    return assemble(
        screen, kind="context", seed=seed, test=test, validation=carved, heldout=held if whole else ()
    )


def random(screen: Screen, *, seed: int = 42, fraction: float = 0.3, validation: float = 0.1) -> Split:
    """Hold out conditions at random, whatever they are."""
    everywhere = sorted({label.everywhere for label in screen.conditions})
    order = np.random.default_rng(seed).permutation(len(everywhere))
    test = _expand([everywhere[i] for i in order[: max(1, int(fraction * len(order)))]], screen)
    carved = carve(without(screen, test), test, validation, seed)
    return assemble(screen, kind="random", seed=seed, test=test, validation=carved)


def make(
    kind: str | Path,
    screen: Screen,
    *,
    seed: int = 42,
    fraction: float | None = None,
    holdout: Sequence[str] = (),
) -> Split:
    """Make a split of a kind, or read one from a file.

    Parameters
    ----------
    kind
        One of ``KINDS``, with hyphens or underscores, or the path of a file.
    screen, seed
        As for all kinds.
    fraction
        Of what is held out; by default that of the kind.
    holdout
        What to hold out, for the kinds ``unseen`` and ``context``.

    Raises
    ------
    UserError
        If the kind is unknown or does not take one of the options, or the screen has too few conditions.
    """
    name = str(kind).lower().replace("-", "_")
    if name not in KINDS:
        if Path(kind).suffix == ".json" or Path(kind).exists():
            return read(kind, screen)
        raise UserError(
            "Unknown kind of split",
            offenders=[kind],
            expected="one of " + ", ".join(KINDS) + ", or the path of a split.json",
        )
    if holdout and name not in ("unseen", "context"):
        raise UserError(f"The split {name} draws what it holds out", mend="leave out --holdout")
    if fraction is not None and name == "none":
        raise UserError(f"The split {name} takes no --fraction", mend="leave it out")
    options: dict[str, object] = {} if fraction is None else {"fraction": _checked(fraction)}
    if name in ("unseen", "context"):
        options["holdout"] = holdout
    makers: dict[str, Callable[..., Split]] = {
        "additive": additive,
        "combinations15": combinations15,
        "unseen": unseen,
        "context": context,
        "random": random,
    }
    return everything(screen) if name == "none" else makers[name](screen, seed=seed, **options)


def additive_test(combinations: Sequence[str], *, seed: int, fraction: float = 0.3) -> list[str]:
    """Draw the published additive test list, in its order [scdfm, section 2].

    Parameters
    ----------
    combinations
        As the file spells them: the published order is that of the texts by code point.
    seed
        42 + fold.
    fraction
        Of the combinations, rounded down.
    """
    names = np.unique(np.asarray(combinations, dtype=object).astype(str))
    np.random.RandomState(seed).shuffle(names)  # the published lists come from this old generator
    return names[: share(fraction, len(names))].tolist()


def singles(label: Label) -> list[Label]:
    """Take a combination apart: each perturbation alone, at its dose and in the same context."""
    return [
        Label((name,), (dose,), label.covariates)
        for name, dose in zip(label.perturbations, label.doses, strict=True)
    ]


def _additive_order(screen: Screen, seed: int, fraction: float) -> list[Label]:
    measured = set(screen.conditions)
    wide = [label for label in screen.conditions if len(label.perturbations) > 1]
    lacking = {label.everywhere for label in wide if not measured.issuperset(singles(label))}
    texts = {
        screen.spellings.get(label.everywhere, label.perturbation): label.everywhere
        for label in wide
        if label.everywhere not in lacking
    }
    if not texts:
        raise UserError(
            f"No combination has all its single perturbations measured (of {len(wide)})",
            expected="at least one, for the additive split",
            mend="use --split random or --split unseen",
        )
    chosen = additive_test(list(texts), seed=seed, fraction=max(_checked(fraction), 1 / len(texts)))
    return [texts[text] for text in chosen]


def _checked(fraction: float) -> float:
    if not 0 < fraction <= 1:
        raise UserError("--fraction", offenders=[fraction], expected="more than 0 and at most 1")
    return fraction


def _require_known(holdout: Sequence[str], names: Sequence[str], what: str) -> None:
    unknown = [name for name in holdout if name not in names]
    if unknown:
        near = {m for name in unknown[:3] for m in difflib.get_close_matches(name, names, 2)}
        raise UserError(
            f"Unknown {what} in --holdout",
            offenders=unknown,
            expected=f"one of {', '.join(sorted(near) or names[:10])}",
        )


def _expand(labels: Iterable[Label], screen: Screen) -> list[Label]:
    """Give labels without context every context where they occur."""
    contexts: dict[Label, list[Label]] = {}
    for label in screen.conditions:
        contexts.setdefault(label.everywhere, []).append(label)
    return [found for label in labels for found in contexts.get(label, ())]


def _touching(labels: Iterable[Label], names: Collection[str]) -> list[Label]:
    return [label for label in labels if not set(names).isdisjoint(label.perturbations)]
