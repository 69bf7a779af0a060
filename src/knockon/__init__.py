"""Predict how a population of cells responds to a perturbation that nobody has measured."""

from knockon import models
from knockon.compare import Comparison, compare
from knockon.data import splits
from knockon.data.build import prepare
from knockon.data.screen import Screen
from knockon.evaluate.scores import evaluate
from knockon.ranking.rank import rank
from knockon.run import Run
from knockon.train import Options, train
from knockon.types import Label, UserError

__all__ = [
    "Comparison",
    "Label",
    "Options",
    "Run",
    "Screen",
    "UserError",
    "compare",
    "evaluate",
    "models",
    "prepare",
    "rank",
    "splits",
    "train",
]
