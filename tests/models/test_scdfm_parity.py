"""The paper preset agrees with the numbers of the released program, name by name."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from torch import Tensor

from knockon.data import graph
from knockon.dynamics import discrepancy, flow, solve
from knockon.models import scdfm
from knockon.train import learning_rate
from knockon.types import Condition, Spec

from .parity import Parity

KINDS = ("single", "double", "drug")
PRECISIONS = (torch.float64, torch.float32)


class Fixture(Parity):
    def size(self, key: str) -> int:
        return int(self.arrays[f"meta/{key}"])

    def agree(self, ours: Tensor, key: str) -> None:
        """Compare with a key whose first part has a twin in float64, or is float64 already."""
        group, _, rest = key.partition("/")
        twin = f"{group}64/{rest}"
        truth = torch.from_numpy(np.asarray(self.arrays[twin if twin in self.arrays else key])).double()
        assert ours.shape == truth.shape, key
        scale = max(1.0, truth.abs().max().item())
        torch.testing.assert_close(
            ours.detach().double(),
            truth,
            rtol=1e-9 if self.exact else 0,
            atol=1e-9 if self.exact else 5e-5 * scale,
            msg=lambda text: f"{key}: {text}",
        )

    def spec(self, *, drugs: bool = False) -> Spec:
        """Perturbations are genes, or as many drugs as the table has rows beside ``control``."""
        genes = tuple(self.arrays["graph/gene_names"].tolist())
        names = tuple(f"drug{i:04d}" for i in range(1, self.size("ntoken")))
        return Spec(genes=genes, perturbations=names if drugs else genes, slots=2)

    def model(self, *, drugs: bool = False) -> scdfm.SCDFM:
        config = replace(
            scdfm.paper().model,
            width=self.size("d_model"),
            heads=self.size("nhead"),
            layers=self.size("nlayers"),
        )
        model = config.build(self.spec(drugs=drugs)).to(self.dtype)
        weights = {k.removeprefix("weights/"): v for k, v in self.arrays.items() if k.startswith("weights/")}
        state = scdfm.from_released(weights, model.spec)
        missing, unexpected = model.load_state_dict(state, strict=False)
        assert not unexpected
        assert not set(missing) & {name for name, _ in model.named_parameters()}
        correlations = self.correlations()
        model.network.genes.connect(graph.neighbors(correlations, int(self.arrays["graph/k"])))
        return model

    def correlations(self) -> np.ndarray:
        cells = sp.csr_matrix(self.arrays["graph/X"])
        return graph.correlation(cells, np.arange(cells.shape[0]), second_log=True)

    def positions(self, key: str) -> Tensor:
        """Places in our panel of released gene tokens."""
        place = {int(token): i for i, token in enumerate(self.arrays["graph/ids_of_gene_names"])}
        return torch.tensor([place[int(token)] for token in self.arrays[key]])

    def condition(self, key: str) -> Condition:
        """One row for each set; ``control`` is code 0."""
        tokens = torch.atleast_2d(torch.from_numpy(self.arrays[key]))
        if not key.endswith("drug"):
            place = {int(token): i + 1 for i, token in enumerate(self.arrays["graph/ids_of_gene_names"])}
            place[self.size("control_id")] = 0
            tokens = tokens.clone().apply_(lambda token: place[token])
        return Condition(
            perturbation=tokens,
            dose=torch.zeros(tokens.shape),
            covariates=torch.zeros(len(tokens), 0, dtype=torch.long),
        )


@pytest.fixture(scope="module")
def arrays(shared):
    with np.load(shared / "parity" / "scdfm.npz") as file:
        return dict(file)


@pytest.fixture(params=PRECISIONS, ids=["float64", "float32"])
def fixture(request, arrays):
    return Fixture(arrays, request.param)


@pytest.fixture
def exact(arrays):
    return Fixture(arrays, torch.float64)


# ---- graph ------------------------------------------------------------------------------------------


def test_correlations(exact):
    cells = sp.csr_matrix(exact.arrays["graph/X"])
    mean, std = graph.moments(cells, np.arange(cells.shape[0]), second_log=True)
    assert std[int(exact.arrays["graph/zero_variance_column"])] == 0
    scores = (np.log1p(np.maximum(cells.toarray(), 0)) - mean) / np.where(std > 0, std, 1)
    np.testing.assert_allclose(scores, exact.arrays["graph/zscored"], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(exact.correlations(), exact.arrays["graph/corr"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("variant", ["negative", "signed"])
def test_neighbors(exact, variant):
    arrays = exact.arrays
    found = graph.neighbors(exact.correlations(), int(arrays["graph/k"]), negative=variant == "negative")
    np.testing.assert_array_equal(~found.toarray(), arrays[f"graph/mask_raw_{variant}"])
    model = exact.model()
    model.network.genes.connect(found)
    vocabulary = exact.size("vocab_size")
    tokens = torch.tensor([exact.size("control_id"), *arrays["graph/ids_of_gene_names"].tolist()])
    row, column = model.network.genes.edges(torch.arange(len(tokens)))
    forbidden = torch.ones(vocabulary, vocabulary, dtype=torch.bool).fill_diagonal_(False)
    forbidden[tokens[row], tokens[column]] = False
    np.testing.assert_array_equal(forbidden.numpy(), arrays[f"graph/mask_padded_{variant}"])


# ---- network ----------------------------------------------------------------------------------------


def record(model: scdfm.SCDFM, names: Mapping[str, str]) -> dict[str, Tensor]:
    """Outputs of submodules, by the fixture's names, filled in when the network runs."""
    seen: dict[str, Tensor] = {}
    for name, key in names.items():
        model.network.get_submodule(name).register_forward_hook(
            lambda _module, _inputs, output, key=key: seen.__setitem__(key, output)
        )
    return seen


