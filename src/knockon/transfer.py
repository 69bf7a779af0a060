"""Training that begins with the weights of another run, on other genes and perturbations."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from knockon.data.splits import Split
from knockon.files import read_json
from knockon.model import Model, copy_named
from knockon.record import RECORD, SPLIT, Record, stored
from knockon.types import Spec, UserError


def adopt(model: Model, folder: Path, record: Record, split: Split) -> list[str]:
    """Take over the weights of a run, entry by entry where entries have names (``Model.entries``).

    Parameters
    ----------
    model
        Freshly built; what finds no counterpart stays as it was initialized.
    folder
        The earlier run.
    record, split
        Of the run that begins.

    Returns
    -------
    list
        What was kept, what is new and what to beware of, in sentences.

    Raises
    ------
    UserError
        If the model has no weights, the folder holds no finished run of it, or its weights cannot be told
        apart by name.
    """
    if not list(model.parameters()):
        raise UserError(
            f"{record.model} has no weights that training could begin with", mend="leave out --from"
        )
    if not (folder / RECORD).exists():
        raise UserError(f"{folder} is no run folder", expected="one that knockon train wrote")
    earlier = Record.read(folder)
    if earlier.model != record.model or not earlier.finished:
        raise UserError(
            f"{folder} holds {'a' if earlier.finished else 'an unfinished'} run of {earlier.model}",
            expected=f"a finished run of {record.model}",
        )
    _, source = stored(folder)
    if not (source.entries() and model.entries()) and _names(source.spec) != _names(model.spec):
        raise UserError(
            f"{record.model} cannot begin with a run on other genes, perturbations or contexts",
            expected="the same in both",
        )
    kept, partly, new = copy_named(model, source)
    return [
        f"{kept} tensors were kept whole from {folder}",
        f"kept in part: {_first(partly)}",
        f"initialized anew: {_first(new)}",
        *_different(earlier, record),
        *leaks(folder, record, split),
    ]


def _names(spec: Spec) -> tuple[object, ...]:
    return spec.genes, spec.perturbations, spec.covariates


def _different(earlier: Record, record: Record) -> list[str]:
    """Say which options of the model are others than in the earlier run."""
    before, now = dataclasses.asdict(earlier.config), dataclasses.asdict(record.config)
    found = [f"{key} {before[key]} -> {now[key]}" for key in now if before[key] != now[key]]
    return [f"other options than in {earlier.model} before: {', '.join(found)}"] if found else []


def leaks(folder: Path, record: Record, split: Split) -> list[str]:
    """Warn where an earlier run can have seen cells that are held out now."""
    earlier, before = Record.read(folder), read_json(folder / SPLIT)
    same_file = bool(record.source) and Path(earlier.source).name == Path(record.source).name
    if not split.test or not (same_file or earlier.screen == record.screen):
        return []
    by_context = tuple(before.get("covariates", ())) == split.covariates
    names = split.covariates if by_context else ()
    known = {_key(entry, names) for part in ("train", "validation") for entry in before[part]}
    seen = [label for label in split.test if _key(split.plain(label), names) in known]
    if not seen and not earlier.columns.unlabelled:
        return []
    return [
        f"Leak: the earlier run read {earlier.source or 'this screen'}, with cells of the conditions that are"
        " held out now; scores on them say nothing"
    ]


def _key(entry: str | Mapping[str, str], covariates: Sequence[str]) -> tuple[str, ...]:
    """Tell conditions apart by what was done, and by these covariates."""
    if isinstance(entry, str):
        return (entry,)
    return (entry["perturbation"], *(entry[name] for name in covariates))


def _first(names: Sequence[str], shown: int = 12) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return (", ".join(names[:shown]) or "none") + more
