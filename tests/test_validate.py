"""How models are judged, and choose, on validation conditions."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import pytest
import torch

from knockon import validate
from knockon.data import simulate, splits
from knockon.data.screen import Screen
from knockon.data.splits import Split
from knockon.model import Model, ModelConfig, Training
from knockon.models import latent_additive, scdfm
from knockon.models._pulled import PulledModel
from knockon.types import CellSets

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def screen() -> Screen:
    return Screen.from_anndata(simulate.simulate(simulate.tiny()))


@pytest.fixture(scope="module")
def split(screen: Screen) -> Split:
    return splits.additive(screen)


def fitted(config: ModelConfig, screen: Screen, split: Split) -> Model:
    train = screen.select((*split.train, *screen.controls))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = config.build(screen.spec())
    model.fit_statistics(train)
    return model


def test_a_validation_by_the_loss_knows_no_training(screen: Screen, split: Split) -> None:
    model = fitted(latent_additive.Config(dropout=0.5), screen, split)
    training = Training(sets=2, cells=8, validate_by="loss")
    score = validate.score_by(screen, model.spec, split.validation, training, CPU)
    first = score(model.train())
    assert score(model.eval()) == first


def test_a_weight_is_chosen_again_to_the_same_bits_and_from_validation_conditions_only(
    screen: Screen, split: Split
) -> None:
    model, chosen = fitted(scdfm.small().model, screen, split), []
    assert isinstance(model, PulledModel)
    for one in (split, split, replace(split, validation=())):
        model.weight.fill_(1.0)
        validate.finish(model, screen, one, 0)
        chosen.append(float(model.weight))
    assert chosen[0] == chosen[1]
    assert chosen[2] == 1.0


def test_what_is_generated_is_corrected_by_training_conditions_only(
    screen: Screen, split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seen = fitted(latent_additive.Config(), screen, split), []

    def note(sets: Iterable[CellSets] | Sequence[CellSets], seed: int) -> None:
        seen.append(list(sets))

    monkeypatch.setattr(model, "correct", note)
    monkeypatch.setattr(model, "choose", note)
    validate.finish(model, screen, split, 0)
    for found, labels in zip(seen, (split.train, split.validation), strict=True):
        expected = model.spec.encode(labels)
        assert len(found) == min(len(labels), validate.CORRECTED)
        for one in found:
            assert one.condition.same_treatment(expected).any()
            assert one.control.shape == one.target.shape
    validate.finish(model, screen, replace(split, train=()), 0)
    assert len(seen[2]) == len(screen.controls)
    assert not seen[2][0].condition.perturbation.any()
