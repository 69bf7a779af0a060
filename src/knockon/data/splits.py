"""Which conditions are held out. A split is a file, and belongs to one screen.

Controls are listed in no part: they are always training cells, and what predictions start from.
A held-out perturbation is held out in every context where it occurs, except where contexts are split.
"""

import difflib
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from knockon.data.conventions import parse
from knockon.data.screen import Screen
from knockon.files import read_json, write_json
from knockon.types import Label, UserError

Part = Literal["train", "validation", "test"]
KINDS = ("additive", "combinations15", "unseen", "context", "random")
"""Kinds that ``make`` knows by name; anything else is the path of a file."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """Perturbed conditions to train on, to choose by, and to be judged on; disjoint.

    Parameters
    ----------
    kind, seed
        How it was made; ``custom`` for a file that somebody wrote.
    train, validation, test
        Conditions, controls excluded.
    digest
        Of the screen that it belongs to.
    covariates
        Names of the covariates of its labels.
    heldout
        Perturbations or levels that training must never see, for the kinds that hold out such.
    """

    kind: str
    seed: int
    train: tuple[Label, ...]
    validation: tuple[Label, ...]
    test: tuple[Label, ...]
    digest: str
    covariates: tuple[str, ...] = ()
    heldout: tuple[str, ...] = ()

    def write(self, path: Path) -> None:
        """Write as JSON; conditions are text, or objects where they have a context."""
        parts = {part: [self._plain(label) for label in getattr(self, part)] for part in get_args(Part)}
        head = {"kind": self.kind, "seed": self.seed, "digest": self.digest}
        tail = {"covariates": list(self.covariates), "heldout": list(self.heldout)}
        write_json(Path(path), {**head, **parts, **tail})

    def _plain(self, label: Label) -> str | dict[str, str]:
        if not self.covariates:
            return label.perturbation
        return {
            "perturbation": label.perturbation,
            **dict(zip(self.covariates, label.covariates, strict=True)),
        }


def read(path: str | Path, screen: Screen) -> Split:
    """Read a split of this screen; a hand-written file needs nothing but ``test``.

    Its conditions may be in any spelling, and one without context is meant in every context. What
    the file does not list is trained on, and validation is carved from that.

    Raises
    ------
    UserError
        If the file belongs to another screen, names a condition without cells, or overlaps.
    """
    value = read_json(Path(path))
    if "test" not in value:
        raise UserError(
            f"{path} holds no test conditions",
            offenders=list(value),
            expected='a JSON object such as {"test": ["A+B", "C"]}',
        )
    _same_screen(str(value.get("digest", "")), screen)
    parts = {part: _resolve(value[part], screen, path) for part in get_args(Part) if part in value}
    _refuse_overlap(parts)
    seed, test = int(value.get("seed", 42)), parts["test"]
    validation = parts.get("validation")
    if validation is None:
        rest = parts.get("train", tuple(label for label in screen.conditions if label not in set(test)))
        validation = _carve(rest, test, 0.1, seed)
    split = _assemble(
        screen,
        kind=str(value.get("kind", "custom")),
        seed=seed,
        test=test,
        validation=validation,
        heldout=[str(name) for name in value.get("heldout", ())],
    )
    listed = parts.get("train", split.train)
    return replace(split, train=tuple(label for label in listed if label not in set(split.validation)))


def _same_screen(digest: str, screen: Screen) -> None:
    if digest and digest != screen.digest:
        raise UserError(
            f"The split belongs to another screen (digest {digest[:8]})",
            expected=f"a split of this screen (digest {screen.digest[:8]}), read with the same columns",
            mend="make one with: knockon split DATA; or remove the digest to use its names with this screen",
        )


def _refuse_overlap(parts: dict[str, tuple[Label, ...]]) -> None:
    times = Counter(label for labels in parts.values() for label in set(labels))
    shared = sorted(label for label, count in times.items() if count > 1)
    if shared:
        raise UserError(
            "Conditions in two parts of the split",
            offenders=shared,
            expected="train, validation and test without overlap",
            mend="remove them from all parts but one",
        )


def _resolve(entries: object, screen: Screen, path: str | Path) -> tuple[Label, ...]:
    """Conditions of a file as labels of the screen, in the file's order; controls are left out."""
    if not isinstance(entries, list):
        raise UserError(f"{path} holds {type(entries).__name__}", expected="lists of conditions")
    known = {name for label in screen.vocabulary for name in label.perturbations} | set(screen.genes)
    found: dict[Label, None] = {}
    unknown: list[object] = []
    for entry in entries:
        label = _label(entry, screen, known)
        if label is not None and label.is_control:
            continue
        matches = [] if label is None else _matches(label, screen)
        found |= dict.fromkeys(matches)
        unknown += [] if matches else [entry]
    if unknown:
        names = [str(label) for label in screen.conditions]
        near = [m for entry in unknown[:3] for m in difflib.get_close_matches(str(entry), names, 2)]
        raise UserError(
            "Conditions without cells in the screen",
            offenders=unknown,
            expected="conditions of the screen" + (f" (did you mean {', '.join(near)}?)" if near else ""),
            mend=f"correct {path}",
        )
    return tuple(found)


