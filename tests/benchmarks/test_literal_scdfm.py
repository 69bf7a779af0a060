"""The literal formulation agrees with the numbers of the released program, name by name."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from benchmarks import literal_scdfm, scdfm
from benchmarks.literal_scdfm import Given, LiteralScDFM
from torch import Tensor

CONDITIONS = ("single", "double", "drug")
TOP = {
    "encoder.enc_norm": "common/gene_norm",
    "encoder.perturbation_interaction.cross_attn": "common/gene_attention",
    "encoder": "common/gene_encoding",
    "value_encoder_1": "common/value_x",
    "value_encoder_2": "common/value_control",
    "fusion_layer": "common/fusion",
    "t_embedder": "common/time",
}


class Fixture:
    """The parity file; floating point arrays as float64 tensors."""

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        self.arrays = arrays

    def __getitem__(self, key: str) -> Tensor:
        value = torch.from_numpy(np.asarray(self.arrays[key]))
        return value.double() if value.is_floating_point() else value

    def network(self, *, drugs: bool = False) -> LiteralScDFM:
        network = LiteralScDFM(
            self["graph/mask_padded_negative"],
            dim=int(self["meta/d_model"]),
            heads=int(self["meta/nhead"]),
            layers=int(self["meta/nlayers"]),
            table_rows=int(self["meta/ntoken"]),
            drugs=drugs,
        )
        weights = {
            name.removeprefix("weights/"): self[name] for name in self.arrays if name.startswith("weights/")
        }
        network.load_state_dict(weights)
        return network.double().eval()

    def given(self, where: str, perturbation: str) -> Given:
        control = self[f"{where}/control"]
        return Given(
            gene_ids=self[f"{where}/gene_ids"].expand(len(control), -1),
            control=control,
            perturbation=self[f"{where}/{perturbation}"].expand(len(control), -1),
        )


@pytest.fixture(scope="module")
def fixture(shared):
    with np.load(shared / "parity" / "scdfm.npz") as arrays:
        return Fixture(dict(arrays))


def agree(ours: Tensor, theirs: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def steps_of(network: LiteralScDFM, kind: str) -> dict[str, str]:
    """Fixture keys of what the network's modules return."""
    names = dict(TOP)
    for i in range(len(network.blocks)):
        names |= {
            f"gene_adaLN.{i}": f"{kind}/layer{i}/gene_adaln",
            f"adapter_layer.{i}": f"{kind}/layer{i}/adapter",
            f"blocks.{i}.diff_self_attn.attn": f"{kind}/layer{i}/self_attention",
            f"blocks.{i}.diff_self_attn": f"{kind}/layer{i}/self_block",
            f"blocks.{i}.diff_cross_attn.attn": f"{kind}/layer{i}/control_attention",
            f"blocks.{i}.diff_cross_attn": f"{kind}/layer{i}/control_block",
        }
    return names


@pytest.mark.parametrize("kind", CONDITIONS)
def test_every_step_of_the_network(fixture, kind):
    network = fixture.network(drugs=kind == "drug")
    seen = {}
    for name in steps_of(network, kind):
        network.get_submodule(name).register_forward_hook(
            lambda _module, _inputs, output, name=name: seen.__setitem__(name, output)
        )
    with torch.no_grad():
        velocity = network(
            fixture.given("inputs", f"pert_{kind}"), fixture["inputs/x_t"], fixture["inputs/t"]
        )
    for name, key in steps_of(network, kind).items():
        ours = seen[name][0] if isinstance(seen[name], tuple) else seen[name]
        theirs = fixture[f"outputs64/{key}"]
        agree(ours[0] if ours.ndim > theirs.ndim else ours, theirs)
    agree(velocity, fixture[f"outputs64/{kind}/velocity"])


def test_float32_as_the_released_program(fixture):
    network, given = fixture.network().float(), fixture.given("inputs", "pert_double")
    with torch.no_grad():
        velocity = network(
            replace(given, control=given.control.float()),
            fixture["inputs/x_t"].float(),
            fixture["inputs/t"].float(),
        )
    agree(velocity.double(), fixture["outputs64/double/velocity"], 5e-5)


