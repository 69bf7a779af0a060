"""Training that begins with the weights of another run, on other genes and perturbations."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from knockon.model import Model, load_weights
from knockon.run import RECORD, WEIGHTS, Record, read_spec, refuse_edited
from knockon.types import UserError

Names = tuple[Sequence[str] | None, ...]


@torch.no_grad()
def adopt(model: Model, folder: Path, name: str) -> list[str]:
    """Take over the weights of a run, entry by entry where entries have names (``Model.entries``).

    Parameters
    ----------
    model
        Freshly built; what finds no counterpart stays as it was initialized.
    folder
        The run.
    name
        Of the model.

    Returns
    -------
    list
        What was kept and what is new, in sentences.

    Raises
    ------
    UserError
        If the folder holds no finished run of this model.
    """
    if not (folder / RECORD).exists():
        raise UserError(f"{folder} is no run folder", expected="one that knockon train wrote")
    record = Record.read(folder)
    if record.model != name or not record.finished:
        raise UserError(
            f"{folder} holds {'a' if record.finished else 'an unfinished'} run of {record.model}",
            expected=f"a finished run of {name}",
        )
    refuse_edited(record, folder)
    with torch.random.fork_rng(devices=[]):
        earlier = record.config.build(read_spec(folder))
    load_weights(earlier, folder / WEIGHTS)
    old, named = dict(earlier.named_parameters()), (earlier.entries(), model.entries())
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
