"""What knockon's scLDM is timed against says what the released program says, and what knockon says."""

import numpy as np
import pytest
import torch
from benchmarks import scldm
from benchmarks.literal_scldm import Attend, Given, LiteralAutoencoder, LiteralFlow, Sizes

CLASSES = ("cytokine", "cell_type")


@pytest.fixture(scope="module")
def arrays(shared):
    with np.load(shared / "parity" / "scldm.npz") as file:
        return {key: torch.from_numpy(np.asarray(file[key])) for key in file.files}


@pytest.fixture(scope="module")
def literal(arrays):
    n = {k.removeprefix("ae/config/"): int(v) for k, v in arrays.items() if k.startswith("ae/config/")}
    flow = {k.removeprefix("dit/config/"): int(v) for k, v in arrays.items() if k.startswith("dit/config/")}
    sizes = Sizes(
        genes=n["G"],
        width=n["E"],
        latents=n["M"],
        latent_width=n["D"],
        layers=n["L"],
        heads=n["H"],
        cross_heads=n["Hc"],
        flow_width=flow["C"],
        flow_layers=flow["layers"],
        flow_heads=flow["heads"],
        tables={name: flow[f"vocab_{name}"] for name in CLASSES},
    )
    made = LiteralAutoencoder(sizes), LiteralFlow(sizes)
    for network, prefix in zip(made, ("ae/weights/", "dit/weights/"), strict=True):
        network.load_state_dict(
            {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
        )
    return made


@pytest.fixture
def given(arrays):
    made = Given.of(arrays["ae/inputs/counts"], int(arrays["ae/config/d"]))
    for name in vars(made):
        assert torch.equal(getattr(made, name), arrays[f"ae/inputs/{name}"]), name
    return made


def agree(ours, theirs, tolerance=2e-5):
    atol = tolerance * max(1e-3, theirs.abs().max().item())
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


@pytest.mark.parametrize("fused", [False, True])
def test_stage_one(arrays, literal, given, fused, monkeypatch):
    monkeypatch.setattr(Attend, "FUSED", fused)
    network, key = literal[0], "ae/outputs/log1p/expressed"
    z = network.encode(given)
    agree(z, arrays[f"{key}/z"])
    mean, inverse = network.decode(z, given.genes, given.library_size)
    agree(mean, arrays[f"{key}/mu"])
    agree(inverse, arrays[f"{key}/theta"])
    agree(network.loss(given), arrays[f"{key}/loss"])


def labels(arrays):
    return {name: arrays[f"dit/inputs/label_{name}"] for name in CLASSES}


def test_stage_two(arrays, literal, given):
    network, inputs = literal[1], "train/joint/inputs"
    z = literal[0].encode(given)
    hidden = arrays[f"{inputs}/drop"].bool()
    loss = network.loss(z, arrays[f"{inputs}/x0"], arrays[f"{inputs}/t"], labels(arrays), hidden)
    agree(loss, arrays["train/joint/outputs/loss"])


@pytest.mark.slow
def test_sampling(arrays, literal):
    weight = np.mean([arrays[f"dit/inputs/weight_{name}"] for name in CLASSES]).item()
    noise, x, t = arrays["sample/inputs/noise"], arrays["dit/inputs/x"], arrays["dit/inputs/t"]
    found = literal[1].guided(torch.cat([x, x]), torch.cat([t, t]), labels(arrays), weight)
    agree(found, arrays["dit/outputs/guided_joint"])
    z = literal[1].generate(noise, labels(arrays), steps=5, weight=weight)
    agree(z, arrays["sample/outputs/joint/heun2_5steps_z"], 1e-4)


def test_knockon_gives_the_same_numbers():
    size = scldm.SIZES["quick"]
    literal = scldm.Literal(size)
    found = scldm.deviations(size, literal, scldm.Ours(size, literal), cells=4)
    assert {"latents", "means", "loss", "gradients", "velocity", "guided"} <= found.keys()
    assert max(found.values()) < 1e-5


def test_the_benchmark_runs():
    text = scldm.main(["--size", "quick", "--repeats", "1", "--threads", "1", "--only", *scldm.TASKS[1:]])
    assert text.count("| knockon |") == 4
    scldm.prepare("knockon", scldm.SIZES["quick"], threads=1)()
