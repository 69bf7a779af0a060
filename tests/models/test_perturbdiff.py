from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from knockon.dynamics.discrepancy import energy_distance
from knockon.models import perturbdiff
from knockon.models.perturbdiff import PerturbDiff
from knockon.nn.conditions import Level
from knockon.nn.joint import Parts, hide
from knockon.types import CellSets, Condition, Covariate, Label, Noise, Spec, UserError

GENES = 12
SPEC = Spec(
    genes=tuple(f"g{i}" for i in range(GENES)),
    perturbations=("a", "b", "c"),
    covariates=(Covariate("type", ("x", "y")),),
    slots=2,
)
CONDITION = Condition(
    perturbation=torch.tensor([[1, 0], [2, 3]]),
    dose=torch.zeros(2, 2),
    covariates=torch.tensor([[0], [1]]),
)


def build(preset=perturbdiff.small, spec=SPEC, *, lively: bool = True, **changes) -> PerturbDiff:
    """Gates that begin at zero are opened, unless what matters is the beginning."""
    torch.manual_seed(0)
    sizes = {"width": 16, "layers": 2, "heads": 2, "branch": 4, "set_size": 8}
    sizes |= {"anchored": False, "pulled": False, "shrunk": False, "shrinkage": 0.0}
    model = replace(preset().model, **sizes | changes).build(spec)
    if lively:
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture
def cells(rng):
    """Targets and control cells of two sets."""
    return torch.rand(2, 2, 6, GENES, generator=rng)


def sample(model, control, seed=0):
    with torch.no_grad():
        return model.sample(control, CONDITION, Noise(torch.Generator().manual_seed(seed)))


def released(genes: int) -> dict[str, int]:
    """Parameters that the released program has beside those that reach an output, by the spec."""
    width, of_map = 512, lambda i, o: (i + 1) * o
    return {
        "embedding of genes": of_map(5120, width) + 2 * width,
        "estimate of control cells": genes * width,
        "head of control cells": of_map(width, 2 * width) + of_map(width, genes),
        "last maps of control cells": of_map(width, 4 * width) + of_map(4 * width, width),
        "last modulation of control cells": 4 * of_map(width, width),
        "last update of control cells": of_map(2 * width, width),
    }


@pytest.mark.parametrize(("genes", "published"), [(2000, 103_642_016), (12_626, 141_746_852)])
def test_parameters_are_those_published_without_those_that_do_nothing(genes, published):
    spec = Spec(genes=tuple(map(str, range(genes))), perturbations=("a",))
    with torch.device("meta"):
        model = perturbdiff.paper().model.build(spec)
    network = sum(p.numel() for n, p in model.named_parameters() if not n.startswith("conditions."))
    assert network == published - sum(released(genes).values())


def test_the_paper_begins_with_cells_on_their_own(rng):
    """Closed gates: neither the other cells, nor control cells, nor the condition reach a cell."""
    model = build(perturbdiff.paper, lively=False, scale=1.0)
    x, other = torch.randn(2, 2, 6, GENES, generator=rng)
    steps = torch.tensor([3, 7])
    none = hide(2, condition=False, control=False, shown=0)
    with torch.no_grad():
        one = model.denoise(x, other.relu(), model.encode(CONDITION), steps, none)
        two = model.denoise(x, x.relu(), model.encode(CONDITION[torch.tensor([1, 0])]), steps, none)
        mixed = torch.cat([x[:, :1], other[:, 1:]], dim=1)
        three = model.denoise(mixed, other.relu(), model.encode(CONDITION), steps, none)
    assert torch.equal(one, two)
    torch.testing.assert_close(one[:, 0], three[:, 0])
    assert 0.2 < (one == 0).float().mean() < 0.8  # about half of what a rectifier sees


def test_the_default_begins_at_no_effect(cells):
    model = build(lively=False, cutoff=0.0)
    torch.testing.assert_close(sample(model, cells[1]), cells[1])


