from dataclasses import replace

import numpy as np
import pytest
import torch

from knockon.data import simulate
from knockon.data.conventions import Columns
from knockon.data.screen import Screen
from knockon.models import scldm_vae
from knockon.models.scldm_vae import SetAutoencoder
from knockon.nn.tokens import Tokens
from knockon.types import CellSets, Condition, Noise, Spec, UserError

GENES = 12
SPEC = Spec(genes=tuple(f"g{i}" for i in range(GENES)), perturbations=("A",), units="counts")


def build(spec: Spec = SPEC, **changes: object) -> SetAutoencoder:
    torch.manual_seed(0)
    sizes = {"width": 16, "layers": 1, "heads": 2, "latents": 3, "latent_width": 6}
    return replace(scldm_vae.small().model, **sizes | changes).build(spec).eval()


def batch(cells: torch.Tensor) -> CellSets:
    sets = len(cells)
    nothing = Condition(
        perturbation=torch.zeros(sets, 1, dtype=torch.long),
        dose=torch.zeros(sets, 1),
        covariates=torch.zeros(sets, 0, dtype=torch.long),
    )
    return CellSets(target=cells, control=cells, condition=nothing)


@pytest.fixture
def cells(rng):
    return torch.poisson(2 * torch.rand(7, GENES, generator=rng), generator=rng)


def parameters(width: int, latents: int, layers: int, heads: int, genes: int, **changes: object) -> int:
    spec = replace(SPEC, genes=tuple(map(str, range(genes))))
    config = replace(
        scldm_vae.paper().model, width=width, latents=latents, layers=layers, heads=heads,
        cross_heads=4 if width > 128 else 1, **changes,
    )  # fmt: skip
    with torch.device("meta"):
        model = SetAutoencoder(config, spec)
    return sum(p.numel() for p in model.parameters())


def test_parameter_counts():
    """[scldm, section 1.9], less what is dead: positions, the bias of logits, the dispersion of no gene."""
    dentate_gyrus = parameters(width=128, latents=128, layers=2, heads=4, genes=17_002)
    assert dentate_gyrus == 3_419_756 - 128 * 128 - 1 - 1
    cd4 = parameters(width=256, latents=256, layers=8, heads=4, genes=3_699, embedding="softbin")
    assert round((cd4 + 256 * 256 + 2) / 1e6, 2) == 15.29
    default = parameters(width=32, latents=16, layers=8, heads=8, genes=17_002)
    assert round((default + 16 * 32 + 2) / 1e6, 2) == 0.79


@torch.no_grad()
def test_latents_ignore_the_order_of_genes_and_padding(cells):
    model = build()
    tokens = model.tokens(cells)
    latents, _ = model.encode(tokens)
    order = torch.randperm(tokens.genes.shape[1])
    shuffled = Tokens(tokens.genes[:, order], tokens.counts[:, order], tokens.raised[:, order])
    torch.testing.assert_close(model.encode(shuffled)[0], latents)
    alone = torch.cat([model.encode(model.tokens(cell[None]))[0] for cell in cells])
    torch.testing.assert_close(alone, latents)  # alone, a cell is padded less


@torch.no_grad()
def test_latent_tokens_are_normalized(cells):
    latents, _ = build().encode(build().tokens(cells))
    torch.testing.assert_close(latents.mean(-1), torch.zeros(7, 3), rtol=0, atol=1e-6)
    torch.testing.assert_close(latents.var(-1, unbiased=False), torch.ones(7, 3), rtol=0, atol=1e-4)


@torch.no_grad()
def test_how_large_a_count_is_can_be_seen_unless_it_only_scales(cells):
    more = torch.where(cells > 0, cells + 5, 0.0)
    for embedding, seen in (("projconcat", True), ("softbin", True), ("log1p", False)):
        model = build(embedding=embedding)
        both = [model.encode(model.tokens(x))[0] for x in (cells, more)]
        assert torch.allclose(*both, atol=1e-4) != seen
        fewer = torch.where(torch.arange(GENES) < 6, cells, 0.0)
        assert not torch.allclose(both[0], model.encode(model.tokens(fewer))[0], atol=1e-4)