def velocity(fixture: Fixture, model: scdfm.SCDFM, kind: str, t: Tensor) -> Tensor:
    condition, control = fixture.condition(f"inputs/pert_{kind}"), fixture["inputs/control"]
    g, p = model.network.encode(fixture.positions("inputs/gene_ids"), condition)
    known = model.network.know(g, control, p.expand(len(control), -1))
    return model.velocity(fixture.positions("inputs/gene_ids"), fixture["inputs/x_t"], t, known)


@pytest.mark.parametrize("kind", KINDS)
def test_every_step_of_the_network(fixture, kind):
    model = fixture.model(drugs=kind == "drug")
    names = {
        "genes": "slots",
        "genes.attention": "attended",
        "values": "common/value_x",
        "control_values": "common/value_control",
        "fusion_out": "common/fusion",
        "time": "common/time",
        "conditions": "condition",
    }
    for i in range(fixture.size("nlayers")):
        names |= {
            f"layers.{i}.genes": f"{kind}/layer{i}/gene_adaln",
            f"layers.{i}.adapter": f"{kind}/layer{i}/adapter",
            f"layers.{i}.to_state.attention": f"{kind}/layer{i}/self_attention",
            f"layers.{i}.to_state": f"{kind}/layer{i}/self_block",
            f"layers.{i}.to_control.attention": f"{kind}/layer{i}/control_attention",
            f"layers.{i}.to_control": f"{kind}/layer{i}/control_block",
        }
    seen = record(model, names)
    with torch.no_grad():
        v = velocity(fixture, model, kind, fixture["inputs/t"])
    genes = fixture.size("n_query_genes")
    seen["common/gene_encoding"], _, slots = seen.pop("slots").split([genes, 1, len(seen["condition"]) * 2])
    seen["common/gene_attention"] = seen.pop("attended")[:genes]
    p = seen.pop("condition")
    seen[f"{kind}/perturbation"] = p if kind == "drug" else p[0]
    if kind != "drug":
        seen[f"{kind}/perturbation_slots"] = slots
    for key, ours in seen.items():
        fixture.agree(ours, f"outputs/{key}")
    fixture.agree(v, f"outputs/{kind}/velocity")


def test_parts_that_the_network_does_not_show(fixture):
    network = fixture.model().network
    place = fixture.positions("inputs/gene_ids")
    memory = network.genes.memory()
    fixture.agree(memory[place + 1], "outputs/common/gene_norm")
    order = torch.from_numpy(np.argsort(fixture.arrays["graph/ids_of_gene_names"]))
    ours = torch.cat([memory[:1], memory[1:][order]])
    whole = fixture.arrays["outputs64/common/gene_memory"][fixture.size("control_id") :]
    replace_key = Fixture({"outputs64/memory": whole}, fixture.dtype)
    replace_key.agree(ours, "outputs/memory")
    fixture.agree(network.time.waves(fixture["inputs/t"]), "outputs/common/time_features")
    probe = fixture["inputs/value_probe"]
    fixture.agree(network.values(probe), "outputs/common/value_probe_x")
    fixture.agree(network.control_values(probe), "outputs/common/value_probe_control")