@pytest.mark.parametrize("join", ["features", "tokens"])
def test_a_set_has_no_order(cells, join):
    """Permuting cells with their control cells permutes the answer; control cells alone change it."""
    model, (x, control) = build(join=join), cells
    order, steps = torch.tensor([3, 1, 5, 0, 2, 4]), torch.tensor([3, 7])
    none = hide(2, condition=False, control=False, shown=2)

    def denoise(x, control):
        with torch.no_grad():
            return model.denoise(x, control, model.encode(CONDITION), steps, none)

    straight = denoise(x, control)
    torch.testing.assert_close(
        denoise(x[:, order], control[:, order]), straight[:, order], rtol=1e-4, atol=1e-5
    )
    apart = (denoise(x, control[:, order]) - straight).abs().max()
    assert apart > 1e-3


@pytest.mark.parametrize("join", ["features", "tokens"])
def test_copies_change_nothing(cells, rng, join):
    model = build(join=join, self_conditioning=0.0, condition_dropout=0.0)
    target, control = cells[0], cells[1]
    whole = CellSets(target=target, control=control, condition=CONDITION)
    real = torch.tensor([[True] * 4 + [False] * 2] * 2)
    padded = replace(whole, real=real)
    other = replace(padded, target=torch.where(real[..., None], target, 9.0))
    short = replace(whole, target=target[:, :4], control=control[:, :4])

    def loss(batch):
        # Noise is drawn for as many cells as are left, so equal batches have equal noise.
        return model.loss(batch, torch.Generator().manual_seed(0))["total"]

    assert torch.equal(loss(padded), loss(other))
    torch.testing.assert_close(loss(padded), loss(short))
    assert not torch.equal(loss(padded), loss(whole))
    counting = build(join=join, masked=False, self_conditioning=0.0, condition_dropout=0.0)
    assert not torch.equal(
        counting.loss(padded, torch.Generator().manual_seed(0))["total"],
        counting.loss(other, torch.Generator().manual_seed(0))["total"],
    )


def test_a_mask_works_where_it_cannot_trim(cells):
    """Sets of different sizes: the larger one decides how many places there are."""
    model = build()
    steps, encoded = torch.tensor([3, 7]), model.encode(CONDITION)
    none = hide(2, condition=False, control=False, shown=2)
    x, control = cells[0], cells[1]
    real = torch.tensor([[True] * 4 + [False] * 2, [True] * 6])
    with torch.no_grad():
        both = model.denoise(x, control, encoded, steps, none, real)
        alone = model.denoise(x[:, :4], control[:, :4], encoded, steps, none)
    torch.testing.assert_close(both[0, :4], alone[0])
    losses = model.objective(both, x, real)
    energies = [
        energy_distance(x[0, :4], both[0, :4]) / 2,
        energy_distance(x[1], both[1]) / 2,
    ]
    torch.testing.assert_close(losses["energy"], torch.stack(energies).mean())


def test_parts_are_cut_and_joined():
    for cells, most, number, size in ((6, 8, 1, 6), (16, 8, 2, 8), (9, 8, 2, 5), (17, 8, 3, 6)):
        parts = Parts.of(cells, most)
        assert (parts.number, parts.size) == (number, size)
        x = torch.arange(2.0 * cells * 3).view(2, cells, 3)
        assert torch.equal(parts.join(parts.cut(x)), x)
        real = parts.real(2, x.device)
        if number * size == cells:
            assert real is None
        else:
            assert real is not None
            assert torch.equal(parts.join(real[..., None].float())[..., 0], torch.ones(2, cells))
            assert int(real.sum()) == 2 * cells


def test_parts_of_a_set_are_generated_alone(rng):
    """Whatever fills the last part up reaches no cell."""
    model = build()
    control = torch.rand(2, 9, GENES, generator=rng)
    drawn = sample(model, control)
    assert drawn.shape == control.shape
    changed = control.clone()
    changed[:, 5:] += 1
    torch.testing.assert_close(sample(model, changed)[:, :5], drawn[:, :5])
    assert not torch.equal(sample(model, changed)[:, 5:], drawn[:, 5:])


