"""How people write what was done to a cell, brought into one canonical form.

``A+ctrl``, ``ctrl+A`` and ``A`` are one condition, so are ``A+B``, ``B+A`` and ``A_B``, and a dose
travels with its drug whatever the order.
"""

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from knockon.types import Label, Units, UserError

MICROMOLAR = {"nM": 1e-3, "uM": 1.0, "µM": 1.0, "μM": 1.0, "mM": 1e3, "M": 1e6}

_CONTROL = re.compile(
    r"controls?|ctrl|ctr|non.?target(ing)?|no.?target|safe.?targeting|ntc?|neg(ative)?.?(ctrl|control)\d*"
    r"|scrambled?|dmso(.tf)?|vehicle|mock|pbs|unperturbed|untreated|unstimulated",
    re.IGNORECASE,
)
_PLUS = re.compile(r"(?<!\()\+(?!\))")  # the plus of "(+)-JQ1" joins nothing
_DOSE = re.compile(r"(?P<name>.+)@(?P<dose>\d*\.?\d+(?:[eE]-?\d+)?)\s*(?P<unit>[A-Za-zµμ%/]*)")
AMOUNT = re.compile(r"(?P<dose>\d*\.?\d+(?:[eE][+-]?\d+)?)\s*(?P<unit>[A-Za-zµμ%/]*)")
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
    unlabelled: bool = False
    """The file says nothing of perturbations: all its cells are control cells, to pretrain on."""


@dataclass(frozen=True)
class Piece:
    """One perturbation of a combination, as it was written; a dose of None was not written."""

    name: str
    dose: float | None = None
    unit: str | None = None

    def __str__(self) -> str:
        return f"{self.name}@{self.dose:g}" if self.dose else self.name


def split_text(text: str, known: Collection[str] = ()) -> list[Piece]:
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
        return [Piece(m["name"], _round(float(m["dose"])), m["unit"] or None) for m in tuples]
    if text in known:
        return [Piece(text)]
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


def _part(text: str) -> Piece:
    match = _DOSE.fullmatch(text)
    if match is None:
        return Piece(text)
    return Piece(match["name"].strip(), _round(float(match["dose"])), match["unit"] or None)


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
    return label_of(parts, covariates)


def label_of(parts: Sequence[Piece], covariates: Sequence[str] = ()) -> Label:
    """Bring parts into the canonical form; two guides of one gene are one perturbation."""
    distinct = {(part.name, part.dose or 0.0) for part in parts}
    return Label.of([name for name, _ in distinct], [dose for _, dose in distinct], covariates)


def read_parts(
    text: str, dose: str = "", *, known: Collection[str], controls: Collection[str]
) -> tuple[list[Piece], set[str | None]]:
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
        raise UserError(
            "An empty condition",
            offenders=[repr(text)],
            expected="names joined with +",
            mend="complete the name, or remove its cells",
        )
    alone = len(parts) == 1
    kept = [
        _in_micromolar(part)
        for part in parts
        if part.name not in controls and (alone or part.name in known or not is_control_name(part.name))
    ]
    return kept, {part.unit for part in kept if part.dose}


def _with_doses(parts: list[Piece], dose: str, text: str) -> list[Piece]:
    """Give each part its own dose, before anything is sorted."""
    if not dose or any(part.dose is not None for part in parts):
        return parts
    matches = [AMOUNT.fullmatch(piece.strip()) for piece in dose.split("+")]
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
        Piece(part.name, _round(float(m["dose"])), m["unit"] or None)
        for part, m in zip(parts, matches, strict=True)
        if m
    ]


def _in_micromolar(part: Piece) -> Piece:
    if part.dose is None or part.unit not in MICROMOLAR:
        return part
    return Piece(part.name, _round(part.dose * MICROMOLAR[part.unit]), "uM")


def names_of(texts: Iterable[str], genes: frozenset[str]) -> frozenset[str]:
    """Names of genes and of single perturbations, as far as they cannot be combinations themselves."""
    parts = {part.name for text in texts for part in split_text(text, genes)}
    names = set(genes)
    for name in sorted(parts, key=lambda name: name.count("_")):  # what could be a part comes first
        if name in genes or not (is_control_name(name) or len(_underscore(name, names)) > 1):
            names.add(name)
    return frozenset(names)