def test_one_time_for_all_cells(fixture):
    t = fixture["inputs/t_scalar"].expand(fixture.size("batch"))
    fixture.agree(velocity(fixture, fixture.model(), "double", t), "outputs/double/velocity_scalar_t")


def test_label_head_on_the_last_state(fixture):
    model = fixture.model()
    seen = record(model, {f"layers.{fixture.size('nlayers') - 1}": "last"})
    velocity(fixture, model, "double", fixture["inputs/t"])
    weights = [fixture[f"weights/p_head.{name}"] for name in ("0.weight", "0.bias", "1.weight", "1.bias")]
    pooled = seen["last"].mean(dim=1)
    normed = torch.nn.functional.layer_norm(pooled, pooled.shape[-1:], *weights[:2])
    fixture.agree(torch.nn.functional.linear(normed, *weights[2:]), "outputs/double/predict_p")


def test_a_batch_of_different_conditions(exact):
    """Each condition has its own neighbors; the released program gave all of them the first one's."""
    model = exact.model()
    mixed = Condition(
        perturbation=torch.cat(
            [exact.condition(f"inputs/pert_{k}").perturbation for k in ("single", "double")]
        ),
        dose=torch.zeros(2, 2),
        covariates=torch.zeros(2, 0, dtype=torch.long),
    )
    _, p = model.network.encode(exact.positions("inputs/gene_ids"), mixed)
    exact.agree(p[0], "outputs/single/perturbation")
    exact.agree(p[1], "outputs/double/perturbation")


@pytest.mark.parametrize(("which", "block"), [("self", "to_state"), ("control", "to_control")])
def test_attention_and_block_alone(fixture, which, block):
    layer = int(fixture.arrays["attn/layer"])
    module = fixture.model().network.layers[layer].get_submodule(block)
    attention = module.attention
    projected = attention.project(fixture["attn/reference_states"])
    queries = fixture["attn/query_states"]
    assert attention.initial == pytest.approx(float(fixture.arrays[f"attn/{which}/lambda_init"]), rel=1e-12)
    fixture.agree(attention.weight(), f"attn/{which}/lambda")
    context = attention.context(queries, projected)
    fixture.agree(context, f"attn/{which}/context")
    fixture.agree(attention.normalize(context) / (1 - attention.initial), f"attn/{which}/normed")
    q1, k1, q2, k2, _ = attention.both(queries, projected)
    for number, logits in enumerate((q1 @ k1.mT, q2 @ k2.mT), start=1):
        fixture.agree((logits / q1.shape[-1] ** 0.5).softmax(-1), f"attn/{which}/map{number}")
    fixture.agree(attention(queries, projected), f"attn/{which}/out")
    fixture.agree(attention(fixture["attn/query_states_small"], projected), f"attn/{which}/out_small")
    reference = None if which == "self" else attention.project(fixture["block/reference_states"])
    fixture.agree(module(fixture["block/y_small"], fixture["block/tau"], reference), f"block/{which}/out")


def test_lambda_begins_larger_in_deeper_layers(exact):
    config = replace(scdfm.paper().model, width=16, heads=2, layers=6)
    layers = config.build(Spec(genes=("a",), perturbations=("a",))).network.layers
    ours = [layer.to_state.attention.initial for layer in layers]
    np.testing.assert_allclose(ours, exact.arrays["attn/lambda_init_of_layer"], rtol=1e-12)
    assert ours == [layer.to_control.attention.initial for layer in layers]


# ---- losses -----------------------------------------------------------------------------------------


def test_losses(fixture):
    model = fixture.model()
    x0, x1, t = fixture["losses/x0"], fixture["losses/x1"], fixture["losses/t"]
    genes = fixture.positions("losses/gene_ids")
    x_t = flow.interpolate(x0, x1, t)
    fixture.agree(x_t, "losses/x_t")
    fixture.agree(flow.velocity(x0, x1), "losses/target_velocity")
    g, p = model.network.encode(genes, fixture.condition("losses/pert"))
    v = model.velocity(genes, x_t, t, model.network.know(g, fixture["losses/control"], p.expand(len(x1), -1)))
    fixture.agree(v, "losses/velocity")
    x1_hat = flow.endpoint(x_t, v, t)
    fixture.agree(x1_hat, "losses/x1_hat")
    bandwidths = discrepancy.median_bandwidths(x1)
    fixture.agree(bandwidths, "losses/sigmas")
    fixture.agree(bandwidths[1].square(), "losses/median_sq_dist")
    fixture.agree(discrepancy.mmd_per_kernel(x1_hat, x1, bandwidths), "losses/mmd_per_kernel")


