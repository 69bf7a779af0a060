"""The toy screen and its predictions in the words of knockon."""

from functools import cache

import anndata
import pandas as pd

from knockon.data.conventions import Columns
from knockon.data.screen import Screen
from knockon.data.splits import Split
from knockon.evaluate import suites
from knockon.evaluate.pairs import Pairs
from knockon.evaluate.truth import Truth

from .toy import TARGETS, TRAINED, Toy, log1p, toy


@cache
def world() -> Toy:
    """Draw it once."""
    return toy()


def pairs(prediction: str, *, counts: bool = False) -> Pairs:
    """A prediction beside the truth, in log1p or in counts."""
    found = world().predictions[prediction]
    return Pairs.align(found if counts else log1p(found), reality(counts=counts))


@cache
def reality(*, counts: bool = False) -> Truth:
    """The truth, in log1p or in counts."""
    return truth(world().real if counts else log1p(world().real))


def lonely(*, counts: bool = False) -> Pairs:
    """One condition alone."""
    found = world().predictions["half"]
    whole = reality(counts=counts)
    return Pairs.align(found if counts else log1p(found), whole.select(whole.labels[:1]))


def truth(adata: anndata.AnnData) -> Truth:
    """Test the twelve, train on the other one."""
    columns = Columns(perturbation_key="perturbation", control="control", covariate_keys=())
    screen = Screen.from_anndata(adata, columns=columns)
    return Truth.of(screen, split_of(screen))


def split_of(screen: Screen) -> Split:
    """Hold out the twelve."""
    train = tuple(label for label in screen.conditions if label.perturbation == TRAINED)
    test = tuple(label for label in screen.conditions if label.perturbation in TARGETS)
    return Split(kind="custom", seed=0, train=train, validation=(), test=test, digest=screen.digest)


def scored(pairs: Pairs, suite: str) -> pd.DataFrame:
    """Scores of a suite, conditions x metrics, without its prefix; those of all conditions in every row."""
    found = suites.score(pairs, suite)
    found["metric"] = found["metric"].str.removeprefix(f"{suite}:")
    wide = found.pivot(index="condition", columns="metric", values="value")
    if suites.ALL in wide.index:
        wide = wide.fillna(wide.loc[suites.ALL]).drop(index=suites.ALL)
    return wide
