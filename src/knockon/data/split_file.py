"""What a split is, the file that it lies in, and the screens that it selects.

Controls are listed in no part: they are always training cells, and what predictions start from.
"""

import difflib
import json
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from knockon.data.conventions import parse
from knockon.data.screen import Screen
from knockon.files import read_json, typed, write_text
from knockon.types import Label, UserError

Part = Literal["train", "validation", "test"]


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

    def write(self, path: str | Path) -> None:
        """Write as JSON; conditions are text, or objects where they have a context."""
        write_text(Path(path), self.text)

    @property
    def text(self) -> str:
        """What its file says, by whose digest runs and predictions know it."""
        parts = {part: [self.plain(label) for label in getattr(self, part)] for part in get_args(Part)}
        head = {"kind": self.kind, "seed": self.seed, "digest": self.digest}
        tail = {"covariates": list(self.covariates), "heldout": list(self.heldout)}
        return json.dumps({**head, **parts, **tail}, indent=1) + "\n"

    def plain(self, label: Label) -> str | dict[str, str]:
        """Write a condition as text, or as an object where it has a context."""
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
    known = [field.name for field in fields(Split)]
    if strange := sorted(value.keys() - set(known)):  # of a misspelled part, nothing would be held out
        raise UserError(f"{path} has unknown entries", offenders=strange, expected=", ".join(known))
    _same_screen(str(value.get("digest", "")), screen)
    if value.get("kind") == "none" and not value["test"]:
        return everything(screen)
    parts = {part: _resolve(value[part], screen, path) for part in get_args(Part) if part in value}
    _refuse_overlap(parts)
    where = str(path)
    seed = typed(int, value.get("seed", 42), where=f"{where}, seed")
    heldout = typed(tuple[str, ...], value.get("heldout", ()), where=f"{where}, heldout")
    if seed < 0:
        raise UserError(f"{where}, seed is {seed}", expected="0 or more")
    test = parts["test"]
    validation = parts.get("validation")
    if validation is None:
        rest = parts.get("train", tuple(label for label in screen.conditions if label not in set(test)))
        validation = carve(rest, test, 0.1, seed)
    split = assemble(
        screen,
        kind=str(value.get("kind", "custom")),
        seed=seed,
        test=test,
        validation=validation,
        heldout=heldout,
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
    known = {*screen.spec().perturbations, *screen.genes}
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


def part(split: Split, screen: Screen, name: Part) -> Screen:
    """Select the conditions of one part, with all controls; nothing else can be reached through it."""
    _same_screen(split.digest, screen)
    return screen.select((*getattr(split, name), *screen.controls))


def training(split: Split, screen: Screen) -> Screen:
    """Select what a model may be fitted to: the training conditions and all controls."""
    return part(split, screen, "train")


def seen(train: Iterable[Label], label: Label) -> int:
    """How many perturbations of a condition occur in training conditions, alone or in combination."""
    known = {name for trained in train for name in trained.perturbations}
    return sum(name in known for name in label.perturbations)


def everything(screen: Screen) -> Split:
    """Hold out nothing: all conditions are trained on, if there are any."""
    return Split(
        kind="none",
        seed=0,
        train=screen.conditions,
        validation=(),
        test=(),
        digest=screen.digest,
        covariates=tuple(covariate.name for covariate in screen.covariates),
    )


def assemble(
    screen: Screen,
    *,
    kind: str,
    seed: int,
    test: Sequence[Label],
    validation: Sequence[Label],
    heldout: Sequence[str] = (),
) -> Split:
    """Make a split; what is neither test nor validation is trained on."""
    train = tuple(without(screen, (*test, *validation)))
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


def carve(rest: Sequence[Label], test: Sequence[Label], fraction: float, seed: int) -> list[Label]:
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
        if len(carved) == max(1, share(fraction, len(candidates))):
            break
        names = candidates[i].perturbations
        if not spare or all(uses[name] > 1 for name in names):
            carved.append(candidates[i])
            uses.subtract(names)
    return carved


def without(screen: Screen, test: Iterable[Label]) -> list[Label]:
    """List the conditions of a screen that are not held out."""
    held = set(test)
    return [label for label in screen.conditions if label not in held]


def share(fraction: float, count: int) -> int:
    """Round down, but not where a fraction of whole numbers only looks smaller in binary."""
    return int(fraction * count + 1e-9)
