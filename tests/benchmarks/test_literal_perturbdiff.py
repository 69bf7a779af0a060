"""What knockon is timed against says what the released program says."""

import numpy as np
import pytest
import torch
from benchmarks import perturbdiff
from benchmarks.literal_perturbdiff import Given, LiteralPerturbDiff

DEAD = ("gene_embedding.gene_embedding", "gene_embedding.layer_norm")


@pytest.fixture(scope="module")
def arrays(shared):
    with np.load(shared / "parity" / "perturbdiff.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files if file[key].dtype.kind in "fi"}


@pytest.fixture(scope="module")
def literal(arrays):
    genes, width, layers, heads, _, _, branch, p, c, q = arrays["meta/sizes"].tolist()
    network = LiteralPerturbDiff(
        genes=genes, tables=(p + 1, c, q), dim=width, heads=heads, layers=layers, branch=branch
    )
    weights = {k.removeprefix("weights/"): v for k, v in arrays.items() if k.startswith("weights/")}
    network.load_state_dict({k: v for k, v in weights.items() if not any(dead in k for dead in DEAD)})
    return network


def given(arrays, control):
    labels = [arrays[f"inputs/net/cov_{k}"] for k in ("pert", "celltype", "batch")]
    return Given(arrays[control], torch.stack([labels[0] + 1, *labels[1:]], dim=-1))


@pytest.mark.parametrize(("case", "shown"), [("a_cond_sc0", False), ("b_cond_sc1", True)])
def test_a_training_step(arrays, literal, case, shown):
    inputs = (arrays[f"inputs/train/{key}"] for key in ("x_start", "t", "noise"))
    loss = literal.loss(given(arrays, "inputs/train/control"), *inputs, shown=shown)
    assert loss.item() == pytest.approx(arrays[f"outputs/f32/train/{case}/loss"].item(), rel=1e-3)


def test_a_chain(arrays, literal):
    start = arrays["inputs/sample/x_init"]
    made = literal.generate(given(arrays, "inputs/sample/control"), start, visited=6, guidance=1.0)
    torch.testing.assert_close(
        made, arrays["outputs/f64/sample/ddim_start6_w1/final"].float(), rtol=0, atol=5e-4
    )


def test_the_benchmark_runs():
    text = perturbdiff.main(["--quick", "--repeats", "1", "--threads", "1"])
    assert text.count("| sampling |") == 2