def objective(fixture: Fixture, model: scdfm.SCDFM) -> dict[str, Tensor]:
    pairs = [fixture[f"losses/{name}"][None] for name in ("x0", "x1", "control", "t")]
    condition = fixture.condition("losses/pert")
    return model.objective(fixture.positions("losses/gene_ids"), scdfm.Pairs(*pairs), condition)


def test_objective(fixture):
    model = fixture.model()
    assert model.config.mmd == float(fixture.arrays["losses/gamma"])
    losses = objective(fixture, model)
    for ours, theirs in (("flow", "cfm"), ("mmd", "mmd"), ("total", "total")):
        fixture.agree(losses[ours], f"losses/{theirs}")


def test_gradients(exact):
    model = exact.model()
    objective(exact, model)["total"].backward()
    theirs = {k.removeprefix("grads/"): v for k, v in exact.arrays.items() if k.startswith("grads/")}
    translated = scdfm.from_released(theirs, model.spec)
    for name, parameter in model.named_parameters():
        bound = 1e-6 * max(1.0, translated[name].abs().max().item())
        torch.testing.assert_close(parameter.grad, translated[name].double(), rtol=0, atol=bound, msg=name)
    without = {"p_head", "p_mask_embed", "perturbation_embedder"}
    assert {name.split(".")[0] for name in exact.arrays["grads_none/names"].tolist()} == without


def test_discrepancy_alone(fixture):
    x, y = fixture["mmd/X"], fixture["mmd/Y"]
    bandwidths = discrepancy.median_bandwidths(y)
    fixture.agree(bandwidths, "mmd/sigmas")
    fixture.agree(discrepancy.mmd_per_kernel(x, y, bandwidths), "mmd/per_kernel")
    value = discrepancy.mmd(x, y)
    fixture.agree(value, "mmd/value")
    assert value.item() == pytest.approx(fixture.arrays["mmd64/value"].item(), abs=1e-5)


# ---- generation and schedule ------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "method"), [("rk4", "rk4_38"), ("euler", "euler")])
def test_generation(fixture, name, method):
    model = fixture.model()
    genes, control = fixture.positions("sample/gene_ids"), fixture["sample/control"]
    grid = torch.linspace(0, 1, len(fixture.arrays[f"sample/{name}/grid"]), dtype=fixture.dtype)
    calls: list[float] = []
    with torch.no_grad():
        g, p = model.network.encode(genes, fixture.condition("sample/pert"))
        known = model.network.know(g, control, p.expand(len(control), -1))

        def field(x: Tensor, t: Tensor) -> Tensor:
            calls.append(float(t))
            return model.velocity(genes, x, t.expand(len(x)), known)

        path = solve.trajectory(field, fixture["sample/noise"], grid, method)
        end = solve.integrate(field, fixture["sample/noise"], grid, method)
    evaluations = int(fixture.arrays[f"sample/{name}/nfe"])
    np.testing.assert_allclose(grid, fixture.arrays[f"sample/{name}/grid"], rtol=1e-6)
    assert solve.evaluations(method, len(grid)) == evaluations == len(calls) // 2
    np.testing.assert_allclose(calls[:evaluations], fixture.arrays[f"sample/{name}/times"], atol=1e-6)
    fixture.agree(path, f"sample/{name}/trajectory")
    fixture.agree(end, f"sample/{name}/end")
    fixture.agree(end.clamp_min(0), f"sample/{name}/clamped")


def test_learning_rate(exact):
    arrays = exact.arrays
    training = replace(
        scdfm.paper().train,
        steps=int(arrays["schedule/steps"]),
        lr=float(arrays["schedule/lr_max"]),
        final_lr=float(arrays["schedule/lr_min"]),
    )
    ours = [learning_rate(step, training) for step in range(len(arrays["schedule/lr"]))]
    np.testing.assert_allclose(ours, arrays["schedule/lr"], rtol=1e-9)