@pytest.mark.parametrize(
    "changes",
    [
        {"span": "truncated", "visited": 7},
        {"guidance": 1.5},
        {"guidance": 1.5, "own_estimates": False},
        {"rule": "ddpm"},
        {"eta": 0.5},
        {"control_dropout": 1.0},
        {"schedule": "cosine"},
        {"condition_through_genes": True},
        {"residual": False},
        {"maps_see_attention": False},
        {"dropout_per": "batch"},
        {"unbiased_energy": False},
        {"shrinkage": 0.1},
    ],
    ids=lambda changes: " ".join(f"{k}={v}" for k, v in changes.items()),
)
def test_every_switch_does_something(cells, changes):
    target, control = cells[0], cells[1]
    batch = CellSets(target=target, control=control, condition=CONDITION)

    def outcome(model):
        losses = model.loss(batch, torch.Generator().manual_seed(1))
        return torch.cat([sample(model, control).flatten(), losses["total"][None]])

    changed = outcome(build(**changes))
    assert changed.isfinite().all()
    assert not torch.equal(changed, outcome(build()))


def test_a_share_of_the_values_is_changed(cells):
    """None leaves the cells as they were, and half of them are drawn anew for every value."""
    control = cells[1].repeat(1, 4, 1)
    made = sample(build(), control)
    assert (made != control).all()
    model = build(shrunk=True)
    assert torch.equal(sample(model, control), made)
    model.choose([], 0)
    halved = sample(model, control)
    taken, kept = halved == made, (halved - control).abs() < 1e-6
    assert (taken ^ kept).all()
    assert 0.4 < taken.double().mean() < 0.6
    model.share.zero_()
    torch.testing.assert_close(sample(model, control), control)
    for nothing_beside in ({"residual": False}, {"control_dropout": 1.0}):
        model = build(shrunk=True, **nothing_beside)
        model.choose([], 0)
        assert model.share == 1


def test_guidance_needs_what_it_guides_away_from(cells):
    """Without a weight the second pass is left out, and the answer is that of a weight near zero."""
    near = sample(build(guidance=1e-6), cells[1])
    torch.testing.assert_close(sample(build(guidance=0.0), cells[1]), near, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "changes",
    [{"visited": 51}, {"heads": 3}, {"eta": 2.0}, {"guidance": 1.0, "condition_dropout": 0.0}],
    ids=str,
)
def test_options_that_contradict_each_other(changes):
    with pytest.raises(UserError, match="do not fit together"):
        build(**changes)


def test_untrained_cells_are_where_ripple_expects_them(rng, make_screen):
    """The untrained model is then the additive baseline, and no effect elsewhere."""
    cells = {
        name: torch.rand(40, GENES, generator=rng).numpy() + shift
        for name, shift in (("", 1.0), ("a", 2.0), ("b", 1.5), ("a+b", 3.0))
    }
    labelled = {Label.of([n for n in name.split("+") if n]): values for name, values in cells.items()}
    spec = Spec(genes=SPEC.genes, perturbations=("a", "b"), slots=2)
    pair = spec.encode([Label.of(["a", "b"])])
    control = torch.from_numpy(cells[""])[None]
    for held, expected in ((), 3.0), ((Label.of(["a", "b"]),), 2.5):
        model = build(spec=spec, lively=False, anchored=True, cutoff=0.0)
        model.fit_statistics(make_screen({k: v for k, v in labelled.items() if k not in held}, SPEC.genes))
        with torch.no_grad():
            drawn = model.sample(control, pair, Noise(rng))
        assert drawn.mean().item() - 0.5 == pytest.approx(expected, abs=0.1)


def test_an_untrained_level_is_the_mean_of_the_others():
    level = Level(3, 4)
    level.trained[2] = False
    expected = level.table.weight[:2].mean(0)
    assert torch.allclose(level(torch.tensor([2]))[0], expected)
    assert torch.equal(level(torch.tensor([1]))[0], level.table.weight[1])