@torch.no_grad()
def test_expected_counts_sum_to_the_library_size_over_any_genes(cells):
    model = build()
    latents, sizes = torch.randn(7, 3, 6), cells.sum(1) + 1
    mean, inverse = model.decode(latents, sizes)
    torch.testing.assert_close(mean.sum(1), sizes)
    assert (inverse > 0).all()
    chosen = torch.tensor([[4, 0, 9]])
    some, of_some = model.decode(latents, sizes, chosen)
    torch.testing.assert_close(some.sum(1), sizes)
    torch.testing.assert_close(some / some[:, :1], mean[:, [4, 0, 9]] / mean[:, 4:5])
    torch.testing.assert_close(of_some[0], inverse[0, [4, 0, 9]])


def test_genes_begin_at_their_share_of_counts():
    screen = Screen.from_anndata(simulate.simulate(simulate.tiny()), columns=Columns(layer="counts"))
    model = build(screen.spec())
    model.fit_statistics(screen)
    torch.nn.init.zeros_(model.head.weight)
    counts = torch.from_numpy(screen.gather(np.sort(np.concatenate(list(screen.rows.values())))))
    mean, _ = model.decode(torch.randn(1, 3, 6), torch.ones(1))
    torch.testing.assert_close(mean[0].detach(), counts.sum(0) / counts.sum(), rtol=1e-2, atol=1e-5)


def test_a_posterior_has_a_divergence_that_can_be_weighed(cells, rng):
    plain, drawn = build(), build(posterior=True, kl=0.5)
    assert "kl" not in plain.loss(batch(cells[None]), rng)
    losses = drawn.loss(batch(cells[None]), rng)
    torch.testing.assert_close(losses["total"], losses["nll"] + 0.5 * losses["kl"])
    again = drawn.loss(batch(cells[None]), rng)
    assert not torch.equal(losses["nll"], again["nll"])  # latents are drawn
    with torch.no_grad():
        assert torch.equal(drawn.embed(cells), drawn.embed(cells))


@pytest.mark.parametrize(
    "changes",
    [
        {"likelihood": "gaussian"},
        {"dispersion": "cell"},
        {"tokens": "all"},
        {"rates": False},
        {"padded_to": GENES},
        {"embedding": "log1pzero"},
    ],
    ids=str,
)
def test_every_switch_does_something(cells, rng, changes):
    def outcome(model):
        with torch.no_grad():
            return model.loss(batch(cells[None]), rng)["total"]

    assert outcome(build(**changes)).isfinite()
    if changes != {"rates": False}:  # they begin at zero without data
        assert not torch.equal(outcome(build(**changes)), outcome(build()))


@torch.no_grad()
def test_control_cells_are_told_again_with_their_library_sizes(cells):
    model = build()
    control = cells.expand(300, -1, -1)
    drawn = model.sample(control, batch(control).condition, Noise(torch.Generator().manual_seed(0)))
    mean, inverse = model.decode(model.encode(model.tokens(cells))[0], cells.sum(1))
    torch.testing.assert_close(drawn.mean(0), mean, rtol=0.2, atol=0.6)
    spread = mean + mean.square() / inverse
    torch.testing.assert_close(drawn.var(0).mean(), spread.mean(), rtol=0.2, atol=0)


def test_contradictions_are_refused(cells):
    padded = {"tokens": "all", "padded_to": 4}
    for changes, word in (({"kl": 1.0}, "posterior"), ({"width": 15}, "heads"), (padded, "padded_to")):
        with pytest.raises(UserError, match=word):
            build(**changes)
    with pytest.raises(UserError, match="at most padded_to = 2"):
        build(padded_to=2).tokens(cells)
