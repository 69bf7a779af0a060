"""What every model must do, whatever it is. Models declare nothing; the exceptions are listed here."""

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch
from torch import Tensor

from knockon import models
from knockon.data.conventions import Columns
from knockon.data.screen import Screen
from knockon.data.simulate import Simulation, simulate, tiny
from knockon.model import Model, Recipe, fill, load_weights, model_class, save_weights
from knockon.types import CellSets, Condition, Label, Noise, Spec

NEVER_LEARNS = {"no_effect", "scldm_vae"}
"""Models that predict control cells, so they are the floor themselves."""
LATER_STAGES = {"scldm"}
"""Models that learn only after an earlier stage, which their own tests train."""
ANSWERS_ALL = {"no_effect", "mean_shift", "scldm_vae"}
"""Models whose prediction does not need to know the perturbation."""
STEPS = 50
"""Updates after which a model must have learned something of the tiny screen."""

UNSEEN = "unseen"
SETS, CELLS = 3, 4


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model fitted to a screen, its parameters as they were drawn."""

    name: str
    screen: Screen
    model: Model

    def labels(self, number: int) -> list[Label]:
        """The most complicated conditions: most perturbations, largest doses."""
        return sorted(self.screen.conditions, key=lambda x: (len(x.perturbations), max(x.doses)))[-number:]

    def condition(self, number: int = SETS) -> Condition:
        return self.model.spec.encode(self.labels(number))

    def control(self, number: int = SETS, cells: int = CELLS) -> Tensor:
        """Other control cells for each condition."""
        rows = [self.screen.control_rows(label) for label in self.labels(number)]
        blocks = [self.screen.gather(r[i * cells :][:cells]) for i, r in enumerate(rows)]
        return torch.from_numpy(np.stack(blocks))

    def sample(self, control: Tensor, condition: Condition, seed: int = 0) -> Tensor:
        with torch.no_grad():
            return self.model.eval().sample(control, condition, Noise(torch.Generator().manual_seed(seed)))

    def batch(self, draw: np.random.Generator, sets: int = 4, cells: int = 8) -> CellSets:
        chosen = [self.screen.conditions[i] for i in draw.integers(len(self.screen.conditions), size=sets)]
        target = [self.screen.gather(draw.choice(self.screen.rows[label], cells)) for label in chosen]
        control = [self.screen.gather(draw.choice(self.screen.control_rows(c), cells)) for c in chosen]
        return CellSets(
            target=torch.from_numpy(np.stack(target)),
            control=torch.from_numpy(np.stack(control)),
            condition=self.model.spec.encode(chosen),
        )


def drugs() -> Simulation:
    """Doses, cell types and perturbations that are no genes, which therefore need vectors."""
    return Simulation(
        cells=600, genes=40, singles=0, doubles=0, drugs=3, doses=(0.1, 1.0), cell_types=2, truth_cells=64
    )


@pytest.fixture(scope="session")
def screens() -> dict[tuple[str, str], Screen]:
    """Each simulated screen in each of the units that a model can ask for."""
    made = {}
    for config in (tiny, drugs):
        adata = simulate(config())
        made[config.__name__, "log1p"] = Screen.from_anndata(adata)
        made[config.__name__, "counts"] = Screen.from_anndata(adata, columns=Columns(layer="counts"))
    return made


@pytest.fixture(scope="session")
def fit(screens: dict[tuple[str, str], Screen]) -> Callable[[str, str], Subject]:
    """Fit a model once per session; whoever trains it copies it first."""
    fitted: dict[tuple[str, str], Subject] = {}

    def fit(name: str, kind: str) -> Subject:
        if (name, kind) not in fitted:
            config = recipe(name).model
            screen = screens[kind, model_class(config).units]
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model = config.build(spec_of(screen))
            model.fit_statistics(screen)
            fitted[name, kind] = Subject(name=name, screen=screen, model=model)
        return fitted[name, kind]

    return fit


def recipe(name: str) -> Recipe:
    return models.recipe(name, "small" if "small" in models.presets(name) else "default")


def spec_of(screen: Screen) -> Spec:
    """Perturbations that are no genes of the panel have vectors, as they must."""
    names = sorted({name for label in screen.conditions for name in label.perturbations})
    if set(names) <= set(screen.genes):
        return screen.spec()
    draw = np.random.default_rng(0)
    return screen.spec({name: draw.normal(size=6).astype(np.float32) for name in names})


@pytest.fixture(params=models.names())
def tiny_subject(request: pytest.FixtureRequest, fit: Callable[[str, str], Subject]) -> Subject:
    return fit(request.param, "tiny")


@pytest.fixture(params=["tiny", "drugs"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=models.names())
def subject(request: pytest.FixtureRequest, kind: str, fit: Callable[[str, str], Subject]) -> Subject:
    return fit(request.param, kind)


@pytest.fixture
def same_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every draw the same, so that what differs between sets is not the noise."""

    def constant(value: float) -> Callable[..., Tensor]:
        def draw(*size: object, **options: object) -> Tensor:
            shape = size[0] if isinstance(size[0], tuple | list | torch.Size) else size
            wanted = {key: options[key] for key in ("dtype", "device") if options.get(key) is not None}
            return torch.full(tuple(shape), value, **wanted)

        return draw

    monkeypatch.setattr(torch, "rand", constant(0.3))
    monkeypatch.setattr(torch, "randn", constant(0.3))
    monkeypatch.setattr(torch, "rand_like", lambda x, **_: torch.full_like(x, 0.3))
    monkeypatch.setattr(torch, "randn_like", lambda x, **_: torch.full_like(x, 0.3))
    monkeypatch.setattr(torch, "randperm", lambda n, **_: torch.arange(n))
    monkeypatch.setattr(torch, "poisson", lambda rate, **_: rate.round())
    monkeypatch.setattr(torch, "_standard_gamma", lambda shape, **_: shape)
    monkeypatch.setattr(torch, "binomial", lambda count, prob, **_: (count * prob).round())