@pytest.mark.parametrize("kind", CONDITIONS)
def test_condition(fixture, kind):
    given = fixture.given("inputs", f"pert_{kind}")
    with torch.no_grad():
        p = fixture.network(drugs=kind == "drug").condition(given.perturbation)
    theirs = fixture[f"outputs64/{kind}/perturbation"]
    agree(p, theirs.expand_as(p))


def test_values_beyond_the_clamp(fixture):
    network, probe = fixture.network(), fixture["inputs/value_probe"]
    agree(network.value_encoder_1(probe), fixture["outputs64/common/value_probe_x"])
    agree(network.value_encoder_2(probe), fixture["outputs64/common/value_probe_control"])


@pytest.mark.parametrize("which", ["self", "control"])
def test_small_inputs_where_the_epsilons_decide(fixture, which):
    layer = fixture.network().blocks[int(fixture["attn/layer"])]
    block = layer.diff_self_attn if which == "self" else layer.diff_cross_attn
    reference = fixture["attn/reference_states"]
    agree(block.attn(fixture["attn/query_states"], reference), fixture[f"attn64/{which}/out"])
    agree(block.attn(fixture["attn/query_states_small"], reference), fixture[f"attn64/{which}/out_small"])
    agree(block.attn.strength(), fixture[f"attn64/{which}/lambda"])
    y = fixture["block/y_small"]
    block_reference = y if which == "self" else fixture["block/reference_states"]
    agree(block(y, block_reference, fixture["block/tau"]), fixture[f"block64/{which}/out"])


def test_loss_and_gradients(fixture):
    network = fixture.network()
    losses = literal_scdfm.loss(
        network,
        fixture.given("losses", "pert"),
        fixture["losses/x0"],
        fixture["losses/x1"],
        fixture["losses/t"],
        gamma=float(fixture["losses/gamma"]),
    )
    for name, value in losses.items():
        agree(value, fixture[f"losses64/{name}"])
    losses["total"].backward()
    without = set(fixture.arrays["grads_none/names"].tolist())
    for name, parameter in network.named_parameters():
        assert (parameter.grad is None) == (name in without), name
        if parameter.grad is not None:
            theirs = fixture[f"grads/{name}"]
            bound = 1e-6 * max(1.0, theirs.abs().max().item())
            torch.testing.assert_close(parameter.grad, theirs, rtol=0, atol=bound)


def test_discrepancy_alone(fixture):
    per_kernel = literal_scdfm.kernel_discrepancies(fixture["mmd/X"], fixture["mmd/Y"])
    agree(per_kernel, fixture["mmd64/per_kernel"])
    agree(per_kernel.mean(), fixture["mmd64/value"])


@pytest.mark.parametrize(
    ("solver", "step"), [("rk4", literal_scdfm.rk4_step), ("euler", literal_scdfm.euler_step)]
)
def test_generation(fixture, solver, step):
    states = literal_scdfm.trajectory(
        fixture.network(),
        fixture.given("sample", "pert"),
        fixture["sample/noise"],
        points=len(fixture[f"sample/{solver}/grid"]),
        step=step,
    )
    agree(torch.stack(list(states)), fixture[f"sample64/{solver}/trajectory"])
    agree(states[-1].clamp_min(0), fixture[f"sample64/{solver}/clamped"])


def test_knockon_gives_the_same_numbers():
    size, device = scdfm.SIZES["quick"], torch.device("cpu")
    literal, fast = scdfm.LiteralContestant(size, device), scdfm.KnockonContestant(size, device)
    fast.take(literal.network)
    cells = scdfm.Cells.draw(size, size.cells, device)
    found = scdfm.deviations(size, literal, fast, cells)
    assert found.keys() == {"velocity", "generation", "loss", "gradients"}
    assert max(found.values()) < 1e-5
