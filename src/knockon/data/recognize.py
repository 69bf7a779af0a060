"""The columns of a screen: found by convention where nobody names them, parsed once per distinct value."""

import difflib
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Bool, Int

from knockon.data.conventions import (
    AMOUNT,
    Columns,
    Piece,
    is_control_name,
    label_of,
    names_of,
    read_parts,
    split_text,
)
from knockon.types import CONTROL, Covariate, Label, UserError

PERTURBATION_COLUMNS = ("perturbation", "condition", "target_gene", "guide_merged", "gene_target", "drug")
CONTROL_COLUMNS = ("control", "is_control")
CONTEXT_COLUMNS = ("cell_type", "celltype", "cell_line")
DOSE_COLUMNS = ("dose_val", "dose_value", "dosage", "dose")


@dataclass(frozen=True, kw_only=True, eq=False)
class Design:
    """What was done to every cell.

    Parameters
    ----------
    labels, codes
        The distinct conditions, controls first and sorted, and which of them each cell has.
    covariates
        Their names and levels.
    spellings
        How the file writes each combination, joined with ``+``, without controls: the published
        additive split depends on it.
    dose_unit
        Unit of all doses; None where there are none or the file does not tell.
    notes
        What was recognized rather than told.
    """

    labels: tuple[Label, ...]
    codes: Int[np.ndarray, "cells"]
    covariates: tuple[Covariate, ...]
    spellings: dict[Label, str]
    dose_unit: str | None
    notes: tuple[str, ...]


def recognize(obs: pd.DataFrame, genes: Collection[str], columns: Columns) -> Design:
    """Find and parse what was done to every cell.

    Raises
    ------
    UserError
        If a column is missing or ambiguous, there is no control, or a value cannot be read.
    """
    notes: list[str] = []
    genes = frozenset(genes)
    if columns.unlabelled:
        if columns.perturbation_key or columns.control or columns.dose_key:
            raise UserError(
                "--unlabelled with a column that says what was done",
                expected="one or the other",
                mend="leave out --unlabelled, or --perturbation-key, --control and --dose-key",
            )
        notes.append(f"all {len(obs):,} cells are taken for control cells (--unlabelled)")
        texts, controls, doses = [CONTROL], frozenset({CONTROL}), [""]
        text_codes = dose_codes = np.zeros(len(obs), dtype=np.int64)
    else:
        key = _perturbation_column(obs, columns.perturbation_key, notes)
        texts, text_codes = _levels(obs, key)
        flags = None if columns.control else _control_flags(obs, notes)
        controls = _controls(texts, text_codes, flags, genes=genes, told=columns.control, notes=notes)
        doses, dose_codes = read_doses(obs, columns.dose_key, notes)
    known = names_of(texts, genes) - (controls - genes)
    pairs, codes = _distinct(text_codes, dose_codes)
    parsed = [read_parts(texts[t], doses[d], known=known, controls=controls) for t, d in pairs]
    _refuse_second_control(parts for parts, _ in parsed)
    if any(doses):
        _refuse_missing_doses(
            texts[t] for (t, d), (parts, _) in zip(pairs, parsed, strict=True) if parts and not doses[d]
        )
    covariates, covariate_codes = read_covariates(obs, columns.covariate_keys, notes)
    rows, codes = _distinct(codes, *covariate_codes)
    found = [
        label_of(parsed[pair][0], [c.levels[i] for c, i in zip(covariates, levels, strict=True)])
        for pair, *levels in rows
    ]
    dosed = any(dose for label in found for dose in label.doses)
    labels = tuple(sorted(set(found), key=lambda label: (not label.is_control, label)))
    place = {label: i for i, label in enumerate(labels)}
    return Design(
        labels=labels,
        codes=np.array([place[label] for label in found], dtype=np.int64)[codes],
        covariates=covariates,
        spellings=_spellings(parts for parts, _ in parsed),
        dose_unit=_one_unit({unit for _, units in parsed for unit in units}) or ("" if dosed else None),
        notes=tuple(notes),
    )


