"""scDFM: sizes, symmetries, switches. Numbers of the released program are in test_scdfm_parity."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from knockon.models import scdfm
from knockon.types import CellSets, Condition, Label, Noise, Spec, UserError

GENES = 12
SPEC = Spec(
    genes=tuple(f"g{i}" for i in range(GENES)), perturbations=("g1", "g4", "x"), slots=2, dose_unit="uM"
)
CONDITION = SPEC.encode([Label.of(["g1"]), Label.of(["g1", "g4"]), Label.of(["x"], [3.0])])
SMALL = scdfm.small().model


def build(spec: Spec = SPEC, **switches: object) -> scdfm.SCDFM:
    """A model whose every parameter is random: nothing hides behind a gate of zero."""
    rng = torch.Generator().manual_seed(1)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = replace(SMALL, **{"width": 16, "anchored_base": False, "pulled": False} | switches).build(
            spec
        )
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng))
    return model


def batch(rng: torch.Generator, cells: int = 5) -> CellSets:
    target, control = torch.randn(2, 3, cells, GENES, generator=rng).relu()
    return CellSets(target=target, control=control, condition=CONDITION)


def size(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# ---- sizes ------------------------------------------------------------------------------------------

BLOCKS = {512: (3_152_384, 41_990_656, 3_155_968, 3_149_824), 128: (198_272, 2_633_344, 199_168, 197_632)}
ENDS = {512: (788_480, 529_408, 394_240, 787_969, 264_192), 128: (49_664, 34_048, 49_408, 49_537, 16_896)}
TOTAL = {512: 60_359_169, 128: 4_964_481}
TABLE_ROWS = 6000


@pytest.mark.parametrize("width", [512, 128])
def test_blocks_have_the_published_numbers_of_parameters(width):
    genes = tuple(f"g{i}" for i in range(5029))
    with torch.device("meta"):
        network = (
            replace(scdfm.paper().model, width=width).build(Spec(genes=genes, perturbations=genes)).network
        )
    layers = network.layers
    cross_layer = (
        network.genes.query_norm,
        network.genes.attention,
        network.genes.maps_norm,
        network.genes.maps,
    )
    blocks = (
        sum(map(size, cross_layer)),
        sum(size(layer.to_state) + size(layer.to_control) for layer in layers),
        sum(size(layer.genes) for layer in layers),
        sum(size(layer.adapter) for layer in layers),
    )
    assert blocks == BLOCKS[width]
    ends = (
        size(network.fusion) + size(network.fusion_out),
        size(network.values) + size(network.control_values),
        size(network.time),
        size(network.head) + size(network.head_out) + size(network.velocity),
    )
    assert ends == ENDS[width][:4]
    table = size(network.genes.table) + size(network.genes.table_norm)
    assert table == (5030 + 2) * width  # one row for each gene and one for nothing
    assert size(network) == table + sum(blocks) + sum(ends)
    unused = 2 * (TABLE_ROWS + 2) * width - table + ENDS[width][4]  # rows of both tables, and the label head
    assert size(network) + unused == TOTAL[width]


# ---- symmetries -------------------------------------------------------------------------------------


def velocity(model: scdfm.SCDFM, genes: torch.Tensor, x: torch.Tensor, control: torch.Tensor) -> torch.Tensor:
    t = torch.linspace(0, 1, len(x), dtype=x.dtype)
    g, p = model.network.encode(genes, CONDITION[:1])
    known = model.network.know(g, control[:, genes], p.expand(len(x), -1))
    return model.velocity(genes, x[:, genes], t, known)


@pytest.mark.parametrize("switches", [{}, {"attention": "softmax"}, {"backbone": "transformer"}])
def test_genes_have_no_order(rng, switches):
    model = build(**switches).double()
    x, control = torch.randn(2, 4, GENES, generator=rng, dtype=torch.float64)
    order = torch.randperm(GENES, generator=rng)
    expected = velocity(model, torch.arange(GENES), x, control)
    torch.testing.assert_close(velocity(model, order, x, control), expected[:, order])


def test_perturbations_have_no_order(rng):
    model, data = build(), batch(rng)
    flipped = Condition(
        perturbation=CONDITION.perturbation.flip(1),
        dose=CONDITION.dose.flip(1),
        covariates=CONDITION.covariates,
    )
    expected = model.sample(data.control, CONDITION, Noise(torch.Generator().manual_seed(0)))
    assert torch.equal(model.sample(data.control, flipped, Noise(torch.Generator().manual_seed(0))), expected)


@pytest.mark.parametrize("chunk", [1, 3 * GENES])
def test_chunks_change_nothing_but_memory(rng, chunk):
    data = batch(rng)
    whole, parts = (
        build(chunk=size).sample(data.control, CONDITION, Noise(torch.Generator().manual_seed(0)))
        for size in (SMALL.chunk, chunk)
    )
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)


def test_a_panel_larger_than_a_step(rng):
    model, data = build(genes_per_step=4), batch(rng)
    assert model.loss(data, rng)["total"].isfinite()
    assert model.sample(data.control, CONDITION, Noise(rng)).shape == data.control.shape


def test_batches_of_sets_are_means_over_sets(rng):
    model = build().double()
    genes, t = torch.arange(GENES), torch.rand(3, 5, generator=rng, dtype=torch.float64)
    x0, x1, control = torch.randn(3, 3, 5, GENES, generator=rng, dtype=torch.float64)
    together = model.objective(genes, scdfm.Pairs(x0, x1, control, t), CONDITION)
    alone = [
        model.objective(
            genes, scdfm.Pairs(*(x[i : i + 1] for x in (x0, x1, control, t))), CONDITION[i : i + 1]
        )
        for i in range(3)
    ]
    for name, value in together.items():
        torch.testing.assert_close(value, torch.stack([losses[name] for losses in alone]).mean())


# ---- switches ---------------------------------------------------------------------------------------

SWITCHES = [
    {"attention": "softmax"},
    {"control_attention": False},
    {"backbone": "transformer", "attention": "softmax", "control_attention": False},
    {"gene_graph": False},
    {"mmd": 0.0},
    {"source": "poisson"},
    {"gaussian_base": False},
    {"normal_scores": False},
    {"anchored_base": True},
    {"normed_keys": False},
    {"residual_adapter": False},
    {"zero_init": False, "time_scale": 1.0},
    {"dropout": 0.1},
    {"dropout": 0.1, "dropout_in_generation": True},
    {"solver": "euler", "points": 4},
]


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_every_switch_trains_and_generates(rng, make_screen, switches):
    model, data = build(**switches), batch(rng)
    cells = torch.randn(40, GENES, generator=rng).relu().numpy()
    cells[:, -1] = 0.5
    screen = {Label(): cells[:20], Label.of(["g1"]): cells[20:]}
    model.fit_statistics(make_screen(screen, SPEC.genes))
    losses = model.loss(data, rng)
    losses["total"].backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().max()]
    alone = ("network.genes.query_norm", "network.genes.attention.query")  # one neighbor leaves no choice
    assert all(name.startswith(alone) for name in silent)
    assert bool(silent) == (not model.config.gene_graph)
    assert ("mmd" in losses) == (model.config.mmd > 0)
    drawn = [
        model.sample(data.control, CONDITION, Noise(torch.Generator().manual_seed(s))) for s in (0, 0, 1)
    ]
    assert drawn[0].isfinite().all()
    assert (drawn[0] >= 0).all()
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_generation_takes_a_share_of_what_the_network_adds(rng):
    model = build(pulled=False).eval()
    x, control = torch.randn(2, 4, GENES, generator=rng)
    g, p = model.network.encode(torch.arange(GENES), CONDITION[:1])
    known = model.network.know(g, control, p.expand(len(x), -1))
    t = torch.linspace(0, 1, len(x))
    found = [model.velocity(torch.arange(GENES), x, t, known, share=share) for share in (0.0, 0.5, 1.0)]
    torch.testing.assert_close(found[1], (found[0] + found[2]) / 2)
    assert not torch.equal(found[0], found[2])
    cells = []
    for share in (0.0, 1.0):
        model.share.fill_(share)
        cells.append(model.sample(control[None], CONDITION[:1], Noise(torch.Generator().manual_seed(0))))
    assert not torch.equal(*cells)


def test_the_loss_is_of_all_that_the_network_adds(rng):
    model, data = build().eval(), batch(rng)
    losses = []
    for share in (0.0, 1.0):
        model.share.fill_(share)
        losses.append(model.loss(data, torch.Generator().manual_seed(0))["total"])
    assert losses[0] == losses[1]


def test_closed_gates_leave_the_gaussian_velocity(rng):
    model = replace(SMALL, anchored_base=False, pulled=False).build(SPEC)
    model.data_moments[:] = torch.rand(2, GENES, generator=rng)
    x, control = torch.randn(2, 4, GENES, generator=rng)
    still = replace(model.config, gaussian_base=False).build(SPEC)
    assert not velocity(still, torch.arange(GENES), x, control).any()
    assert velocity(model, torch.arange(GENES), x, control).any()


@pytest.mark.slow
def test_an_untrained_model_has_the_moments_of_training_cells(rng, make_screen):
    mean, std = torch.rand(GENES, generator=rng) + 4, torch.rand(GENES, generator=rng) + 0.1
    cells = (mean + std * torch.randn(1000, GENES, generator=rng)).numpy()
    model = replace(SMALL, anchored_base=False, pulled=False, normal_scores=False, points=12).build(SPEC)
    model.fit_statistics(make_screen({Label(): cells[:10], Label.of(["g1"]): cells}, SPEC.genes))
    drawn = model.sample(torch.zeros(1, 400, GENES), CONDITION[:1], Noise(rng))[0]
    torch.testing.assert_close(drawn.mean(0), torch.from_numpy(cells.mean(0)), rtol=0, atol=0.2)
    torch.testing.assert_close(drawn.std(0), torch.from_numpy(cells.std(0)), rtol=0.2, atol=0)


@pytest.mark.parametrize("pulled", [False, True])
def test_only_an_anchored_base_ends_where_ripple_expects(rng, make_screen, pulled):
    cells = torch.rand(60, GENES, generator=rng).numpy()
    screen = make_screen({Label(): cells[:30], Label.of(["g1"]): cells[30:] + 1}, SPEC.genes)
    switches = {"pulled": pulled, "normal_scores": False}
    anchored, plain = (build(anchored_base=on, **switches).eval() for on in (True, False))
    for model in (anchored, plain):
        model.fit_statistics(screen)
    assert torch.equal(plain.mean(CONDITION), plain.data_moments[0].expand(3, -1))
    assert torch.equal(anchored.mean(CONDITION), anchored.ripple.expect(CONDITION))


def test_poisson_noise_scatters_around_the_control_cell(rng):
    model = build(source="poisson", normal_scores=False)
    control = torch.rand(1, 1, GENES, generator=rng).expand(1, 4000, -1)
    start = model.start(control, Noise(rng), torch.arange(GENES))
    share = control[0, 0].expm1() / control[0, 0].expm1().sum()
    torch.testing.assert_close(start.expm1().mean((0, 1)), 1e4 * share, rtol=0.01, atol=0)


@pytest.mark.parametrize("normal_scores", [False, True])
def test_constant_genes_are_kept(rng, make_screen, normal_scores):
    cells = torch.rand(60, GENES, generator=rng).numpy() + 1
    cells[:, 3], cells[:, 5] = 0.0, 0.7
    model = build(normal_scores=normal_scores)
    model.fit_statistics(make_screen({Label(): cells[:30], Label.of(["g1"]): cells[30:]}, SPEC.genes))
    drawn = model.sample(torch.zeros(1, 50, GENES), CONDITION[:1], Noise(rng))[0]
    assert (drawn[:, 3] == 0).all()
    torch.testing.assert_close(drawn[:, 5], torch.full((50,), 0.7))


def test_an_untrained_model_has_the_values_and_zeros_of_training_cells_and_the_means_of_ripple(
    rng, make_screen
):
    """Of two conditions, one with half the counts of the other, all cells of one depth."""
    draw = np.random.default_rng(0)
    one, other = (np.log1p(draw.negative_binomial(3, 3 / (3 + mean), (1000, GENES))) for mean in (1.0, 2.0))
    cells = {Label(): other, Label.of(["g1"]): one, Label.of(["x"]): other}
    model = replace(SMALL, pulled=False).build(SPEC).eval()
    model.fit_statistics(make_screen({k: v.astype(np.float32) for k, v in cells.items()}, SPEC.genes))
    condition = SPEC.encode([Label.of(["g1"]), Label.of(["x"])])
    made = model.sample(torch.zeros(2, 1000, GENES), condition, Noise(rng)).detach()
    torch.testing.assert_close(made.mean(1), model.ripple.expect(condition), atol=0.06, rtol=0)
    for drawn, real in zip(made.numpy(), (one, other), strict=True):
        assert np.abs((drawn == 0).mean(0) - (real == 0).mean(0)).max() < 0.06
        assert np.abs(drawn.std(0) - real.std(0)).max() < 0.08
        few = np.abs(np.expm1(drawn) - np.expm1(drawn).round()) < 1e-3
        assert few.mean() > 0.9


def test_knows_genes_and_what_it_was_trained_on(make_screen):
    model = build()
    asked = SPEC.encode([Label.of(["g4"]), Label.of(["x"]), Label.of(["g1", "x"])])
    assert model.knows(asked).tolist() == [True, False, False]
    cells = np.ones((3, GENES), np.float32)
    model.fit_statistics(make_screen({Label(): cells, Label.of(["x"]): cells}, SPEC.genes))
    assert model.knows(asked).all()


def test_bf16(rng):
    model, data = build(), batch(rng)
    exact = model.loss(data, torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        losses = model.loss(data, torch.Generator().manual_seed(0))
        losses["total"].backward()
        cells = model.sample(data.control, CONDITION, Noise(rng))
    assert all(loss.dtype == torch.float32 for loss in losses.values())
    assert cells.dtype == torch.float32
    assert losses["total"].item() == pytest.approx(exact["total"].item(), rel=0.05)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_released_weights_of_another_vocabulary_are_refused():
    weights = {"encoder.embedding.weight": np.zeros((5, 16)), "blocks.0.x": np.zeros(1)}
    with pytest.raises(UserError, match="too small"):
        scdfm.from_released(weights, SPEC)
