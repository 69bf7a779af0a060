from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from knockon.nn.conditions import ConditionEncoder, GeneEncoder, Projection
from knockon.types import Condition, Covariate, Label, Spec

DIM = 16
SPEC = Spec(genes=("a", "b", "c"), perturbations=("a", "c", "drug", "other"), slots=3)


def encode(encoder: ConditionEncoder, genes: GeneEncoder, condition: Condition) -> torch.Tensor:
    tokens = encoder.token[condition.perturbation]
    return encoder(condition, genes(tokens.flatten()).unflatten(0, tokens.shape), genes(torch.tensor([0]))[0])


@pytest.fixture
def genes():
    return GeneEncoder(3, DIM, dropout=0.0)


def labels(*names: str, spec: Spec = SPEC, doses: tuple[float, ...] = ()) -> Condition:
    return spec.encode([Label.of(name.split("+"), doses) for name in names])


def test_a_gene_reads_its_neighbors_and_nobody_else(genes):
    genes.connect(sp.csr_matrix(np.array([[1, 1, 0], [1, 1, 0], [0, 0, 1]], dtype=bool)))
    before = genes(torch.arange(4))
    with torch.no_grad():
        genes.table.weight[2] += torch.linspace(-1, 1, DIM)  # gene b; a constant would be normalized away
    changed = (genes(torch.arange(4)) != before).any(dim=1)
    assert changed.tolist() == [False, True, True, False]


def test_without_a_graph_every_token_sees_itself(genes):
    row, column = genes.edges(torch.tensor([2, 0, 2]))
    assert row.tolist() == [0, 1, 2]
    assert column.tolist() == [2, 0, 2]


def test_a_single_is_half_nothing_and_slots_have_no_order(genes):
    encoder = ConditionEncoder(SPEC, DIM)
    single, double = encode(encoder, genes, labels("a", "a+c"))
    nothing, a, _, c = genes(torch.arange(4))
    torch.testing.assert_close(single, (a + nothing) / 2)
    torch.testing.assert_close(double, (a + c) / 2)
    condition = labels("a+c", "c+drug")
    flipped = replace(condition, perturbation=condition.perturbation.flip(1))
    torch.testing.assert_close(encode(encoder, genes, flipped), encode(encoder, genes, condition))


def test_control_is_nothing_and_three_are_a_mean(genes):
    encoder = ConditionEncoder(SPEC, DIM)
    control, triple = encode(encoder, genes, SPEC.encode([Label(), Label.of(["a", "c", "drug"])]))
    nothing, a, _, c = genes(torch.arange(4))
    torch.testing.assert_close(control, nothing)
    torch.testing.assert_close(triple, (a + c + encoder.own(torch.tensor(3))) / 3)


def test_drugs_alone_have_a_nothing_of_their_own(genes):
    encoder = ConditionEncoder(replace(SPEC, perturbations=("drug", "other")), DIM)
    (single,) = encode(encoder, genes, labels("drug", spec=replace(SPEC, perturbations=("drug", "other"))))
    torch.testing.assert_close(single, encoder.own(torch.tensor([0, 1])).mean(0))


def test_doses_change_only_perturbations_that_have_one(genes):
    spec = replace(SPEC, dose_unit="uM")
    encoder = ConditionEncoder(spec, DIM)
    low, high = (encode(encoder, genes, labels("drug", spec=spec, doses=(dose,))) for dose in (0.1, 10.0))
    none = encode(encoder, genes, labels("drug", spec=spec))
    assert not torch.allclose(low, high)
    own = encoder.own(torch.tensor(3))
    torch.testing.assert_close(none[0], (own + genes(torch.tensor([0]))[0]) / 2)


def test_vectors_give_a_basis_to_the_unseen(genes):
    vectors = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    vectors[3] = np.nan
    encoder = ConditionEncoder(replace(SPEC, vectors=vectors), DIM)
    assert encoder.based().tolist() == [True, True, True, True, False]
    assert encode(encoder, genes, labels("other", "drug", "a")).isfinite().all()
    projection = Projection(vectors, DIM)
    codes = torch.tensor([0, 1, 4])
    before = projection(codes)
    projection.rows.weight.data.normal_()
    assert [torch.equal(*pair) for pair in zip(before, projection(codes), strict=True)] == [True, True, False]
    assert Projection(vectors[:3], DIM).rows is None
    vectors[:] = np.nan
    nothing = ConditionEncoder(replace(SPEC, vectors=vectors), DIM)
    torch.testing.assert_close(
        encode(nothing, genes, labels("a")), encode(ConditionEncoder(SPEC, DIM), genes, labels("a"))
    )
    assert ConditionEncoder(SPEC, DIM).based().tolist() == [True, True, True, False, False]


def test_an_unseen_level_changes_nothing(genes):
    spec = replace(SPEC, covariates=(Covariate("type", ("x", "y")),))
    encoder = ConditionEncoder(spec, DIM)
    condition = spec.encode([Label.of(["a"], covariates=["x"]), Label.of(["a"], covariates=["y"])])
    x, y = encode(encoder, genes, condition)
    assert torch.equal(x, y)
    with torch.no_grad():
        encoder.covariates[0].weight[1] = 1.0
    x, y = encode(encoder, genes, condition)
    torch.testing.assert_close(y, x + 1)