def follow(
    obs: pd.DataFrame,
    columns: Columns,
    *,
    known: Collection[str],
    covariates: Sequence[Covariate],
    dosed: bool,
) -> tuple[dict[Label, Int[np.ndarray, "cells"]], tuple[str, ...]]:
    """Find what was done to cells that somebody predicted, in the words of a screen.

    Unlike a screen, they need no control, and a context of which the screen has one level only need not be
    told.

    Parameters
    ----------
    obs
        Of the predicted cells.
    columns
        Where to look; recognized without it, by the conventions of screens.
    known
        Names of genes and single perturbations of the screen.
    covariates
        Those of the screen.
    dosed
        Whether the screen has doses; otherwise no column tells one.

    Returns
    -------
    tuple
        Rows of each condition, and what was recognized rather than told.

    Raises
    ------
    UserError
        If a column is missing or says nothing for some cells, or a value cannot be read.
    """
    notes: list[str] = []
    key = columns.perturbation_key or ("perturbation" if "perturbation" in obs.columns else None)
    texts, text_codes = _levels(obs, _perturbation_column(obs, key, notes, "--pred-perturbation-key"))
    flags = _control_flags(obs, [])
    unmarked = set() if flags is None else set(text_codes[~flags].tolist())
    marked = set() if flags is None else set(text_codes[flags].tolist()) - unmarked
    controls = frozenset({texts[i] for i in marked} | ({columns.control} if columns.control else set()))
    told = columns.dose_key if columns.dose_key in obs.columns else None
    doses, dose_codes = read_doses(obs, told, notes) if dosed else ([""], np.zeros(len(obs), np.int64))
    contexts = [_context(obs, covariate, notes) for covariate in covariates]
    rows = defaultdict(list)
    distinct, codes = _distinct(text_codes, dose_codes, *(levels for _, levels in contexts))
    for code, (text, dose, *levels) in enumerate(distinct):
        name, context = texts[text], [names[i] for (names, _), i in zip(contexts, levels, strict=True)]
        is_control = name in controls or (name not in known and is_control_name(name))
        parts = [] if is_control else read_parts(name, doses[dose], known=known, controls=controls)[0]
        rows[label_of(parts, context)].append(np.flatnonzero(codes == code))
    return {label: np.sort(np.concatenate(found)) for label, found in rows.items()}, tuple(notes)


def _context(
    obs: pd.DataFrame, covariate: Covariate, notes: list[str]
) -> tuple[list[str], Int[np.ndarray, "cells"]]:
    """Levels and codes of one covariate, which may go without saying."""
    if covariate.name in obs.columns:
        return _levels(obs, covariate.name)
    if len(covariate.levels) == 1:
        notes.append(f"all predicted cells are taken to be {covariate.name} {covariate.levels[0]}")
        return list(covariate.levels), np.zeros(len(obs), dtype=np.int64)
    raise UserError(
        "Columns that obs of the prediction lacks",
        offenders=[covariate.name],
        expected=f"the context of each cell, as the screen has it; found {', '.join(map(str, obs.columns))}",
        mend="add the column to the prediction, or read the screen with other --covariate-keys",
    )


def _refuse_second_control(conditions: Iterable[list[Piece]]) -> None:
    if any(part.name == CONTROL for parts in conditions for part in parts):
        raise UserError(
            f"A perturbation is called {CONTROL!r} and is not the control",
            expected=f"{CONTROL!r} to mean no perturbation",
            mend=f"name it as the control with --control {CONTROL}, or call it something else",
        )


def _refuse_missing_doses(texts: Iterable[str]) -> None:
    missing = list(texts)
    if missing:
        raise UserError(
            "Perturbed cells without a dose, where others have one",
            offenders=missing,
            expected="a number for every perturbed cell",
            mend="fill the column, or name another with --dose-key",
        )


def _spellings(conditions: Iterable[list[Piece]]) -> dict[Label, str]:
    """Tell how the file writes each combination; of several ways, the first by code point."""
    spelled = sorted((label_of(parts), "+".join(map(str, parts))) for parts in conditions if len(parts) > 1)
    return dict(reversed(spelled))


def _one_unit(units: set[str | None]) -> str | None:
    if len(units) > 1:
        raise UserError(
            "Doses in several units",
            offenders=sorted(str(unit) for unit in units),
            expected="one unit; nM, uM and mM are brought to uM",
            mend="write all doses in one unit",
        )
    return next(iter(units), None)


def _distinct(*codes: Int[np.ndarray, "cells"]) -> tuple[list[list[int]], Int[np.ndarray, "cells"]]:
    table, inverse = np.unique(np.stack(codes, axis=1), axis=0, return_inverse=True)
    return table.tolist(), inverse.ravel()


def _require(obs: pd.DataFrame, name: str, flag: str) -> str:
    if name not in obs.columns:
        have = [str(column) for column in obs.columns]
        near = difflib.get_close_matches(name, have, 3, cutoff=0.5)
        raise UserError(
            "Unknown column",
            offenders=[name],
            expected=f"one of {', '.join(have) or 'none: obs is empty'}"
            + (f" (did you mean {' or '.join(near)}?)" if near else ""),
            mend=f"{flag} COLUMN",
        )
    return name


def _perturbation_column(
    obs: pd.DataFrame, told: str | None, notes: list[str], option: str = "--perturbation-key"
) -> str:
    if told is not None:
        return _require(obs, told, option)
    for name in PERTURBATION_COLUMNS:
        if name in obs.columns:
            notes.append(f"perturbations are read from obs[{name!r}] (or {option})")
            return name
    raise UserError(
        "No column of obs says what was done to the cells",
        offenders=[str(column) for column in obs.columns],
        expected="one of " + ", ".join(PERTURBATION_COLUMNS),
        mend=f"name it with {option} COLUMN",
    )


