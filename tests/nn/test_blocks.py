import pytest
import torch

from knockon.nn.attention import DifferentialAttention
from knockon.nn.blocks import (
    VALUE_LIMIT,
    Block,
    FeedForward,
    GeneModulation,
    Joined,
    TimeEncoder,
    ValueEncoder,
    dropout,
)

DIM = 16


def test_dropout_needs_a_generator_and_repeats_with_it(rng):
    x = torch.ones(200, 50)
    assert dropout(x, 0.3, None) is x
    dropped = dropout(x, 0.3, rng)
    assert dropped.unique().tolist() == pytest.approx([0, 1 / 0.7])
    assert dropped.mean().item() == pytest.approx(1, abs=0.02)
    assert torch.equal(dropped, dropout(x, 0.3, torch.Generator().manual_seed(0)))


def test_values_are_encoded_one_by_one_and_clamped_above(rng):
    encoder = ValueEncoder(DIM)
    values = 10 * torch.randn(3, 4, generator=rng)
    assert torch.allclose(encoder(values)[1, 2], encoder(values[1, 2]), atol=1e-6)
    assert torch.equal(encoder(torch.tensor(VALUE_LIMIT)), encoder(torch.tensor(2 * VALUE_LIMIT)))


def likeness(scale: float) -> float:
    waves = TimeEncoder(DIM, scale).waves(torch.tensor([0.0, 1.0]))
    return torch.cosine_similarity(waves[0], waves[1], dim=0).item()


def test_scaled_time_tells_its_ends_apart():
    assert likeness(1.0) == pytest.approx(0.972, abs=1e-3)
    assert likeness(1000.0) < 0.6


def test_a_block_of_closed_gates_changes_nothing(rng):
    block = Block(DIM, DifferentialAttention(DIM, 2, depth=0, reference="state"), zero=True, normed_keys=True)
    state, time = torch.randn(3, 7, DIM, generator=rng), torch.randn(3, DIM, generator=rng)
    assert torch.equal(block(state, time), state)


@pytest.mark.parametrize("zero", [True, False])
def test_folded_gene_modulation_is_what_it_stands_for(rng, zero):
    modulation = GeneModulation(DIM, zero=zero).double()
    torch.nn.init.normal_(modulation.norm.weight, generator=rng)
    torch.nn.init.normal_(modulation.norm.bias, generator=rng)
    state = torch.randn(3, 7, DIM, generator=rng, dtype=torch.float64)
    genes = torch.randn(7, DIM, generator=rng, dtype=torch.float64)
    shift, gate, scale = modulation.modulation(torch.nn.functional.silu(genes)).chunk(3, dim=-1)
    expected = state + gate * (modulation.norm(state) * scale + shift)
    torch.testing.assert_close(modulation(state, modulation.project(genes)), expected)
    assert zero == torch.equal(expected, state)


def test_a_map_in_two_parts_is_the_map_of_both(rng):
    joined = Joined(DIM, 5)
    state, other = torch.randn(3, 7, DIM, generator=rng), torch.randn(3, 1, DIM, generator=rng)
    whole = torch.cat([state, other.expand_as(state)], dim=-1)
    expected = torch.nn.functional.linear(whole, joined.weight, joined.bias)
    torch.testing.assert_close(joined(state, joined.project(other)), expected)


def test_maps_in_tiles_are_the_maps_of_all(rng, monkeypatch):
    monkeypatch.setattr(FeedForward, "TILE", 7)
    maps, x = FeedForward(8), torch.randn(3, 5, 8, generator=rng)
    with torch.no_grad():
        torch.testing.assert_close(maps(x), maps[2](maps[1](maps[0](x))))
