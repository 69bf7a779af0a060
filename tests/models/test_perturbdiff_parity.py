"""The paper preset agrees with the numbers of the released program, name by name."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from knockon.dynamics import diffusion
from knockon.models import perturbdiff
from knockon.models.perturbdiff import PerturbDiff
from knockon.nn.joint import Hidden, hide
from knockon.train import decay, learning_rate
from knockon.types import Condition, Covariate, Spec

from .parity import Parity

ENERGY = 5e-4
"""Tolerance in float32 of what contains an energy distance: the released program cancels large numbers."""
STEPS = 1000


class Fixture(Parity):
    def agree(self, ours: Tensor, key: str, single: float = 5e-5) -> None:
        """Compare with an output; ``single`` is the tolerance in float32, of the largest entry."""
        truth = torch.from_numpy(np.asarray(self.arrays[f"outputs/f64/{key}"])).double()
        atol = 1e-9 if self.exact else single * max(1.0, truth.abs().max().item())
        ours = ours.detach().double()
        torch.testing.assert_close(
            ours.broadcast_to(truth.shape), truth, rtol=1e-9 if self.exact else 0, atol=atol,
            msg=lambda text: f"{key}: {text}",
        )  # fmt: skip

    @property
    def sizes(self) -> dict[str, int]:
        return dict(zip("GHLnSBrPCQ", self.arrays["meta/sizes"].tolist(), strict=True))

    def model(self, **changes: object) -> PerturbDiff:
        n = self.sizes
        config = replace(
            perturbdiff.paper().model, width=n["H"], layers=n["L"], heads=n["n"], branch=n["r"], scale=1.0,
            set_size=n["S"], **changes,
        )  # fmt: skip
        spec = Spec(
            genes=tuple(f"g{i}" for i in range(n["G"])),
            perturbations=tuple(f"p{i}" for i in range(n["P"])),
            covariates=tuple(
                Covariate(name, tuple(f"{name}{i}" for i in range(n[k])))
                for name, k in (("type", "C"), ("batch", "Q"))
            ),
        )
        model = config.build(spec).to(self.dtype)
        model.bars = diffusion.alpha_bars(config.schedule, config.steps)
        state = perturbdiff.from_released(self.weights(), spec)
        missing, unexpected = model.load_state_dict(state, strict=False)
        assert not unexpected
        assert not set(missing) & {name for name, _ in model.named_parameters()}
        return model

    def weights(self) -> dict[str, np.ndarray]:
        return {k.removeprefix("weights/"): v for k, v in self.arrays.items() if k.startswith("weights/")}

    def condition(self, group: str = "net", *, per_cell: bool = False) -> Condition:
        """One row for each set, or for each cell; -1 is no perturbation."""
        labels = [self[f"inputs/{group}/cov_{k}"] for k in ("pert", "celltype", "batch")]
        p, c, q = (x.flatten() if per_cell else x[:, 0] for x in labels)
        return Condition(
            perturbation=p[:, None] + 1,
            dose=torch.zeros(len(p), 1),
            covariates=torch.stack([c, q], dim=1),
        )


@pytest.fixture(scope="module")
def arrays(shared):
    with np.load(shared / "parity" / "perturbdiff.npz") as file:
        return dict(file)


@pytest.fixture(params=(torch.float64, torch.float32), ids=["float64", "float32"])
def fixture(request, arrays):
    return Fixture(arrays, request.param)


@pytest.fixture
def exact(arrays):
    return Fixture(arrays, torch.float64)


def told(model, fixture, *, null=False, mixed=False):
    """Time and condition of the network tests."""
    t = fixture["inputs/net/t"]
    if mixed:
        encoded = model.encode(fixture.condition("net_mixed", per_cell=True)).view(
            len(t), -1, model.config.width
        )
    else:
        encoded = model.encode(fixture.condition())
    if null:
        encoded = model.hidden.expand_as(encoded)
    return encoded + model.tell(t, fixture["inputs/net/x_t"])


@torch.no_grad()
def test_conditions(fixture):
    model = fixture.model()
    fixture.agree(model.conditions(fixture.condition())[:, None], "net/e")
    mixed = model.conditions(fixture.condition("net_mixed", per_cell=True))
    fixture.agree(mixed.view(*fixture["inputs/net/t"].shape, -1, mixed.shape[-1]), "net_mixed/e")
    hidden = replace(fixture.condition(), perturbation=torch.zeros(len(mixed) // 5, 1, dtype=torch.long))
    fixture.agree(model.conditions(hidden)[:, None], "net/e_pert_encoding_non")


@torch.no_grad()
def test_time_and_what_conditions_a_layer(fixture):
    model = fixture.model()
    t, x = fixture["inputs/net/t"], fixture["inputs/net/x_t"]
    loose = 5e-4  # an angle of 900 in float32 is good to 3e-5
    fixture.agree(model.network.time.waves(t.to(x.dtype))[:, None], "net/cond_sc1/mid/time_sinusoid", loose)
    fixture.agree(model.tell(t, x), "net/cond_sc1/mid/time_emb", loose)
    fixture.agree(model.encode(fixture.condition()), "net/cond_sc1/mid/class_emb")
    fixture.agree(model.hidden.expand(len(t), 1, -1), "net/null_sc1/mid/class_emb")
    fixture.agree(told(model, fixture), "net/cond_sc1/mid/c", loose)
    fixture.agree(told(model, fixture, null=True), "net/null_sc1/mid/c", loose)


@torch.no_grad()
@pytest.mark.parametrize("case", ["cond_sc1", "null_sc1"])
def test_streams_after_every_block(fixture, case):
    model = fixture.model()
    seen: list[Tensor] = []
    for block in model.network.blocks:
        block.register_forward_hook(lambda _, inputs, outputs: seen.extend([*inputs[0], *outputs]))
    ahead: list[Tensor] = []
    model.network.head.register_forward_hook(lambda _, inputs, output: ahead.extend([*inputs, output]))
    run(model, fixture, bar=True, null=case == "null_sc1")
    mid, loose = f"net/{case}/mid", 5e-4
    fixture.agree(seen[0], f"{mid}/h0")
    fixture.agree(seen[1], f"{mid}/u0")
    for number in range(fixture.sizes["L"]):
        fixture.agree(seen[4 * number + 2], f"{mid}/block{number + 1}_h", loose)
        if number + 1 < fixture.sizes["L"]:  # nothing reads the control stream after the last block
            fixture.agree(seen[4 * number + 3], f"{mid}/block{number + 1}_u", loose)
    fixture.agree(ahead[0], f"{mid}/head_in", loose)
    fixture.agree(ahead[1], f"{mid}/pre_relu", loose)


@torch.no_grad()
def test_inside_the_first_block(fixture):
    model, loose = fixture.model(), 5e-4
    found: dict[str, Tensor] = {}

    def note(name):
        return lambda _, inputs, output: found.update({name: output, f"{name}_in": inputs[0]})

    block = model.network.blocks[0]
    block.cells.modulation.register_forward_hook(note("ada"))
    block.control.modulation.register_forward_hook(note("ada_control"))
    block.attention.inputs[0].register_forward_hook(note("qkv"))
    block.attention.outputs[0].register_forward_hook(note("attn_out"))
    block.cells.maps.register_forward_hook(note("mlp_out"))
    block.control.maps.register_forward_hook(note("mlp_out_control"))
    run(model, fixture, bar=True)
    for ours, theirs in (
        ("ada", "ada"), ("ada_control", "ada_control"), ("qkv_in", "attn_in"), ("qkv", "qkv"),
        ("attn_out_in", "heads"), ("attn_out", "attn_out"), ("mlp_out_in", "mlp_in"), ("mlp_out", "mlp_out"),
        ("mlp_out_control", "mlp_out_control"),
    ):  # fmt: skip
        fixture.agree(found[ours], f"net/cond_sc1/mid/block1_{theirs}", loose)


def run(model, fixture, *, bar, null=False, mixed=False, control=True):
    """The whole network on the inputs of the network tests."""
    shown = fixture["inputs/net/control"] * control
    return model.estimate(
        fixture["inputs/net/x_t"], fixture["inputs/net/x_bar"] if bar else None, shown,
        model.network.embed_control(shown), told(model, fixture, null=null, mixed=mixed),
    )  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("cond_sc0", {"bar": False}),
        ("null_sc0", {"bar": False, "null": True}),
        ("cond_sc1", {"bar": True}),
        ("null_sc1", {"bar": True, "null": True}),
        ("cond_sc1_ctrl0", {"bar": True, "control": False}),
        ("mixed_sc1", {"bar": True, "mixed": True}),
    ],
)
def test_the_network(fixture, case, options):
    fixture.agree(run(fixture.model(), fixture, **options), f"net/{case}/x", 5e-4)


@torch.no_grad()
def test_the_older_norm_of_queries_and_keys(fixture):
    model = fixture.model(norm_by_variance=True)
    fixture.agree(run(model, fixture, bar=True), "net_variant/qk_unbiased_var/x", 5e-4)


@pytest.mark.parametrize("case", ["plain", "dup", "same", "zeros"])
def test_losses(fixture, case):
    model = fixture.model()
    true = fixture["inputs/loss/x_true_dup" if case == "dup" else "inputs/loss/x_true"]
    estimate = {"zeros": torch.zeros_like(true)}.get(case, fixture["inputs/loss/x_pred"]).requires_grad_()
    if case == "same":
        true = estimate.detach()
    for b in range(len(true)):
        losses = model.objective(estimate[b : b + 1], true[b : b + 1])
        truth = {k: fixture.arrays[f"outputs/f64/loss/{case}/{k}"][b] for k in ("mse", "energy")}
        near = 1e-9 if fixture.exact else ENERGY
        assert losses["mse"].item() == pytest.approx(truth["mse"], abs=near)
        assert losses["energy"].item() == pytest.approx(truth["energy"], abs=near)
    losses = model.objective(estimate, true)
    fixture.agree(losses["total"], f"loss/{case}/total", ENERGY)
    fixture.agree(losses["energy"], f"loss/{case}/energy_mean", ENERGY)
    if case in ("plain", "dup"):
        (gradient,) = torch.autograd.grad(losses["total"], estimate)
        fixture.agree(gradient, f"loss/{case}/grad_total")


CASES = {
    "a_cond_sc0": 0,
    "b_cond_sc1": 0,
    "c_null_sc1": 0,
    "d_ctrl0_null_sc0": 0.5,
    "e_ctrlkept_cond_sc1": 0.5,
}
"""Cases of the training step, and the share of hidden controls."""


def train(model, fixture, case, share):
    clean, control = fixture["inputs/train/x_start"], fixture["inputs/train/control"]
    steps, noise = fixture["inputs/train/t"], fixture["inputs/train/noise"]
    of_control, of_condition, shown = fixture.arrays[f"inputs/train/coins_{case}"]
    hidden: Hidden = hide(
        len(clean),
        condition=bool(of_condition < model.config.condition_dropout),
        control=bool(of_control < share),
        shown=len(clean) if shown > 1 - model.config.self_conditioning else 0,
    )
    x = diffusion.noised(clean, noise, model.bars[steps])
    estimate = model.denoise(x, control, model.encode(fixture.condition()), steps, hidden)
    return x, estimate, model.objective(estimate, clean)


@pytest.mark.parametrize(("case", "share"), CASES.items())
def test_a_training_step(fixture, case, share):
    x, estimate, losses = train(fixture.model(), fixture, case, share)
    fixture.agree(x, f"train/{case}/x_t")
    fixture.agree(estimate, f"train/{case}/x0_hat", 5e-4)
    fixture.agree(losses["total"], f"train/{case}/loss", 2 * ENERGY)


def test_gradients(exact):
    model = exact.model()
    *_, losses = train(model, exact, "b_cond_sc1", 0)
    losses["total"].backward()
    prefix = "outputs/f64/train/b_cond_sc1/grad/"
    released = {k.removeprefix(prefix): v for k, v in exact.arrays.items() if k.startswith(prefix)}
    weights = exact.weights()
    zeros = {name: np.zeros_like(weight, dtype=np.float64) for name, weight in weights.items()}
    truth = perturbdiff.from_released(zeros | released, model.spec)
    for name, parameter in model.named_parameters():
        # The vector of a hidden condition takes part in no case where the condition is shown.
        ours = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(ours, truth[name].double(), rtol=1e-9, atol=1e-9, msg=name)


@torch.no_grad()
@pytest.mark.parametrize("guidance", [0, 1])
@pytest.mark.parametrize("visited", [6, 100])
def test_chains(fixture, visited, guidance):
    model = fixture.model(visited=visited, guidance=float(guidance))
    key = f"sample/ddim_start{visited}_w{guidance}"
    start, control = fixture["inputs/sample/x_init"], fixture["inputs/sample/control"]
    encoded = model.encode(fixture.condition())
    passed = list(model.chain(start, control, encoded, lambda: start))
    assert len(passed) == visited
    fixture.agree(torch.stack([clean for clean, _ in passed]), f"{key}/x0_hat", 5e-4)
    fixture.agree(torch.stack([x for _, x in passed]), f"{key}/x_next", 5e-4)
    fixture.agree(passed[-1][0], f"{key}/final", 5e-4)


@torch.no_grad()
def test_a_chain_without_control_cells(fixture, monkeypatch):
    model = fixture.model(visited=6, guidance=1.0, control_dropout=1.0)
    start = fixture["inputs/sample/x_init"]
    monkeypatch.setattr(torch, "randn", lambda *_, **__: start)
    noise = perturbdiff.Noise(torch.Generator())
    drawn = model.sample(fixture["inputs/sample/control"], fixture.condition(), noise)
    fixture.agree(drawn, "sample/ddim_start6_w1_ctrl0/final", 5e-4)


@torch.no_grad()
@pytest.mark.parametrize("guidance", [0, 1, 2.5])
def test_guidance_and_cutoff(fixture, guidance):
    model = fixture.model(guidance=float(guidance))
    clean = model.guide(fixture["inputs/guide/cond"], fixture["inputs/guide/null"])
    fixture.agree(model.cut(clean), f"guide/w{guidance:g}", 2e-5)


@torch.no_grad()
@pytest.mark.parametrize("guidance", [0, 1])
@pytest.mark.parametrize("rule", ["ddim_step_eta0", "ddim_step_eta0.7", "ddpm_step"])
def test_single_steps(fixture, rule, guidance):
    model = fixture.model(guidance=float(guidance))
    x, steps = fixture["inputs/sample/step_x_t"], fixture["inputs/sample/step_t"]
    control, noise = fixture["inputs/sample/control"], fixture["inputs/sample/step_noise"]
    base, encoded = model.network.embed_control(control), model.encode(fixture.condition())
    passes = [
        model.estimate(x, fixture["inputs/sample/step_x_bar"], control, base, e + model.tell(steps, x))
        for e in (encoded, model.hidden.expand_as(encoded))
    ]
    clean = model.cut(model.guide(*passes))
    move = diffusion.Move(model.bars[steps], model.bars[steps - 1])
    key = f"sample/{rule}_w{guidance}"
    if rule == "ddpm_step":
        fixture.agree(clean, f"{key}/x0_hat", 5e-4)
        fixture.agree(diffusion.ddpm(x, clean, move, noise=torch.zeros_like(x)), f"{key}/mean", 5e-4)
        fixture.agree(diffusion.ddpm(x, clean, move, noise=noise), f"{key}/x_next", 5e-4)
    else:
        eta = float(rule.removeprefix("ddim_step_eta"))
        fixture.agree(diffusion.ddim(x, clean, move, eta=eta, noise=noise), f"{key}/x_next", 5e-4)


def near(ours, truth):
    np.testing.assert_allclose(np.asarray(ours), truth, rtol=1e-12, atol=1e-12)


def test_schedules(arrays):
    for kind, steps in (("linear", 1000), ("linear", 50), ("cosine", 1000), ("power_cosine", 1000)):
        at = arrays["tables/few_steps"] if "cosine" in kind else slice(None)
        near(diffusion.betas(kind, steps)[at], arrays[f"tables/{kind}_{steps}/betas"])
        near(diffusion.alpha_bars(kind, steps)[:-1][at], arrays[f"tables/{kind}_{steps}/alphas_cumprod"])


def test_posterior(arrays):
    """A draw from the posterior is linear in clean data, state and noise, with these coefficients."""
    bars = diffusion.alpha_bars("linear", STEPS)
    move = diffusion.Move(bars[:-1], bars[torch.arange(-1, STEPS - 1)])
    one, zero = torch.ones(STEPS, 1, 1, dtype=torch.float64), torch.zeros(STEPS, 1, 1, dtype=torch.float64)
    table = {k.removeprefix("tables/linear_1000/"): v for k, v in arrays.items()}
    near(diffusion.ddpm(zero, one, move, noise=zero).flatten(), table["posterior_mean_coef1"])
    near(diffusion.ddpm(one, zero, move, noise=zero).flatten(), table["posterior_mean_coef2"])
    spread = diffusion.ddpm(zero, zero, move, noise=one).flatten()
    near(2 * spread[1:].log(), table["log_variance_used"][1:])
    assert spread[0] == 0


def test_waves(arrays):
    time = perturbdiff.small().model.build(Spec(genes=("a",), perturbations=("a",))).network.time
    waves = time.waves(torch.from_numpy(arrays["tables/time_sinusoid/t"]).double())
    near(waves, arrays["tables/time_sinusoid/f64"])


@pytest.mark.parametrize("steps", [1000, 200_000])
def test_learning_rates(arrays, steps):
    """One update later than ours: the first update of the released program has a rate of zero."""
    training = replace(perturbdiff.paper().train, steps=steps)
    table = arrays[f"tables/lr_max{steps}/step"], arrays[f"tables/lr_max{steps}/factor"]
    for step, factor in zip(*table, strict=True):
        if 0 < step <= 200:
            assert learning_rate(int(step) - 1, training) == pytest.approx(factor * training.lr)
        elif 200 < step <= steps:
            assert learning_rate(int(step), training) == pytest.approx(factor * training.lr)


def test_moving_average(arrays):
    weights, truth = arrays["tables/ema/weight_after_step"], arrays["tables/ema/average_after_step"]
    training, average = perturbdiff.paper().train, math.nan
    for step, weight in enumerate(weights[:25]):  # the fixture's epoch ends there; we know no epochs
        kept = decay(step, training)
        average = weight if kept == 0 else kept * average + (1 - kept) * weight
        if step + 1 < 25:
            assert average == pytest.approx(truth[step], abs=1e-12)


def test_gelu_is_the_tanh_form(exact):
    """The quietest of mistakes: the exact form differs by 4e-4."""
    x = torch.linspace(-3, 3, 50, dtype=torch.float64)
    maps = exact.model().network.blocks[0].cells.maps
    assert torch.equal(maps[1](x), functional.gelu(x, approximate="tanh"))