def reorder(condition: Condition, order: list[int]) -> Condition:
    return condition[torch.tensor(order)]


def train(subject: Subject, steps: int) -> tuple[Model, dict[str, float]]:
    """Train a copy; also the largest gradient that each parameter has seen."""
    model = copy.deepcopy(subject.model).train()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    largest = dict.fromkeys(parameters, 0.0)
    draw, rng = np.random.default_rng(0), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(parameters.values(), lr=3e-3) if parameters else None
    trained = Subject(name=subject.name, screen=subject.screen, model=model)
    for _ in range(steps if optimizer else 0):
        optimizer.zero_grad()
        model.loss(trained.batch(draw), rng)["total"].backward()
        for name, parameter in parameters.items():
            if parameter.grad is not None:
                largest[name] = max(largest[name], parameter.grad.abs().max().item())
        optimizer.step()
    return model.eval(), largest


def test_cells_have_the_shape_and_the_units_of_the_control_cells(subject: Subject) -> None:
    control = subject.control()
    cells = subject.sample(control, subject.condition())
    assert cells.shape == control.shape
    assert cells.dtype == torch.float32
    assert cells.isfinite().all()
    assert (cells >= 0).all()
    if subject.model.units == "counts":
        assert torch.equal(cells, cells.round())


def test_losses_are_finite_scalars_with_a_total(subject: Subject, rng: torch.Generator) -> None:
    losses = subject.model.loss(subject.batch(np.random.default_rng(0)), rng)
    assert "total" in losses
    assert all(loss.shape == () and loss.isfinite() for loss in losses.values())


