from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import knockon as ko
from knockon import models, validate
from knockon.data import simulate, splits
from knockon.data.conventions import Columns
from knockon.data.screen import Screen
from knockon.files import digest
from knockon.model import Model, Recipe, fill
from knockon.models import scldm, scldm_vae
from knockon.models.scldm import LatentFlow
from knockon.models.scldm_vae import SetAutoencoder
from knockon.record import WEIGHTS
from knockon.run import Run
from knockon.train import Options
from knockon.types import CellSets, Condition, Covariate, Label, Noise, Spec, UserError

SPEC = Spec(
    genes=tuple(f"g{i}" for i in range(12)),
    perturbations=("A", "B"),
    covariates=(Covariate("type", ("x", "y", "z")),),
    units="counts",
)
CONDITION = Condition(
    perturbation=torch.tensor([[1], [2]]), dose=torch.zeros(2, 1), covariates=torch.tensor([[0], [2]])
)
BOTH = torch.ones(2, 2, dtype=torch.bool)


def build(*, lively: bool = True, **changes: object) -> LatentFlow:
    torch.manual_seed(0)
    model = replace(scldm.small().model, **({"pulled": False} | changes)).build(SPEC)
    if lively:
        for parameter in model.network.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        torch.nn.init.normal_(model.conditions.hidden)
    return model.eval()


@pytest.fixture
def z(rng):
    return torch.randn(2, 5, 4, 8, generator=rng)


@pytest.fixture(scope="module")
def screen() -> Screen:
    return Screen.from_anndata(simulate.simulate(simulate.tiny()), columns=Columns(layer="counts"))


