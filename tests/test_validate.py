"""How models are judged, and choose, on validation conditions."""

import pytest
import torch

from knockon import validate
from knockon.data import simulate, splits
from knockon.data.screen import Screen
from knockon.data.splits import Split
from knockon.model import Model, ModelConfig, Training
from knockon.models import latent_additive, scdfm
from knockon.models._pulled import PulledModel

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
    for labels in (split.validation, split.validation, ()):
        model.weight.fill_(1.0)
        validate.choose(model, screen, labels, 0)
        chosen.append(float(model.weight))
    assert chosen[0] == chosen[1]
    assert chosen[2] == 1.0