def test_same_generator_same_cells_and_same_loss(tiny_subject: Subject) -> None:
    control, condition = tiny_subject.control(), tiny_subject.condition()
    assert torch.equal(tiny_subject.sample(control, condition), tiny_subject.sample(control, condition))
    batch, model = tiny_subject.batch(np.random.default_rng(0)), tiny_subject.model
    first, again = (model.loss(batch, torch.Generator().manual_seed(1)) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_global_random_state_is_left_alone(tiny_subject: Subject, rng: torch.Generator) -> None:
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    copy.deepcopy(tiny_subject.model).train().loss(tiny_subject.batch(np.random.default_rng(0)), rng)
    tiny_subject.sample(tiny_subject.control(), tiny_subject.condition())
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()  # noqa: NPY002


@pytest.mark.usefixtures("same_noise")
def test_order_and_company_of_sets_do_not_matter(subject: Subject) -> None:
    control, condition = subject.control(), subject.condition()
    order = [2, 0, 1]
    cells = subject.sample(control, condition)
    shuffled = subject.sample(control[order], reorder(condition, order))
    torch.testing.assert_close(shuffled, cells[order], rtol=1e-4, atol=1e-5)
    alone = subject.sample(control[1:2], reorder(condition, [1]))
    torch.testing.assert_close(alone, cells[1:2], rtol=1e-4, atol=1e-5)


def test_what_may_change_after_training_changes_no_loss(tiny_subject: Subject) -> None:
    config, model = recipe(tiny_subject.name).model, tiny_subject.model
    batch = tiny_subject.batch(np.random.default_rng(0))
    expected = model.loss(batch, torch.Generator().manual_seed(0))["total"]
    for name in config.at_generation:
        hint, value = get_type_hints(type(config))[name], getattr(config, name)
        changed = dataclasses.replace(config, **{name: another(hint, value)})
        again = copy.deepcopy(model)
        again.config = changed
        assert torch.equal(again.loss(batch, torch.Generator().manual_seed(0))["total"], expected), name
        fill(changed.build(model.spec), model.state_dict())


def another(hint: object, value: object) -> object:
    """Another value of a field."""
    if get_origin(hint) is Literal:
        return next(other for other in get_args(hint) if other != value)
    if isinstance(value, bool):
        return not value
    return value / 2 + 0.1 if isinstance(value, float) else (2.0,) if value == () else value + 1


def test_order_of_slots_does_not_matter(subject: Subject) -> None:
    control, condition = subject.control(), subject.condition()
    flipped = Condition(
        perturbation=condition.perturbation.flip(1),
        dose=condition.dose.flip(1),
        covariates=condition.covariates,
    )
    expected = subject.sample(control, condition)
    torch.testing.assert_close(subject.sample(control, flipped), expected, rtol=1e-4, atol=1e-5)


def test_padding_slots_change_nothing(subject: Subject) -> None:
    control, condition = subject.control(), subject.condition()
    pad = torch.nn.functional.pad
    padded = Condition(
        perturbation=pad(condition.perturbation, (0, 2)),
        dose=pad(condition.dose, (0, 2)),
        covariates=condition.covariates,
    )
    expected = subject.sample(control, condition)
    torch.testing.assert_close(subject.sample(control, padded), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(subject.model.knows(padded), subject.model.knows(condition))


def test_works_with_one_set_and_one_cell(subject: Subject, rng: torch.Generator) -> None:
    control = subject.control(1, 1)
    assert subject.sample(control, subject.condition(1)).shape == control.shape
    batch = subject.batch(np.random.default_rng(0), sets=1, cells=1)
    assert subject.model.loss(batch, rng)["total"].isfinite()


def test_knows_what_it_was_trained_on(subject: Subject) -> None:
    assert subject.model.knows(subject.model.spec.encode(subject.screen.conditions)).all()


def test_refuses_a_perturbation_without_any_basis(tiny_subject: Subject) -> None:
    known, screen = tiny_subject.labels(1)[0], tiny_subject.screen
    planted = [Label.of([UNSEEN]), Label.of([UNSEEN, known.perturbations[0]])]
    model = recipe(tiny_subject.name).model.build(screen_with(screen, planted[0]).spec())
    model.fit_statistics(screen)
    answers = model.knows(model.spec.encode([*planted, known])).tolist()
    assert answers == [tiny_subject.name in ANSWERS_ALL] * 2 + [True]


def screen_with(screen: Screen, label: Label) -> Screen:
    """A screen whose names include a condition that none of its cells has."""
    return dataclasses.replace(screen, vocabulary=(*screen.vocabulary, label))


def test_gradients_reach_every_parameter(subject: Subject) -> None:
    _, largest = train(subject, 8)  # gates that start at zero open one after the other; hiding is rare
    assert not [name for name, size in largest.items() if not size]


def test_learns_better_than_no_effect(tiny_subject: Subject) -> None:
    if tiny_subject.name in NEVER_LEARNS | LATER_STAGES:
        pytest.skip("is the floor itself, or has its own test")
    model, _ = train(tiny_subject, STEPS)
    means, errors = tiny_subject.screen.means(), []
    labels = tiny_subject.screen.conditions[::2]
    rows = tiny_subject.screen.control_rows(labels[0])[:12]
    control = torch.from_numpy(tiny_subject.screen.gather(rows)).expand(len(labels), -1, -1)
    with torch.no_grad():
        cells = model.sample(control, model.spec.encode(labels), Noise(torch.Generator().manual_seed(0)))
    for predicted in (cells, control):
        change = predicted.mean(1, dtype=torch.float64).numpy() - np.stack([means[x] for x in labels])
        errors.append(np.square(change).mean())
    assert errors[0] < 0.9 * errors[1]


def test_survives_saving_and_loading_to_the_bit(subject: Subject, tmp_path: Path) -> None:
    save_weights(subject.model, tmp_path / "weights.safetensors")
    restored = recipe(subject.name).model.build(subject.model.spec)
    load_weights(restored, tmp_path / "weights.safetensors")
    for name, tensor in subject.model.state_dict().items():
        assert torch.equal(restored.state_dict()[name], tensor), name
    again = Subject(name=subject.name, screen=subject.screen, model=restored)
    control, condition = subject.control(), subject.condition()
    assert torch.equal(again.sample(control, condition), subject.sample(control, condition))
