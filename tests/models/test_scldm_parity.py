"""The paper presets agree with the numbers of the released program, name by name."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from knockon.dynamics import flow, likelihood, solve
from knockon.model import Training
from knockon.models import scldm, scldm_vae
from knockon.models.scldm import LatentFlow
from knockon.models.scldm_vae import SetAutoencoder
from knockon.nn.library import LibrarySizes
from knockon.nn.tokens import Tokens, all_genes, expressed_genes
from knockon.train import decay, learning_rate
from knockon.types import Condition, Covariate, Label, Spec

from .parity import Parity

CLASSES = ("cytokine", "cell_type")
"""The perturbation, then the covariate."""


class Fixture(Parity):
    def agree(self, ours: Tensor, key: str, single: float = 2e-5, double: float = 1e-10) -> None:
        """Compare with ``<group>/outputs/<name>``; tolerances are shares of the largest entry."""
        truth = torch.from_numpy(np.asarray(self.arrays[key.replace("/outputs/", "/outputs64/")])).double()
        largest = max(1e-3, truth.abs().max().item())
        ours = ours.detach().double().broadcast_to(truth.shape)
        atol = (double if self.exact else single) * largest
        torch.testing.assert_close(ours, truth, rtol=0, atol=atol, msg=lambda text: f"{key}: {text}")

    def size(self, key: str) -> int:
        return int(self.arrays[key])

    @property
    def spec(self) -> Spec:
        levels = [tuple(f"{k}{i}" for i in range(self.size(f"dit/config/vocab_{k}"))) for k in CLASSES]
        return Spec(
            genes=tuple(f"g{i}" for i in range(self.size("ae/config/G"))),
            perturbations=levels[0],
            covariates=(Covariate("cell_type", levels[1]),),
            units="counts",
        )

    def autoencoder(self, variant: str = "", **changes: object) -> SetAutoencoder:
        n = {k: self.size(f"ae/config/{k}") for k in ("E", "M", "D", "L", "H", "Hc")}
        sizes = {
            "width": "E",
            "latents": "M",
            "latent_width": "D",
            "layers": "L",
            "heads": "H",
            "cross_heads": "Hc",
        }
        sizes = {ours: n[theirs] for ours, theirs in sizes.items()}
        config = replace(scldm_vae.paper().model, **sizes | changes)
        model = config.build(self.spec).to(self.dtype)
        weights = self.weights("ae/weights/")
        if variant:
            weights = {
                k: v for k, v in weights.items() if not (variant in HEADS and k.startswith("decoder_head"))
            }
            weights |= self.weights(f"ae/weights_{variant}/")
        model.load_state_dict(scldm_vae.from_released(weights, self.spec))
        return model

    def flow(self, **changes: object) -> LatentFlow:
        n = {k: self.size(f"dit/config/{k}") for k in ("C", "layers", "heads")}
        first = self.autoencoder()
        if changes.get("guidance") == "additive":  # for which the released program shows one class at a time
            changes = {"hide": "all_but_one", **changes}
        config = replace(
            scldm.paper().model, width=n["C"], layers=n["layers"], heads=n["heads"], autoencoder=first.config,
            **changes,
        )  # fmt: skip
        model = config.build(self.spec).to(self.dtype)
        model.take(first)
        state = scldm.from_released(self.weights("dit/weights/"), self.spec, CLASSES)
        missing, unexpected = model.load_state_dict(state, strict=False)
        assert not unexpected
        assert not [name for name in missing if name.startswith(("network", "conditions.own.table"))]
        places = self["dit/weights/pos_embed"][0]
        torch.testing.assert_close(model.network.places, places, rtol=0, atol=1e-6)
        model.network.places = places  # computed there in single precision, whatever follows
        return model

    def weights(self, prefix: str) -> dict[str, np.ndarray]:
        return {k.removeprefix(prefix): v for k, v in self.arrays.items() if k.startswith(prefix)}

    def tokens(self, mode: str, model: SetAutoencoder) -> Tokens:
        counts = self["ae/inputs/counts"]
        return all_genes(counts) if mode == "all" else expressed_genes(counts, self.size("ae/config/d"))

    def condition(self) -> Condition:
        return Condition(
            perturbation=self["dit/inputs/label_cytokine"][:, None] + 1,
            dose=torch.zeros(self.size("ae/config/B"), 1),
            covariates=self["dit/inputs/label_cell_type"][:, None],
        )

    def given(self, *classes: str) -> Tensor:
        mask = torch.tensor([name in classes for name in CLASSES])
        return mask.expand(self.size("ae/config/B"), -1)

    @property
    def guidance(self) -> tuple[float, ...]:
        return tuple(float(self.arrays[f"dit/inputs/weight_{name}"]) for name in CLASSES)


HEADS = {"head_unshared", "head_gaussian"}
EMBEDDINGS = ("log1p", "log1pzero", "anscombe", "sqrt", "proj", "projconcat", "softbin")


@pytest.fixture(scope="module")
def arrays(shared):
    with np.load(shared / "parity" / "scldm.npz") as file:
        return dict(file)


@pytest.fixture(params=(torch.float64, torch.float32), ids=["float64", "float32"])
def fixture(request, arrays):
    return Fixture(arrays, request.param)


@pytest.fixture
def exact(arrays):
    return Fixture(arrays, torch.float64)


def variant(name: str) -> str:
    return name if name in ("proj", "projconcat", "softbin") else ""


@torch.no_grad()
@pytest.mark.parametrize("mode", ["all", "expressed"])
@pytest.mark.parametrize("embedding", EMBEDDINGS)
def test_tokens_and_latents(fixture, embedding, mode):
    model = fixture.autoencoder(variant(embedding), embedding=embedding)
    tokens = fixture.tokens(mode, model)
    key = f"ae/outputs/{embedding}/{mode}"
    if mode == "all":
        fixture.agree(model.counts(tokens.genes, tokens.counts), f"{key}/tokens", single=1e-6)
    latents, _ = model.encode(tokens)
    fixture.agree(latents, f"{key}/z")


@torch.no_grad()
@pytest.mark.parametrize("mode", ["all", "expressed"])
@pytest.mark.parametrize("embedding", ["log1p", "projconcat"])
def test_every_stage_of_the_autoencoder(fixture, embedding, mode):
    model, key = (
        fixture.autoencoder(variant(embedding), embedding=embedding),
        f"ae/outputs/{embedding}/{mode}",
    )
    tokens = fixture.tokens(mode, model)
    x = model.counts(tokens.genes, tokens.counts)
    encoder, decoder = model.encoder, model.decoder
    queries = encoder.queries[None]
    projected = encoder.pool.project(x)
    fixture.agree(encoder.pool.attend(queries, projected, tokens.raised), f"{key}/enc_mcab_attn")
    x = encoder.pool(queries, projected, tokens.raised)
    fixture.agree(x, f"{key}/enc_mcab")
    for index, block in enumerate(encoder.blocks):
        x = block(x)
        fixture.agree(x, f"{key}/enc_block{index}")
    fixture.agree(encoder.out(x), f"{key}/enc_prenorm")
    z, _ = model.encode(tokens)
    x = decoder.inputs(nn.functional.layer_norm(z, z.shape[-1:], eps=1e-8))
    fixture.agree(x, f"{key}/dec_in")
    for index, block in enumerate(decoder.blocks):
        x = block(x)
        fixture.agree(x, f"{key}/dec_block{index}")
    genes = torch.arange(len(model.spec.genes))[None]
    fixture.agree(decoder(z, model.counts.table(genes + 1), nn.Identity()), f"{key}/hidden")
    counts = fixture["ae/inputs/counts"]
    mean, inverse = model.decode(z, counts.sum(-1))
    fixture.agree(mean, f"{key}/mu")
    fixture.agree(inverse, f"{key}/theta")
    fixture.agree(likelihood.negative_binomial(counts, mean, inverse), f"{key}/loglik")
    fixture.agree(model.nll(counts, z), f"{key}/nll_cell")
    fixture.agree(model.nll(counts, z).mean(), f"{key}/loss")


@torch.no_grad()
def test_other_heads(fixture):
    counts = fixture["ae/inputs/counts"]
    model = fixture.autoencoder("head_unshared", dispersion="cell")
    z, _ = model.encode(fixture.tokens("expressed", model))
    mean, inverse = model.decode(z, counts.sum(-1))
    fixture.agree(mean, "ae/outputs/head_unshared/mu")
    fixture.agree(inverse, "ae/outputs/head_unshared/theta")
    fixture.agree(model.nll(counts, z), "ae/outputs/head_unshared/nll_cell")
    model = fixture.autoencoder("head_gaussian", likelihood="gaussian")
    z, _ = model.encode(fixture.tokens("expressed", model))
    fixture.agree(model.decode(z, counts.sum(-1))[0], "ae/outputs/head_gaussian/mu")
    fixture.agree(model.nll(counts, z), "ae/outputs/head_gaussian/sqerr_cell")


@torch.no_grad()
def test_decoding_of_any_latents_and_any_genes(fixture):
    model, z = fixture.autoencoder(), fixture["ae/inputs/z_free"]
    sizes = fixture["ae/inputs/library_size_free"][:, 0]
    for name, latents in (
        ("decode_free", z),
        ("decode_free_affine", 3 * z + 0.5),
        ("decode_small", fixture["ae/inputs/z_small"]),
    ):
        mean, inverse = model.decode(latents, sizes)
        fixture.agree(mean, f"ae/outputs/{name}/mu")
        fixture.agree(inverse, f"ae/outputs/{name}/theta")
    mean, inverse = model.decode(z, sizes, fixture["ae/inputs/genes_query"] - 1)
    fixture.agree(mean, "ae/outputs/decode_query/mu")
    fixture.agree(inverse, "ae/outputs/decode_query/theta")


@torch.no_grad()
def test_heads_of_the_cross_attention(fixture):
    model = fixture.autoencoder(
        "projconcat", embedding="projconcat", cross_heads=fixture.size("ae/config/Hc_alt")
    )  # fmt: skip
    z, _ = model.encode(fixture.tokens("expressed", model))
    fixture.agree(z, "ae/outputs/cross_alt/z")
    fixture.agree(model.decode(z, fixture["ae/inputs/counts"].sum(-1))[0], "ae/outputs/cross_alt/mu")


@pytest.mark.parametrize("tile", [2**14, 15], ids=["whole", "in parts made again"])
@pytest.mark.parametrize("embedding", ["log1p", "projconcat"])
def test_gradients_of_the_autoencoder(exact, embedding, tile, monkeypatch):
    model = exact.autoencoder(variant(embedding), embedding=embedding)
    monkeypatch.setattr(type(model.decoder), "CPU_TILE", tile)
    counts = exact["ae/inputs/counts"]
    model.nll(counts, model.encode(exact.tokens("expressed", model))[0]).mean().backward()
    stored = exact.weights(f"ae/grads/{embedding}/")
    wanted = scldm_vae.from_released(stored, exact.spec)
    for name, parameter in model.named_parameters():
        largest = wanted[name].abs().max()
        if name == "counts.table.weight":
            largest = wanted[name].abs().amax(1, keepdim=True).clamp_min(1e-12)
        torch.testing.assert_close(
            parameter.grad / largest, (wanted[name] / largest).double(), rtol=0, atol=1e-6,
            msg=lambda text, name=name: f"{name}: {text}",
        )  # fmt: skip


def test_tokens_of_expressed_genes(exact):
    counts, position = exact["tok/inputs/counts"], exact.arrays["tok/inputs/vocab_position"]
    known = position >= 0
    tokens = expressed_genes(counts[:, known])
    genes, values = exact["tok/outputs/genes_subset"], exact["tok/outputs/counts_subset"]
    ids = torch.from_numpy(position[known] + 1)
    for cell in range(len(counts)):
        wanted = [(g, c) for g, c in zip(genes[cell].tolist(), values[cell].tolist(), strict=True) if c and g]
        on = tokens.genes[cell] > 0
        found = zip(ids[tokens.genes[cell][on] - 1].tolist(), tokens.counts[cell][on].tolist(), strict=True)
        assert list(found) == wanted


def test_negative_binomial_at_extremes(exact):
    x, mean, inverse = (exact[f"nb/inputs/{k}"].double() for k in ("x", "mu", "theta"))
    truth = torch.from_numpy(exact.arrays["nb/outputs64/loglik"])
    ours = likelihood.negative_binomial(x, mean, inverse)
    torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-9)
    by_cells = likelihood.negative_binomial_of_cells(x[None], mean[None], inverse[None])
    torch.testing.assert_close(by_cells, truth.sum()[None], rtol=1e-9, atol=0)


@torch.no_grad()
def test_velocity(fixture):
    model, t, x = fixture.flow(), fixture["dit/inputs/t"], fixture["dit/inputs/x"]
    network, key = model.network, "dit/outputs"
    fixture.agree(network.time.waves(t), f"{key}/t_features")
    fixture.agree(network.time(t), f"{key}/t_embed")
    fixture.agree(network.inputs(x), f"{key}/x_proj")
    both = fixture.given(*CLASSES)
    told = model.conditions(fixture.condition(), both[:, None]) + model.tell(t[:, None])
    fixture.agree(told, f"{key}/cond_vec")
    state = network.inputs(x) + network.places.to(x.dtype)
    for index, block in enumerate(network.blocks):
        state = block(state, nn.functional.silu(told))
        fixture.agree(state, f"{key}/block{index}")
    small, c = fixture["dit/inputs/block_x_small"], fixture["dit/inputs/block_c"]
    fixture.agree(network.blocks[0](small, nn.functional.silu(c)), f"{key}/block0_small")
    for name, classes in (
        ("v_both", CLASSES), ("v_null", ()), ("v_only_cell_type", ("cell_type",)),
        ("v_only_cytokine", ("cytokine",)),
    ):  # fmt: skip
        told = model.conditions(fixture.condition(), fixture.given(*classes)[:, None]) + model.tell(
            t[:, None]
        )
        fixture.agree(network(x[:, None], told)[:, 0], f"{key}/{name}")


@torch.no_grad()
@pytest.mark.parametrize("guidance", ["joint", "additive"])
def test_guidance(fixture, guidance):
    x, times, sets = fixture["dit/inputs/x"], fixture["dit/inputs/t"], fixture.size("ae/config/B")
    for weights, name in ((fixture.guidance, f"guided_{guidance}"), ((1.0, 1.0), f"guided_{guidance}_w1")):
        model = fixture.flow(guidance=guidance, weights=weights)
        field = model.field(fixture.condition(), fixture.given(*CLASSES))
        # Times differ between the cells of the file, and are the same for all in a field.
        found = torch.stack([field(x[:, None], t)[i, 0] for i, t in enumerate(times)])
        truth = torch.from_numpy(fixture.arrays[f"dit/outputs64/{name}"])[-sets:]
        atol = (1e-10 if fixture.exact else 2e-5) * truth.abs().max().item()
        torch.testing.assert_close(found.double(), truth.double(), rtol=0, atol=atol)


@torch.no_grad()
def test_path_and_loss(fixture):
    model = fixture.flow()
    x0, x1, t = (fixture[f"path/inputs/{k}"] for k in ("x0", "x1", "t"))
    state = flow.interpolate(x0.flatten(1), x1.flatten(1), t).view(x0.shape)
    fixture.agree(state, "path/outputs/xt")
    fixture.agree(flow.velocity(x0, x1), "path/outputs/ut")
    args = (x0[:, None], x1[:, None], t[:, None], fixture.condition(), fixture.given(*CLASSES)[:, None])
    fixture.agree(model.errors(*args)[:, 0], "path/outputs/loss_cell")


@pytest.mark.parametrize("mode", ["joint", "additive"])
def test_a_training_step(exact, mode):
    model = exact.flow()
    z = model.embed(exact["ae/inputs/counts"]).view(-1, *model.shape)
    if not model.config.autoencoder.padded_to:
        z, _ = model.autoencoder.encode(exact.tokens("expressed", model.autoencoder))
    exact.agree(z, f"train/{mode}/outputs/z")
    drop = torch.from_numpy(exact.arrays[f"train/{mode}/inputs/drop"]).bool()
    assert torch.equal(drop, exact[f"train/{mode}/inputs/u"] < 0.8)
    given = ~drop[:, None].expand(-1, 2).clone()
    if mode == "additive":
        chosen = sorted(CLASSES)[int(exact.arrays["train/additive/inputs/class_index"])]
        given &= exact.given(chosen)
    x0, t = exact[f"train/{mode}/inputs/x0"], exact[f"train/{mode}/inputs/t"]
    errors = model.errors(x0[:, None], z[:, None], t[:, None], exact.condition(), given[:, None])
    exact.agree(errors[:, 0], f"train/{mode}/outputs/loss_cell")
    errors.mean().backward()
    wanted = scldm.from_released(exact.weights(f"train/{mode}/grads/"), exact.spec, CLASSES)
    for name, parameter in model.named_parameters():
        if not name.startswith("autoencoder"):
            atol = 1e-4 * max(1e-6, wanted[name].abs().max().item())
            torch.testing.assert_close(
                parameter.grad, wanted[name].double(), rtol=0, atol=atol,
                msg=lambda text, name=name: f"{name}: {text}",
            )  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("guidance", ["joint", "additive"])
def test_sampling(fixture, guidance):
    """The released program solves the unconditioned cells beside the guided ones."""
    model = fixture.flow(guidance=guidance, weights=fixture.guidance)
    condition, sets = fixture.condition(), fixture.size("ae/config/B")
    guided = model.field(condition, fixture.given(*CLASSES))
    free = model.field(condition, fixture.given())
    noise = fixture["sample/inputs/noise"]

    def field(z: Tensor, t: Tensor) -> Tensor:
        return torch.cat([free(z[:sets], t), guided(z[sets:], t)])

    z = torch.cat([noise, noise])[:, None]
    times, key = torch.linspace(0, 1, 6, dtype=z.dtype), f"sample/outputs/{guidance}"
    states = solve.trajectory(field, z, times, "euler")
    fixture.agree(states[:, :, 0], f"{key}/euler_5steps_z", single=1e-4, double=1e-8)
    sizes = fixture["sample/inputs/log_size"].exp().repeat(2)
    mean, inverse = model.autoencoder.decode(states[-1][:, 0], sizes)
    fixture.agree(mean, f"{key}/euler_5steps_mu", single=1e-4, double=1e-8)
    fixture.agree(inverse, f"{key}/euler_5steps_theta", single=1e-4)
    for method, name in (("midpoint", "midpoint"), ("heun", "heun2"), ("rk4_38", "rk4")):
        made = solve.integrate(field, z, times, method)[:, 0]
        fixture.agree(made, f"{key}/{name}_5steps_z", single=1e-4, double=1e-8)


@torch.no_grad()
@pytest.mark.parametrize("guidance", ["joint", "additive"])
def test_sampling_with_chosen_steps(exact, guidance):
    model = exact.flow(guidance=guidance, weights=exact.guidance)
    condition, sets = exact.condition(), exact.size("ae/config/B")
    guided, free = model.field(condition, exact.given(*CLASSES)), model.field(condition, exact.given())
    latest, calls = 0.0, 0

    def field(z: Tensor, t: Tensor) -> Tensor:
        nonlocal latest, calls
        latest, calls = max(latest, float(t)), calls + 1
        return torch.cat([free(z[:sets], t), guided(z[sets:], t)])

    noise = exact["sample/inputs/noise"]
    made = solve.adaptive(field, torch.cat([noise, noise])[:, None], 0.0, 1.0, 1e-5)[:, 0]
    exact.agree(made, f"sample/outputs/{guidance}/dopri5_z", double=1e-8)
    assert calls == int(exact.arrays[f"sample/outputs/{guidance}/dopri5_nfev"])
    assert latest == pytest.approx(float(exact.arrays[f"sample/outputs/{guidance}/dopri5_tmax"]), rel=1e-4)
    finer = solve.adaptive(field, torch.cat([noise, noise])[:, None], 0.0, 1.0, 1e-9)[:, 0]
    truth = torch.from_numpy(exact.arrays[f"sample/outputs64/{guidance}/exact_z"])
    torch.testing.assert_close(finer, truth, rtol=0, atol=2e-5 * truth.abs().max().item())


@pytest.mark.parametrize(
    ("stage", "preset"), [("stage1", scldm_vae.paper), ("stage2", scldm.paper)], ids=["stage 1", "stage 2"]
)
def test_learning_rates(exact, stage, preset):
    steps, warmup = exact.size("lr/T"), exact.size("lr/W")
    held = (steps - 2 * warmup) / steps if stage == "stage1" else 0.0
    training = replace(preset().train, steps=steps, warmup=warmup, plateau=held)
    assert training.lr == float(exact.arrays[f"lr/{stage}/base_lr"])
    for step, truth in zip(exact.arrays[f"lr/{stage}/steps"], exact.arrays[f"lr/{stage}/lr"], strict=True):
        if step >= steps:  # there is no such update
            continue
        assert learning_rate(int(step), training) == pytest.approx(float(truth), rel=1e-12)


def test_averaging(exact):
    training = scldm.paper().train
    for call, kept in zip(exact.arrays["ema/decay_calls"], exact.arrays["ema/decay"], strict=True):
        n = int(call) - 1 - training.ema_start
        if n > 0:
            assert min(training.ema, 1 - (1 + n) ** (-2 / 3)) == pytest.approx(float(kept), abs=1e-6)
    average, at = (
        None,
        dict(zip(exact.arrays["ema/calls"].tolist(), exact.arrays["ema/average"], strict=True)),
    )
    for k in range(1, max(at) + 1):
        weights = np.array([np.sin(k / 700), k * 1e-4, k >= 10015], dtype=float)
        kept = decay(k - 1, training)
        average = weights if average is None else kept * average + (1 - kept) * weights
        if k in at:
            np.testing.assert_allclose(average, at[k], atol=1e-6)


@pytest.mark.parametrize(("stage", "preset"), [("stage1", scldm_vae.paper), ("stage2", scldm.paper)])
def test_updates(exact, stage, preset):
    """Clipping, schedule and optimizer together, over given gradients."""
    gradients = exact["opt/inputs/grads"].double()
    held = {"plateau": 8 / 12} if stage == "stage1" else {}
    training: Training = replace(preset().train, steps=12, warmup=3, **held)
    parameter = nn.Parameter(exact["opt/inputs/p0"].double().clone())
    optimizer = torch.optim.AdamW([parameter], lr=training.lr, betas=training.betas, weight_decay=0.0)
    for step, gradient in enumerate(gradients):
        parameter.grad = gradient.clone()
        nn.utils.clip_grad_norm_([parameter], training.clip)
        optimizer.param_groups[0]["lr"] = learning_rate(step, training)
        optimizer.step()
        wanted = exact.arrays[f"opt/outputs/{stage}/params"][step]
        np.testing.assert_allclose(parameter.detach().numpy(), wanted, rtol=1e-6, atol=1e-9)


def test_library_sizes(exact):
    spec = exact.spec
    counts = exact.arrays["size/inputs/counts"].sum(1)
    cytokine, cell_type = (exact.arrays[f"size/inputs/label_{k}"] for k in CLASSES)
    labels = [
        Label.of([spec.perturbations[p]], covariates=[spec.covariates[0].levels[c]])
        for p, c in zip(cytokine, cell_type, strict=True)
    ]
    sizes = LibrarySizes(spec)
    sizes.fit({x: counts[[y == x for y in labels]] for x in sorted(set(labels))}, spec)

    def found(p: int, c: int, *given: bool) -> tuple[float, float]:
        one = Condition(
            perturbation=torch.tensor([[p + 1]]), dose=torch.zeros(1, 1), covariates=torch.tensor([[c]])
        )
        mean, spread = sizes.parameters_of(one, torch.tensor([given]))
        return float(mean), float(spread)

    out = {
        k.removeprefix("size/outputs/"): v for k, v in exact.arrays.items() if k.startswith("size/outputs/")
    }
    for p in range(len(spec.perturbations)):
        assert found(p, 0, True, False) == pytest.approx((out["mu_cytokine"][p], out["sd_cytokine"][p]))
    for c in range(len(spec.covariates[0].levels)):
        assert found(0, c, False, True) == pytest.approx((out["mu_cell_type"][c], out["sd_cell_type"][c]))
        for p in range(len(spec.perturbations)):
            if out["n_pair"][c, p]:
                wanted = out["mu_pair"][c, p], out["sd_pair"][c, p]
                assert found(p, c, True, True) == pytest.approx(wanted, abs=1e-7)
            else:  # the released program takes a library of 1 here
                assert found(p, c, True, True) == pytest.approx(
                    (out["mu_cytokine"][p], out["sd_cytokine"][p])
                )
    assert found(0, 0, False, False) == pytest.approx((float(out["mu_global"]), float(out["sd_global"])))