def _label(entry: object, screen: Screen, known: Collection[str]) -> Label | None:
    if isinstance(entry, str):
        return parse(entry, known=known)
    names = [covariate.name for covariate in screen.covariates]
    if not isinstance(entry, dict) or set(entry) != {"perturbation", *names}:
        return None
    label = parse(str(entry["perturbation"]), known=known)
    return Label(label.perturbations, label.doses, tuple(str(entry[name]) for name in names))


def _matches(label: Label, screen: Screen) -> list[Label]:
    if label.covariates:
        return [label] if label in screen.rows else []
    return [found for found in screen.conditions if found.everywhere == label]


# Making


def additive(screen: Screen, *, seed: int = 42, fraction: float = 0.3, validation: float = 0.1) -> Split:
    """Hold out combinations, by the published algorithm; fold f of [scdfm, section 2] has seed 42 + f.

    Only combinations whose single perturbations are all measured are held out, so that the additive
    baseline is defined for each; the others are trained on.
    """
    test = _expand(_additive_order(screen, seed, fraction), screen)
    needed = {single for label in test for single in singles(label)}
    carved = _carve([c for c in _without(screen, test) if c not in needed], test, validation, seed)
    return _assemble(screen, kind="additive", seed=seed, test=test, validation=carved)


def combinations15(
    screen: Screen, *, seed: int = 42, fraction: float = 0.3, validation: float = 0.1
) -> Split:
    """Hold out the first 15 of the additive list and the singles of their perturbations.

    Other combinations with the same perturbations stay in training [scdfm, section 2], so this is
    not ``unseen``.
    """
    first = _additive_order(screen, seed, fraction)[:15]
    test = _expand([*first, *sorted({s for label in first for s in singles(label)})], screen)
    carved = _carve(_without(screen, test), test, validation, seed)
    return _assemble(screen, kind="combinations15", seed=seed, test=test, validation=carved)


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
    return _assemble(screen, kind="unseen", seed=seed, test=test, validation=carved, heldout=held)