def test_vectors_answer_for_what_was_never_trained():
    vectors = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    vectors[2] = np.nan
    model = build(spec=replace(SPEC, vectors=vectors))
    model.conditions.fit(CONDITION[:1])
    asked = Condition(
        perturbation=torch.tensor([[1, 0], [2, 0], [3, 0], [1, 3], [0, 0]]),
        dose=torch.zeros(5, 2),
        covariates=torch.zeros(5, 1, dtype=torch.long),
    )
    assert model.knows(asked).tolist() == [True, True, False, False, True]
    bare = build()
    bare.conditions.fit(CONDITION[:1])
    assert bare.knows(asked).tolist() == [True, False, False, False, True]


def test_a_fraction_of_sets_is_hidden_and_half_are_shown():
    model = build(condition_dropout=0.25, control_dropout=0.5)
    hidden = model._hide(4000, torch.Generator().manual_seed(0))
    assert hidden.condition.float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert hidden.control.float().mean().item() == pytest.approx(0.5, abs=0.03)
    assert len(hidden.shown) == 2000
    whole = build(condition_dropout=0.5, dropout_per="batch")
    coins = [whole._hide(8, torch.Generator().manual_seed(seed)) for seed in range(200)]
    assert {len(coin.shown) for coin in coins} == {0, 8}
    assert all(coin.condition.all() or not coin.condition.any() for coin in coins)
    assert 0.35 < np.mean([bool(coin.condition[0]) for coin in coins]) < 0.65


def test_arithmetic_of_a_cell():
    """[perturbdiff, section 3.9]: .209 GFLOP, of which 26 % repeat for each cell what is one for the set."""
    config = replace(perturbdiff.paper().model, whole_counts=False)
    spec = Spec(genes=tuple(map(str, range(2000))), perturbations=("a",))
    with torch.device("meta"):
        model = PerturbDiff(config, spec)
        x = torch.zeros(1, 256, 2000)
        told = torch.zeros(1, 1, config.width)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.estimate(x, x, x, model.network.embed_control(x), told)
    assert 0.85 * 0.155 < counter.get_total_flops() / 256 / 1e9 < 0.155


def test_guidance_of_estimates_is_guidance_of_noise(rng):
    """Both are the same affine map of each other, and the weights sum to 1."""
    model = build(guidance=1.5)
    x, one, other = (torch.randn(2, 6, GENES, generator=rng) for _ in range(3))
    signal, noise = 0.6, 0.8
    guided = model.guide((x - signal * one) / noise, (x - signal * other) / noise)
    torch.testing.assert_close((x - noise * guided) / signal, model.guide(one, other))


@pytest.mark.slow
def test_four_conditions_are_learned(rng):
    """Each is a mixture of two Gaussians, and control cells say nothing of it."""
    spec = Spec(genes=tuple(f"g{i}" for i in range(6)), perturbations=("a", "b", "c", "d"))
    torch.manual_seed(0)
    changes = {"residual": False, "whole_counts": False, "steps": 1000, "visited": 20}
    model = replace(perturbdiff.small().model, scale=1.0, **changes).build(spec)
    centers = 1 + 2 * torch.rand(4, 2, 6, generator=rng)
    condition = Condition(
        perturbation=torch.arange(1, 5)[:, None], dose=torch.zeros(4, 1), covariates=torch.zeros(4, 0).long()
    )

    def draw(cells):
        which = torch.randint(2, (4, cells), generator=rng)
        chosen = centers[torch.arange(4)[:, None], which]
        return chosen + 0.1 * torch.randn(4, cells, 6, generator=rng)

    control = torch.zeros(4, 16, 6)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(1000):
        optimizer.zero_grad()
        model.loss(CellSets(target=draw(16), control=control, condition=condition), rng)["total"].backward()
        optimizer.step()
    real, other = draw(64), draw(64)
    with torch.no_grad():
        made = model.eval().sample(control.repeat(1, 4, 1), condition, Noise(rng))
    apart = energy_distance(real, other.roll(1, 0)).mean()
    assert energy_distance(real, made).mean() < 0.3 * apart