@pytest.fixture(scope="module")
def run(screen: Screen, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Both stages, one after the other."""
    recipe = scldm.small()
    config = replace(recipe.model, stage_one=replace(recipe.model.stage_one, steps=30))
    recipe = Recipe(model=config, train=replace(recipe.train, steps=40))
    return ko.train(recipe, screen, splits.additive(screen), out=tmp_path_factory.mktemp("run"))


def labels(classes: tuple[int, ...]) -> Spec:
    names = [tuple(map(str, range(n))) for n in classes]
    return replace(
        SPEC,
        perturbations=names[0][1:],  # nothing is one of the released labels
        covariates=tuple(Covariate(f"c{i}", levels) for i, levels in enumerate(names[1:])),
    )


def test_parameter_counts():
    """[scldm, section 2.1], without the autoencoder and the fixed table of positions."""
    first = replace(scldm_vae.paper().model, latents=128, latent_width=16)
    config = replace(scldm.paper().model, autoencoder=first)
    for classes, wanted in (((91, 18), 9.80), ((2024, 4), 10.29)):
        with torch.device("meta"):
            model = LatentFlow(config, labels(classes))
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        positions = 128 * 256
        assert round((trained + positions) / 1e6, 2) == wanted


@torch.no_grad()
def test_guidance_identities(z):
    t = torch.tensor(0.3)

    def close(one, two):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)

    def velocity(given=BOTH, **changes):
        return build(**changes).field(CONDITION, given)(z, t)

    all_known, nothing = velocity(), velocity(given=~BOTH)
    only = [velocity(given=BOTH & torch.tensor(mask)) for mask in ((True, False), (False, True))]
    close(velocity(weights=(1.0, 1.0)), all_known)
    close(velocity(weights=(0.0, 0.0)), nothing)
    close(velocity(weights=(2.0, 4.0)), nothing + 3 * (all_known - nothing))
    added = velocity(guidance="additive", weights=(2.0, 4.0))
    close(added, nothing + 2 * (only[0] - nothing) + 4 * (only[1] - nothing))
    close(velocity(guidance="additive", weights=(1.0, 0.0)), only[0])
    open_class = velocity(given=BOTH & torch.tensor([True, False]), guidance="additive", weights=(2.0, 4.0))
    close(open_class, nothing + 2 * (only[0] - nothing))
    open_class = velocity(given=BOTH & torch.tensor([True, False]), weights=(2.0, 4.0))
    close(open_class, nothing + 2 * (only[0] - nothing))


@pytest.mark.parametrize(
    ("changes", "evaluations"),
    [({}, 1), ({"weights": (2.0, 2.0)}, 2), ({"weights": (0.0, 0.0)}, 1), ({"guidance": "additive"}, 3),
     ({"guidance": "additive", "weights": (1.0, 0.0)}, 1)],
    ids=str,
)  # fmt: skip
def test_passes_that_change_nothing_are_left_out(changes, evaluations):
    told, shares = build(**changes).passes(BOTH)
    assert len(told) == evaluations
    torch.testing.assert_close(shares.sum(0), torch.ones(2))


@torch.no_grad()
@pytest.mark.slow
def test_solvers_agree(z):
    fine = build(solver="rk4", steps=64).flow(z, CONDITION, BOTH)
    for solver, steps, atol in (("dopri5", 1, 1e-3), ("heun", 200, 1e-2), ("rk4_38", 64, 1e-4)):
        found = build(solver=solver, steps=steps).flow(z, CONDITION, BOTH)
        torch.testing.assert_close(found, fine, rtol=0, atol=atol * fine.abs().max().item())


def test_what_training_hides(rng):
    shape = torch.Size([50, 40])
    each = build(hide="each", hidden=0.3)._hide(shape, rng)
    assert each.float().mean((0, 1)).tolist() == pytest.approx([0.7, 0.7], abs=0.05)
    assert each.all(-1).float().mean().item() == pytest.approx(0.49, abs=0.05)
    every = build(hide="all", hidden=0.3)._hide(shape, rng)
    assert torch.equal(every[..., 0], every[..., 1])
    assert every.float().mean().item() == pytest.approx(0.7, abs=0.05)
    one = build(hide="all_but_one", guidance="additive", hidden=0.3)._hide(shape, rng)
    assert not one.all(-1).any()
    assert one.float().mean((0, 1)).tolist() == pytest.approx([0.35, 0.35], abs=0.05)
    batch = build(hide="all_but_one", guidance="additive", hidden=0.3, left_per="batch")._hide(shape, rng)
    assert batch.any((0, 1)).sum() == 1


def test_latents_made_before_give_the_same_loss(rng):
    model = build()
    cells = torch.poisson(3 * torch.rand(2, 5, 12, generator=rng), generator=rng)
    batch = CellSets(target=cells, control=cells, condition=CONDITION)
    before = replace(batch, embedded=model.embed(cells.flatten(0, 1)).unflatten(0, (2, 5)))
    losses = [model.loss(x, torch.Generator().manual_seed(1))["total"] for x in (batch, before)]
    torch.testing.assert_close(*losses)


def test_copies_do_not_count(rng):
    model = build()
    latents = torch.randn(2, 6, 32, generator=rng)
    target, real = torch.zeros(2, 6, 12), torch.tensor([[True] * 6, [True] * 2 + [False] * 4])
    other = torch.where(real[..., None], latents, 9.0)

    def loss(embedded):
        batch = CellSets(target=target, control=target, condition=CONDITION, real=real, embedded=embedded)
        return model.loss(batch, torch.Generator().manual_seed(1))["total"]

    torch.testing.assert_close(loss(latents), loss(other))


@pytest.mark.slow
def test_the_flow_learns_a_latent_distribution(rng):
    """Two conditions, each a point with noise: the generated latents find them."""
    model = build(lively=False, steps=20)
    centers = torch.randn(2, 1, 32, generator=rng)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(150):
        latents = centers + 0.1 * torch.randn(2, 32, 32, generator=rng)
        target = torch.zeros(2, 32, 12)
        batch = CellSets(target=target, control=target, condition=CONDITION, embedded=latents)
        optimizer.zero_grad()
        model.loss(batch, rng)["total"].backward()
        optimizer.step()
    with torch.no_grad():
        found = model.flow(torch.randn(2, 50, 4, 8, generator=rng), CONDITION, BOTH).flatten(2)
    distances = torch.cdist(found.mean(1), centers[:, 0])
    assert distances.diag().max() < 0.5 * distances[0, 1]


def test_stages_follow_each_other_and_the_second_predicts(run: Run, screen: Screen):
    first = Run.load(run.folder / "stage_one", screen=screen)
    assert first.record.model == "scldm_vae"
    for name, parameter in first.model.named_parameters():
        assert torch.equal(run.model.get_parameter(f"autoencoder.{name}"), parameter), name
    loaded = Run.load(run.folder, screen=screen)
    one, two = (x.predict("test", cells=16).X.toarray() for x in (run, loaded))
    assert (one == two).all()
    assert (one == one.round()).all()
    predicted = run.predict("test", cells=64)
    controls = predicted[predicted.obs["control"]]
    made = predicted[~predicted.obs["control"]]
    labels = run.split.test

    def share(x):
        return np.asarray(x).ravel() / np.asarray(x).sum()

    truth = share(np.concatenate([screen.cells_of(label) for label in labels]).sum(0))
    errors = [np.abs(share(x.X.sum(axis=0)) - truth).sum() for x in (made, controls)]
    assert errors[0] < errors[1]


class Stop(Exception):
    """What kills training in a test."""


@pytest.mark.parametrize("stage", [SetAutoencoder, LatentFlow])
@pytest.mark.slow
def test_training_stopped_in_either_stage_continues_to_the_same_bits(
    screen: Screen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: type[Model]
):
    recipe, split = scldm.small(), splits.additive(screen)
    short = {"steps": 5, "checkpoint_every": 2}
    config = replace(recipe.model, stage_one=replace(recipe.model.stage_one, **short))
    recipe = Recipe(model=config, train=replace(recipe.train, **short))
    whole = ko.train(recipe, screen, split, out=tmp_path / "whole")
    original, left = stage.loss, iter(range(3))

    def loss(self, batch, rng):
        if next(left, None) is None:
            raise Stop
        return original(self, batch, rng)

    monkeypatch.setattr(stage, "loss", loss)
    with pytest.raises(Stop):
        ko.train(recipe, screen, split, out=tmp_path / "parts")
    monkeypatch.undo()
    parts = ko.train(recipe, screen, split, out=tmp_path / "parts")
    assert digest(parts.folder / WEIGHTS) == digest(whole.folder / WEIGHTS)


def test_an_autoencoder_serves_a_second_stage(run: Run, screen: Screen, tmp_path: Path):
    recipe = scldm.small()
    config = replace(recipe.model, vae=str(run.folder / "stage_one"))
    second = ko.train(
        Recipe(model=config, train=replace(recipe.train, steps=2)),
        replace(screen, matrix=screen.matrix[:, 2:50], genes=screen.genes[2:50]),
        splits.additive(screen),
        out=tmp_path / "second",
    )
    assert not (tmp_path / "second" / "stage_one").exists()
    rows = run.model.autoencoder.counts.table.weight[3:51]
    assert torch.equal(second.model.autoencoder.counts.table.weight[1:], rows)
    assert second.model.config.autoencoder == run.model.config.autoencoder
    assert second.record.stage == digest(run.folder / "stage_one" / "run.json")


def test_a_flow_begins_with_another_only_beside_its_autoencoder(run: Run, screen: Screen, tmp_path: Path):
    recipe, split = scldm.small(), splits.additive(screen)
    with pytest.raises(UserError, match=r"--model.vae .*stage_one"):
        ko.train(recipe, screen, split, out=tmp_path / "a", start=run.folder)
    config = replace(recipe.model, vae=str(run.folder / "stage_one"))
    other = replace(config, autoencoder=replace(config.autoencoder, latents=77))
    with pytest.raises(UserError, match="autoencoder beside a finished one"):
        ko.train(Recipe(model=other, train=recipe.train), screen, split, out=tmp_path / "b")


def test_the_genes_of_the_earlier_stage_are_taken(run: Run, screen: Screen, tmp_path: Path):
    adata = simulate.simulate(simulate.tiny())
    adata.var_names = ["new", *adata.var_names[1:]]
    other = Screen.from_anndata(adata, columns=Columns(layer="counts"))
    recipe = models.recipe("scldm", "small")
    recipe = Recipe(
        model=replace(recipe.model, vae=str(run.folder / "stage_one")), train=replace(recipe.train, steps=1)
    )
    second = ko.train(recipe, other, splits.additive(other), out=tmp_path / "second")
    assert second.screen.genes == screen.genes[1:]
    with pytest.raises(UserError, match="leave out --genes"):
        ko.train(
            recipe, screen, splits.additive(screen), out=tmp_path / "third",
            options=Options(genes=10),
        )  # fmt: skip
    wrong = Recipe(model=replace(recipe.model, vae=str(run.folder)), train=recipe.train)
    with pytest.raises(UserError, match="no autoencoder"):
        ko.train(wrong, screen, splits.additive(screen), out=tmp_path / "fourth")


def test_contradictions_are_refused():
    for changes, word in (
        ({"width": 15}, "width"),
        ({"hidden": 1.0}, "hidden"),
        ({"weights": (1.0,)}, "weights"),
    ):
        with pytest.raises(UserError, match=word):
            build(**changes)


@torch.no_grad()
def test_what_training_never_left_open_is_not_generated():
    noise = Noise(torch.Generator().manual_seed(0))
    part = BOTH & torch.tensor([True, False])
    for changes, given in (({"hide": "all"}, part), ({"hidden": 0.0}, ~BOTH)):
        model = build(**changes)
        with pytest.raises(UserError, match="never left"):
            model.generate(CONDITION, given, 3, noise)


@torch.no_grad()
def test_a_flow_that_bursts_is_told(z):
    model = build(weights=(1e30, 1e30))
    model.sizes.fit({Label(covariates=("x",)): np.array([100.0])}, SPEC)
    with pytest.raises(UserError, match="not finite"):
        model.generate(CONDITION, BOTH, 3, Noise(torch.Generator().manual_seed(0)))
    with pytest.raises(UserError, match="cannot be solved"):
        build(weights=(1e30, 1e30), solver="dopri5").flow(z, CONDITION, BOTH)


@torch.no_grad()
def test_library_sizes_are_those_of_the_control_cells_or_drawn(
    run: Run, screen: Screen, monkeypatch: pytest.MonkeyPatch
):
    model, label = run.model, screen.conditions[0]
    condition = model.spec.encode([label])
    control = torch.from_numpy(screen.gather(screen.rows[screen.controls[0]][:64]))[None]
    sums = {}
    for library in ("control", "condition"):
        monkeypatch.setattr(model, "config", replace(model.config, library=library, counts="means"))
        drawn = model.make(control, condition, Noise(torch.Generator().manual_seed(0)))
        sums[library] = drawn.sum(-1)[0]
    torch.testing.assert_close(sums["control"], control.sum(-1)[0])
    real = screen.cells_of(label).sum(1)
    assert np.log(real).mean() == pytest.approx(float(sums["condition"].log().mean()), abs=0.2)
    assert not torch.allclose(sums["condition"], sums["control"])


@torch.no_grad()
def test_drawn_counts_are_as_often_zero_as_measured_ones(run: Run, screen: Screen):
    trained = run.split.train
    condition = run.model.spec.encode(trained)
    control = torch.from_numpy(screen.gather(screen.rows[screen.controls[0]][:64]))
    control = control.expand(len(trained), -1, -1)

    def apart(**changes: object) -> float:
        model = replace(run.model.config, **changes).build(run.model.spec).eval()
        weights = {key: x for key, x in run.model.state_dict().items() if key in model.state_dict()}
        fill(model, weights)
        drawn = model.make(control, condition, Noise(torch.Generator().manual_seed(0)))
        assert torch.equal(drawn, drawn.round())
        cells = np.concatenate([screen.cells_of(label) for label in trained])
        return float(np.abs((drawn == 0).double().mean((0, 1)).numpy() - (cells == 0).mean(0)).mean())

    assert apart() < 0.03
    assert apart(quantile_mapped=False) > 0.05


@torch.no_grad()
def test_a_run_that_gives_means_is_ready_to_draw_counts(run: Run):
    """Both are asked for at generation, so the map is fitted whatever training was told."""
    model = replace(run.model.config, counts="means").build(run.model.spec).eval()
    weights = run.model.state_dict()
    unfitted = {k: x.clone() for k, x in model.state_dict().items() if k.startswith("quantile_map")}
    fill(model, weights | unfitted)
    validate.finish(model, run.screen, run.split, run.record.train.seed)
    for key, before in unfitted.items():
        torch.testing.assert_close(model.state_dict()[key], weights[key])
        assert not torch.equal(before, weights[key])


@torch.no_grad()
@pytest.mark.parametrize("counts", ["sampled", "means"])
def test_cells_are_moved_as_counts(run: Run, screen: Screen, counts: str):
    label = run.split.test[0]
    condition = run.model.spec.encode([label, Label()])
    control = torch.from_numpy(screen.gather(screen.rows[screen.controls[0]][:200])).expand(2, -1, -1)

    def cells(weight: float, *, method: str = "sample") -> torch.Tensor:
        model = replace(run.model.config, counts=counts).build(run.model.spec).eval()
        fill(model, run.model.state_dict())
        model.weight.fill_(weight)
        return getattr(model, method)(control, condition, Noise(torch.Generator().manual_seed(0)))

    made, moved = cells(1.0, method="make"), cells(1.0)
    assert torch.equal(cells(0.0), made)
    torch.testing.assert_close(moved[1], made[1])  # nothing was done there
    if counts == "sampled":
        assert torch.equal(moved, moved.round())
    wanted = run.model.ripple.expect(condition)[0]
    before, after = (run.model.to_log1p(x)[0].mean(0) - wanted for x in (made, moved))
    assert after.square().mean() < 0.05 * before.square().mean()


def test_paper_moves_and_maps_nothing():
    recipe = scldm.paper()
    switches = {"pulled": recipe.model.pulled, "quantile_mapped": recipe.model.quantile_mapped}
    small = replace(scldm.small().model, **switches).build(SPEC)
    assert small.ripple is None
    assert small.quantile_map is None


def test_without_perturbed_cells_nothing_is_moved(screen: Screen):
    model = scldm.small().model.build(screen.spec())
    model.fit_statistics(screen.select(screen.controls))
    assert model.weight == 0
