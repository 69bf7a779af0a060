"""How screens are written down: which column says what was done to a cell, and how to read it.

Every spelling is parsed once per distinct value into a canonical ``Label``, never per cell:
``A+ctrl``, ``ctrl+A`` and ``A`` are one condition, so are ``A+B``, ``B+A`` and ``A_B``, and a dose
travels with its drug whatever the order.
"""

import difflib
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Bool, Int

from knockon.types import Covariate, Label, Units, UserError

PERTURBATION_COLUMNS = ("perturbation", "condition", "target_gene", "guide_merged", "gene_target", "drug")
CONTROL_COLUMNS = ("control", "is_control")
CONTEXT_COLUMNS = ("cell_type", "celltype", "cell_line")
DOSE_COLUMNS = ("dose_val", "dose_value", "dosage", "dose")
MICROMOLAR = {"nM": 1e-3, "uM": 1.0, "µM": 1.0, "μM": 1.0, "mM": 1e3, "M": 1e6}

_CONTROL = re.compile(
    r"controls?|ctrl|ctr|non.?target(ing)?|no.?target|safe.?targeting|ntc?|neg(ative)?.?(ctrl|control)\d*"
    r"|scrambled?|dmso(.tf)?|vehicle|mock|pbs|unperturbed|untreated|unstimulated",
    re.IGNORECASE,
)
_PLUS = re.compile(r"(?<!\()\+(?!\))")  # the plus of "(+)-JQ1" joins nothing
_DOSE = re.compile(r"(?P<name>.+)@(?P<dose>\d*\.?\d+(?:[eE]-?\d+)?)\s*(?P<unit>[A-Za-zµμ%/]*)")
_AMOUNT = re.compile(r"(?P<dose>\d*\.?\d+(?:[eE][+-]?\d+)?)\s*(?P<unit>[A-Za-zµμ%/]*)")
_TUPLE = re.compile(
    r"\(\s*['\"](?P<name>.+?)['\"]\s*,\s*(?P<dose>[\d.eE-]+)\s*,\s*['\"](?P<unit>.*?)['\"]\s*\)"
)


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which columns say what; without them the common conventions are recognized, and said so."""

    perturbation_key: str | None = None
    """Column of ``obs`` with what was done to each cell."""
    control: str | None = None
    """Value of that column that means no perturbation."""
    covariate_keys: tuple[str, ...] | None = None
    """Columns of ``obs`` with the context of each cell, such as its cell type; empty for none."""
    dose_key: str | None = None
    """Column of ``obs`` with the dose, ``0.1+1`` for combinations."""
    layer: str | None = None
    """Layer with the values; ``X`` without it."""
    units: Units | None = None
    """Scale that the values must have; recognized without it."""


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
        Each perturbation as the file first wrote its names, joined with ``+``, without controls:
        the published additive split depends on it.
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


@dataclass(frozen=True)
class Part:
    """One perturbation of a combination, as it was written; a dose of None was not written."""

    name: str
    dose: float | None = None
    unit: str | None = None


def split_text(text: str, known: Collection[str] = ()) -> list[Part]:
    """Take a combination apart, in the order of the text; an empty text has no parts.

    ``_`` separates only where both sides are known, since names may contain it.

    Parameters
    ----------
    text
        Such as ``A+B``, ``A_B``, ``drugA@10uM+drugB@0.5uM`` or ``[('drugA', 10.0, 'uM')]``.
    known
        Names of genes and of single perturbations; never of the control.
    """
    text = re.sub(r"(@[\d.]+[eE])\+", r"\1", str(text).strip())  # the plus of 1e+06 joins nothing
    tuples = list(_TUPLE.finditer(text)) if text.startswith("[") else []
    if tuples:
        return [Part(m["name"], _round(float(m["dose"])), m["unit"] or None) for m in tuples]
    if text in known:
        return [Part(text)]
    pieces = [piece.strip() for piece in _PLUS.split(text)]
    return [_part(name) for piece in pieces for name in _underscore(piece, known)]


def _underscore(text: str, known: Collection[str]) -> list[str]:
    if text in known or "_" not in text:
        return [text]
    cuts = [
        [text[:i], text[i + 1 :]]
        for i, letter in enumerate(text)
        if letter == "_" and all(side in known or is_control_name(side) for side in (text[:i], text[i + 1 :]))
    ]
    return cuts[0] if len(cuts) == 1 else [text]


def _part(text: str) -> Part:
    match = _DOSE.fullmatch(text)
    if match is None:
        return Part(text)
    return Part(match["name"].strip(), _round(float(match["dose"])), match["unit"] or None)


def _round(dose: float) -> float:
    """Keep the digits that a label prints, so that a dose survives being written and read."""
    return float(f"{dose:g}")


def is_control_name(name: str) -> bool:
    """Whether a name conventionally means no perturbation."""
    return _CONTROL.fullmatch(name) is not None


def parse(text: str, *, known: Collection[str] = (), control: str | None = None) -> Label:
    """Read one condition as a person writes it, in any order and spelling.

    Parameters
    ----------
    text
        Such as ``B+A``, ``A+ctrl``, ``drugA@10nM``, or with its context ``A+B | B cells``.
    known
        Names of genes and single perturbations, by which ``A_B`` is told from a name.
    control
        A further name of the control.

    Raises
    ------
    UserError
        If a part of it is empty.
    """
    perturbation, *covariates = (piece.strip() for piece in text.split(" | "))
    controls = frozenset({control} if control else ())
    if perturbation not in known and is_control_name(perturbation):
        return Label(covariates=tuple(covariates))
    parts, _ = read_parts(perturbation, known=known, controls=controls)
    return _label(parts, covariates)


def _label(parts: Sequence[Part], covariates: Sequence[str] = ()) -> Label:
    distinct = {(part.name, part.dose or 0.0) for part in parts}  # two guides of one gene are one
    return Label.of([name for name, _ in distinct], [dose for _, dose in distinct], covariates)


def read_parts(
    text: str, dose: str = "", *, known: Collection[str], controls: Collection[str]
) -> tuple[list[Part], set[str | None]]:
    """Perturbations of a condition in the order of the text, without controls, and their dose units.

    Doses in nM, mM or M become uM.

    Parameters
    ----------
    text, dose
        What two columns say: ``drugA+ctrl`` and ``0.1+1``.
    known, controls
        Names of genes and single perturbations; names of the control.
    """
    if text in controls:
        return [], set()
    parts = _with_doses(split_text(text, {*known, *controls}), dose, text)
    if any(not part.name for part in parts):
        raise UserError("An empty condition", offenders=[repr(text)], expected="names joined with +")
    alone = len(parts) == 1
    kept = [
        _in_micromolar(part)
        for part in parts
        if part.name not in controls and (alone or part.name in known or not is_control_name(part.name))
    ]
    return kept, {part.unit for part in kept if part.dose}


def _with_doses(parts: list[Part], dose: str, text: str) -> list[Part]:
    """Give each part its own dose, before anything is sorted."""
    if not dose or any(part.dose is not None for part in parts):
        return parts
    matches = [_AMOUNT.fullmatch(piece.strip()) for piece in dose.split("+")]
    if len(matches) == 1:
        matches *= len(parts)
    if None in matches or len(matches) != len(parts):
        raise UserError(
            "A dose that cannot be read",
            offenders=[f"{dose!r} for {text!r}"],
            expected="one number for each perturbation, joined with +",
            mend="correct the column, or name another with --dose-key",
        )
    return [
        Part(part.name, _round(float(m["dose"])), m["unit"] or None)
        for part, m in zip(parts, matches, strict=True)
        if m
    ]


def _in_micromolar(part: Part) -> Part:
    if part.dose is None or part.unit not in MICROMOLAR:
        return part
    return Part(part.name, _round(part.dose * MICROMOLAR[part.unit]), "uM")


def recognize(obs: pd.DataFrame, genes: Collection[str], columns: Columns) -> Design:
    """Find and parse what was done to every cell.

    Raises
    ------
    UserError
        If a column is missing or ambiguous, there is no control, or a value cannot be read.
    """
    notes: list[str] = []
    genes = frozenset(genes)
    key = _perturbation_column(obs, columns.perturbation_key, notes)
    texts, text_codes = _levels(obs, key)
    flags = None if columns.control else _control_flags(obs, notes)
    controls = _controls(texts, text_codes, flags, genes=genes, told=columns.control, notes=notes)
    doses, dose_codes = _doses(obs, columns.dose_key, notes)
    known = _names(texts, genes) - (controls - genes)
    pairs, codes = _distinct(text_codes, dose_codes)
    parsed = [read_parts(texts[t], doses[d], known=known, controls=controls) for t, d in pairs]
    covariates, covariate_codes = _covariates(obs, columns.covariate_keys, notes)
    rows, codes = _distinct(codes, *covariate_codes)
    found = [
        _label(parsed[pair][0], [c.levels[i] for c, i in zip(covariates, levels, strict=True)])
        for pair, *levels in rows
    ]
    labels = tuple(sorted(set(found), key=lambda label: (not label.is_control, label)))
    place = {label: i for i, label in enumerate(labels)}
    return Design(
        labels=labels,
        codes=np.array([place[label] for label in found], dtype=np.int64)[codes],
        covariates=covariates,
        spellings=_spellings(parts for parts, _ in parsed),
        dose_unit=_one_unit({unit for _, units in parsed for unit in units}),
        notes=tuple(notes),
    )


def _names(texts: Iterable[str], genes: frozenset[str]) -> frozenset[str]:
    """Names of genes and of single perturbations, as far as they cannot be combinations themselves."""
    parts = {part.name for text in texts for part in split_text(text, genes)}
    parts = {name for name in parts if name in genes or not is_control_name(name)}
    plain = genes | {name for name in parts if "_" not in name}
    return plain | {name for name in parts if len(_underscore(name, plain)) == 1}


def _spellings(conditions: Iterable[list[Part]]) -> dict[Label, str]:
    """How the file writes each combination; where it writes several ways, the first of them sorted."""
    spelled = sorted((_label(parts), "+".join(part.name for part in parts)) for parts in conditions)
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


def _perturbation_column(obs: pd.DataFrame, told: str | None, notes: list[str]) -> str:
    if told is not None:
        return _require(obs, told, "--perturbation-key")
    for name in PERTURBATION_COLUMNS:
        if name in obs.columns:
            notes.append(f"perturbations are read from obs[{name!r}] (or --perturbation-key)")
            return name
    raise UserError(
        "No column of obs says what was done to the cells",
        offenders=[str(column) for column in obs.columns],
        expected="one of " + ", ".join(PERTURBATION_COLUMNS),
        mend="name it with --perturbation-key COLUMN",
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


def _doses(
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
    matches = [_AMOUNT.fullmatch(piece.strip()) for text in texts if text for piece in text.split("+")]
    return None not in matches and len({m[0] for m in matches if m and float(m["dose"]) > 0}) > 1


def _with_unit(texts: list[str], obs: pd.DataFrame) -> list[str]:
    """Append the unit that a second column declares, where it declares one for all."""
    units = set(obs["dose_unit"].dropna().astype(str)) if "dose_unit" in obs.columns else set()
    if len(units) != 1:
        return texts
    unit = units.pop()
    return ["+".join(piece + unit for piece in text.split("+")) if text else "" for text in texts]


def _covariates(
    obs: pd.DataFrame, told: tuple[str, ...] | None, notes: list[str]
) -> tuple[tuple[Covariate, ...], list[Int[np.ndarray, "cells"]]]:
    if told is not None:
        names = [_require(obs, name, "--covariate-keys") for name in told]
    else:
        names = [name for name in CONTEXT_COLUMNS if name in obs.columns and obs[name].nunique() > 1][:1]
        notes.extend(f"contexts are read from obs[{name!r}] (or --covariate-keys)" for name in names)
    found = [(name, *_levels(obs, name)) for name in names]
    return tuple(Covariate(name, tuple(texts)) for name, texts, _ in found), [codes for *_, codes in found]
