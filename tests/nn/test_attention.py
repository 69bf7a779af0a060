import math

import pytest
import torch

from knockon.nn.attention import (
    CellByCell,
    DifferentialAttention,
    NeighborAttention,
    SoftmaxAttention,
    difference,
    segment_softmax,
)

DIM, HEADS = 16, 2


def maps(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)


@pytest.mark.parametrize("reference", ["state", "control"])
def test_two_fused_attentions_are_one_attention_over_the_difference(rng, reference):
    attention = DifferentialAttention(DIM, HEADS, depth=1, reference=reference).double()
    state, other = torch.randn(2, 3, 7, DIM, generator=rng, dtype=torch.float64)
    projected = attention.project(other)
    q1, k1, q2, k2, values = attention.both(state, projected)
    stored = maps(q1, k1) - attention.weight() * maps(q2, k2)
    torch.testing.assert_close(attention.context(state, projected), stored @ values)


def test_a_control_reference_gives_the_second_map_alone(rng):
    attention = DifferentialAttention(DIM, HEADS, depth=0, reference="control")
    state, other = torch.randn(2, 3, 7, DIM, generator=rng)
    q1, k1, q2, k2, _ = attention.both(state, attention.project(other))
    q1_, k1_, q2_, k2_, _ = attention.both(state + 1, attention.project(other))
    assert not torch.equal(q1, q1_)
    assert not torch.equal(k1, k1_)
    assert torch.equal(q2, q2_)
    assert torch.equal(k2, k2_)


@pytest.mark.parametrize("reference", ["state", "control"])
def test_softmax_attention_mixes_values(rng, reference):
    attention = SoftmaxAttention(DIM, HEADS, reference=reference)
    state, other = torch.randn(2, 3, 7, DIM, generator=rng)
    with torch.no_grad():
        same = attention(state, attention.project(other[:, :1].expand(-1, 7, -1)))
    values_vary = reference == "state"
    assert same.shape == state.shape
    uniform = torch.allclose(same, same[:, :1].expand_as(same), atol=1e-6)
    assert uniform  # equal keys: every gene gets the mean of the values, whoever gives them
    assert values_vary != torch.allclose(
        same, attention(state + 1, attention.project(other[:, :1].expand(-1, 7, -1))), atol=1e-6
    )


def test_segment_softmax_is_softmax_within_segments(rng):
    logits = 50 * torch.randn(6, 2, generator=rng)
    segment = torch.tensor([0, 0, 1, 2, 2, 2])
    expected = torch.cat([part.softmax(0) for part in logits.split([2, 1, 3])])
    torch.testing.assert_close(segment_softmax(logits, segment, 3), expected)


def test_attention_over_edges_is_masked_attention(rng):
    attention = NeighborAttention(DIM, HEADS).double()
    tokens = torch.randn(5, DIM, generator=rng, dtype=torch.float64)
    memory = torch.randn(9, DIM, generator=rng, dtype=torch.float64)
    allowed = torch.rand(5, 9, generator=rng) < 0.4
    allowed[:, 0] = True
    q = attention.query(tokens).unflatten(-1, (HEADS, -1)).transpose(0, 1)
    k, v = (x.unflatten(-1, (HEADS, -1)).transpose(0, 1) for x in attention.key_value(memory).chunk(2, -1))
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
    row, column = allowed.nonzero(as_tuple=True)
    ours = attention(tokens, memory, (row, column), 0.0, None)
    torch.testing.assert_close(ours, attention.out(dense.transpose(0, 1).flatten(-2)))


@pytest.mark.slow
def test_cell_by_cell_is_the_same_attention(rng):
    inputs = [torch.randn(3, HEADS, 7, 4, generator=rng, dtype=torch.float64) for _ in range(5)]
    inputs = [x.requires_grad_() for x in [*inputs, torch.tensor(0.3, dtype=torch.float64)]]
    torch.testing.assert_close(CellByCell.apply(*inputs), difference(*inputs))
    assert torch.autograd.gradcheck(CellByCell.apply, inputs)


def test_bf16_on_a_cpu(rng):
    inputs = [torch.randn(3, HEADS, 7, 4, generator=rng) for _ in range(5)]
    weight = torch.tensor(0.3)
    rough = difference(*(x.bfloat16() for x in inputs), weight)
    assert rough.dtype == torch.bfloat16
    torch.testing.assert_close(rough.float(), difference(*inputs, weight), rtol=0.05, atol=0.05)