def _levels(obs: pd.DataFrame, key: str) -> tuple[list[str], Int[np.ndarray, "cells"]]:
    """Distinct values of a column as text, sorted, and the code of each cell."""
    codes, values = pd.factorize(obs[key].astype(str).where(obs[key].notna()), sort=True)
    texts = [str(value).strip() for value in values]
    empty = (codes < 0) | np.isin(codes, [i for i, text in enumerate(texts) if text in ("", "nan")])
    if empty.any():
        raise UserError(
            f"obs[{key!r}] says nothing for {empty.sum()} cells",
            offenders=obs.index[empty].astype(str).tolist(),
            expected="a value for every cell",
            mend=f"remove them (adata = adata[adata.obs[{key!r}].notna()]) or fill them in",
        )
    return texts, codes.astype(np.int64)


def _control_flags(obs: pd.DataFrame, notes: list[str]) -> Bool[np.ndarray, "cells"] | None:
    """Read a column of truth values that marks the control cells, where there is one."""
    truth = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
    for name in CONTROL_COLUMNS:
        if name in obs.columns:
            values = obs[name].astype(str).str.lower().map(truth)
            if values.notna().all() and values.any():
                notes.append(f"control cells are those with obs[{name!r}] (or --control)")
                return values.to_numpy(dtype=bool)
    return None


def _controls(
    texts: list[str],
    codes: Int[np.ndarray, "cells"],
    flags: Bool[np.ndarray, "cells"] | None,
    *,
    genes: frozenset[str],
    told: str | None,
    notes: list[str],
) -> frozenset[str]:
    """Texts that mean no perturbation."""
    counts = np.bincount(codes, minlength=len(texts))
    if flags is not None:
        flagged = np.bincount(codes[flags], minlength=len(texts))
        torn = [texts[i] for i in np.flatnonzero((flagged > 0) & (flagged < counts))]
        if torn:
            raise UserError(
                "The control column marks only a part of the cells of one perturbation",
                offenders=torn,
                expected="all of its cells or none",
                mend="name the control with --control VALUE",
            )
        return frozenset(texts[i] for i in np.flatnonzero(flagged))
    if told is not None:
        names = {told} & {part.name for text in texts for part in split_text(text, {*genes, told})}
    else:
        parts = {part.name for text in texts for part in split_text(text, genes)}
        names = {name for name in parts if is_control_name(name) and name not in genes}
        notes.extend(f"the control is called {name!r} (or --control)" for name in names)
    whole = {t for t in texts if {part.name for part in split_text(t, {*genes, *names})} <= names}
    if len(names) == 1 and whole:
        return frozenset(names | whole)
    frequent = [f"{texts[i]} ({counts[i]} cells)" for i in np.argsort(-counts, kind="stable")[:10]]
    raise UserError(
        "Several values could be the control" if len(names) > 1 else "No control cells",
        offenders=sorted(names) if len(names) > 1 else [told] if told else [],
        expected="one value that means no perturbation; the most frequent are " + ", ".join(frequent),
        mend="name it with --control VALUE",
    )


def read_doses(
    obs: pd.DataFrame, told: str | None, notes: list[str]
) -> tuple[list[str], Int[np.ndarray, "cells"]]:
    """Distinct dose texts and the code of each cell; one empty text where there are no doses."""
    names = [_require(obs, told, "--dose-key")] if told else [n for n in DOSE_COLUMNS if n in obs.columns]
    for name in names:
        column = obs[name]
        text = column.map(lambda x: f"{x:g}") if pd.api.types.is_float_dtype(column) else column.astype(str)
        codes, values = pd.factorize(text.where(column.notna(), ""), sort=True)
        texts = ["" if str(value).strip() in ("nan", "None") else str(value).strip() for value in values]
        if told or _tells_doses(texts):
            if not told:
                notes.append(f"doses are read from obs[{name!r}] (or --dose-key)")
            return _with_unit(texts, obs), codes.astype(np.int64)
    return [""], np.zeros(len(obs), dtype=np.int64)


def _tells_doses(texts: list[str]) -> bool:
    """Whether a column that is called dose holds doses, and more than one."""
    matches = [AMOUNT.fullmatch(piece.strip()) for text in texts if text for piece in text.split("+")]
    return None not in matches and len({m[0] for m in matches if m and float(m["dose"]) > 0}) > 1


def _with_unit(texts: list[str], obs: pd.DataFrame) -> list[str]:
    """Append the unit that a second column declares, where it declares one for all."""
    units = set(obs["dose_unit"].dropna().astype(str)) if "dose_unit" in obs.columns else set()
    if len(units) != 1:
        return texts
    unit = units.pop()
    return ["+".join(piece + unit for piece in text.split("+")) if text else "" for text in texts]


def read_covariates(
    obs: pd.DataFrame, told: tuple[str, ...] | None, notes: list[str]
) -> tuple[tuple[Covariate, ...], list[Int[np.ndarray, "cells"]]]:
    """Levels of each covariate and the codes of the cells."""
    if told is not None:
        names = [_require(obs, name, "--covariate-keys") for name in told]
    else:
        names = [name for name in CONTEXT_COLUMNS if name in obs.columns and obs[name].nunique() > 1][:1]
        notes.extend(f"contexts are read from obs[{name!r}] (or --covariate-keys)" for name in names)
    found = [(name, *_levels(obs, name)) for name in names]
    return tuple(Covariate(name, tuple(texts)) for name, texts, _ in found), [codes for *_, codes in found]