def context(screen: Screen, *, seed: int = 42, validation: float = 0.1, holdout: Sequence[str] = ()) -> Split:
    """Hold out all perturbed cells of a level of the first covariate, such as a cell type.

    Its controls stay: a prediction starts from them.

    Parameters
    ----------
    screen, seed, validation
        As for all kinds.
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
    test = [label for label in screen.conditions if label.covariates[0] in held]
    carved = _carve(_without(screen, test), test, validation, seed)
    return _assemble(screen, kind="context", seed=seed, test=test, validation=carved, heldout=held)


def random(screen: Screen, *, seed: int = 42, fraction: float = 0.3, validation: float = 0.1) -> Split:
    """Hold out conditions at random, whatever they are."""
    everywhere = sorted({label.everywhere for label in screen.conditions})
    order = np.random.default_rng(seed).permutation(len(everywhere))
    test = _expand([everywhere[i] for i in order[: max(1, int(fraction * len(order)))]], screen)
    carved = _carve(_without(screen, test), test, validation, seed)
    return _assemble(screen, kind="random", seed=seed, test=test, validation=carved)


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
    share = {} if fraction is None else {"fraction": _checked(fraction)}
    match name:
        case "unseen":
            return unseen(screen, seed=seed, holdout=holdout, **share)
        case "context":
            return context(screen, seed=seed, holdout=holdout)
        case "random":
            return random(screen, seed=seed, **share)
        case "combinations15":
            return combinations15(screen, seed=seed, **share)
        case _:
            return additive(screen, seed=seed, **share)


# Using


def part(split: Split, screen: Screen, name: Part) -> Screen:
    """Select the conditions of one part, with all controls; nothing else can be reached through it."""
    _same_screen(split.digest, screen)
    return screen.select((*getattr(split, name), *screen.controls))


def training(split: Split, screen: Screen) -> Screen:
    """Select what a model may be fitted to: the training conditions and all controls."""
    return part(split, screen, "train")


def seen(split: Split, label: Label) -> int:
    """How many perturbations of a condition occur in training, alone or in combination."""
    known = {name for trained in split.train for name in trained.perturbations}
    return sum(name in known for name in label.perturbations)


def singles(label: Label) -> list[Label]:
    """Take a combination apart: each perturbation alone, at its dose and in the same context."""
    return [
        Label((name,), (dose,), label.covariates)
        for name, dose in zip(label.perturbations, label.doses, strict=True)
    ]


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
    return names[: _share(fraction, len(names))].tolist()


# Helpers


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
            f"No combination has all its single perturbations measured ({len(wide)} combinations)",
            expected="at least one, for the additive split",
            mend="use --split random or --split unseen",
        )
    chosen = additive_test(list(texts), seed=seed, fraction=max(_checked(fraction), 1 / len(texts)))
    return [texts[text] for text in chosen]


def _share(fraction: float, count: int) -> int:
    """Round down, but not where a fraction of whole numbers only looks smaller in binary."""
    return int(fraction * count + 1e-9)


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


def _without(screen: Screen, test: Iterable[Label]) -> list[Label]:
    held = set(test)
    return [label for label in screen.conditions if label not in held]


def _touching(labels: Iterable[Label], names: Collection[str]) -> list[Label]:
    return [label for label in labels if not set(names).isdisjoint(label.perturbations)]


def _carve(rest: Sequence[Label], test: Sequence[Label], fraction: float, seed: int) -> list[Label]:
    """Draw validation conditions that resemble the test conditions, from what is left.

    They combine as many perturbations as test conditions do; and where training knows all
    perturbations of the test conditions, it still knows all of theirs afterwards.
    """
    sizes = {len(label.perturbations) for label in test}
    candidates = [label for label in rest if len(label.perturbations) in sizes]
    if len(candidates) < 4 or fraction <= 0:
        return []
    uses = Counter(name for label in rest for name in label.perturbations)
    spare = all(uses[name] for label in test for name in label.perturbations)
    carved: list[Label] = []
    for i in np.random.default_rng([seed, 1]).permutation(len(candidates)):
        if len(carved) == max(1, _share(fraction, len(candidates))):
            break
        names = candidates[i].perturbations
        if not spare or all(uses[name] > 1 for name in names):
            carved.append(candidates[i])
            uses.subtract(names)
    return carved


def _assemble(
    screen: Screen,
    *,
    kind: str,
    seed: int,
    test: Sequence[Label],
    validation: Sequence[Label],
    heldout: Sequence[str] = (),
) -> Split:
    train = tuple(_without(screen, (*test, *validation)))
    if not test or not train:
        raise UserError(
            f"Too few conditions for a split ({len(screen.conditions)} without controls)",
            expected="at least one to train on and one to test",
            mend="hold out less with --fraction, or use another kind of split",
        )
    return Split(
        kind=kind,
        seed=seed,
        train=train,
        validation=tuple(validation),
        test=tuple(test),
        digest=screen.digest,
        covariates=tuple(covariate.name for covariate in screen.covariates),
        heldout=tuple(heldout),
    )
