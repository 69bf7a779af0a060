"""Training that begins with the weights of another run, on other genes and perturbations."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from knockon.data.splits import Split
from knockon.files import read_json
from knockon.model import Model, load_weights
from knockon.run import RECORD, SPLIT, WEIGHTS, Record, read_spec, refuse_edited
from knockon.types import Spec, UserError

Names = tuple[Sequence[str] | None, ...]


@torch.no_grad()
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
        If the folder holds no finished run of this model, or its weights cannot be told apart by name.
    """
    if not (folder / RECORD).exists():
        raise UserError(f"{folder} is no run folder", expected="one that knockon train wrote")
    earlier = Record.read(folder)
    if earlier.model != record.model or not earlier.finished:
        raise UserError(
            f"{folder} holds {'a' if earlier.finished else 'an unfinished'} run of {earlier.model}",
            expected=f"a finished run of {record.model}",
        )
    refuse_edited(earlier, folder)
    spec = read_spec(folder)
    with torch.random.fork_rng(devices=[]):
        source = earlier.config.build(spec)
    load_weights(source, folder / WEIGHTS)
    old, named = dict(source.named_parameters()), (source.entries(), model.entries())
    if not all(named) and _names(spec) != _names(model.spec):
        raise UserError(
            f"{record.model} cannot begin with a run on other genes, perturbations or contexts",
            expected="the same in both",
        )
    kept, partly, new = 0, [], []
    for key, parameter in model.named_parameters():
        known = None
        if key in old:
            known = _overlap(old[key], parameter, *(entries.get(key) for entries in named))
        if known is None:
            new.append(key)
            continue
        places, values = known
        parameter[places] = values
        if values.numel() == parameter.numel():
            kept += 1
        else:
            shape = " x ".join(map(str, parameter.shape))
            partly.append(f"{key} ({' x '.join(map(str, values.shape))} of {shape})")
    return [
        f"{kept} tensors were kept whole from {folder}",
        f"kept in part: {_first(partly)}",
        f"initialized anew: {_first(new)}",
        *_different(earlier, record),
        *_leaks(earlier, read_json(folder / SPLIT), record, split),
    ]


def _names(spec: Spec) -> tuple[object, ...]:
    return spec.genes, spec.perturbations, spec.covariates


def _different(earlier: Record, record: Record) -> list[str]:
    """Say which options of the model are others than in the earlier run."""
    before, now = dataclasses.asdict(earlier.config), dataclasses.asdict(record.config)
    found = [f"{key} {before[key]} -> {now[key]}" for key in now if before[key] != now[key]]
    return [f"other options than in {earlier.model} before: {', '.join(found)}"] if found else []


def _leaks(earlier: Record, before: Mapping[str, object], record: Record, split: Split) -> list[str]:
    """Warn where the earlier run can have seen cells that are held out now."""
    if not record.source or Path(earlier.source).name != Path(record.source).name or not split.test:
        return []
    trained = before["train"]
    assert isinstance(trained, list)
    known = {entry["perturbation"] if isinstance(entry, dict) else entry for entry in trained}
    seen = [label for label in split.test if label.perturbation in known]
    if not seen and not earlier.columns.unlabelled:
        return []
    return [
        f"Leak: the earlier run read {earlier.source}, with cells of the conditions that are held out now;"
        " scores on them say nothing"
    ]


def _first(names: Sequence[str], shown: int = 12) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return (", ".join(names[:shown]) or "none") + more


def _overlap(
    old: Tensor, new: Tensor, old_names: Names | None, new_names: Names | None
) -> tuple[tuple[Tensor, ...], Tensor] | None:
    """Places in the new tensor whose names the old one has, and its values there; None without any."""
    none: Names = (None,) * new.ndim
    if old.ndim != new.ndim:
        return None
    taken, put = [], []
    for size, length, before, now in zip(
        old.shape, new.shape, old_names or none, new_names or none, strict=True
    ):
        if before is None or now is None:
            if size != length:
                return None
            rows = list(range(length))
            taken.append(rows)
            put.append(rows)
            continue
        place = {entry: i for i, entry in enumerate(before)}
        common = [(place[entry], i) for i, entry in enumerate(now) if entry in place]
        if not common:
            return None
        taken.append([i for i, _ in common])
        put.append([i for _, i in common])
    return _grid(put), old[_grid(taken)]


def _grid(rows: list[list[int]]) -> tuple[Tensor, ...]:
    """Index that picks these entries along every dimension."""
    return torch.meshgrid(*(torch.tensor(x) for x in rows), indexing="ij")
