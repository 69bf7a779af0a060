import pytest
import torch
from torch import nn

from knockon.nn.sets import CrossBlock, GatedMaps, SetArchitecture, SetDecoder, SetEncoder

CONFIG = SetArchitecture(width=16, layers=1, heads=4, cross_heads=2, latents=3, latent_width=6)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_width_between_gated_maps():
    """[scldm, section 1.4]"""
    for dim, hidden in ((32, 88), (128, 344), (256, 684), (512, 1368)):
        assert GatedMaps(dim).out.in_features == hidden


def test_the_order_of_a_set_does_not_matter_and_that_of_queries_is_kept(rng):
    block = CrossBlock(16, 2)
    tokens, queries = torch.randn(2, 7, 16, generator=rng), torch.randn(1, 4, 16, generator=rng)
    found = block(queries, block.project(tokens))
    order = torch.randperm(7, generator=rng)
    torch.testing.assert_close(block(queries, block.project(tokens[:, order])), found)
    torch.testing.assert_close(block(queries[:, [2, 0, 3, 1]], block.project(tokens)), found[:, [2, 0, 3, 1]])


def test_a_token_that_does_not_count_changes_nothing(rng):
    encoder = SetEncoder(CONFIG, 6)
    tokens = torch.randn(2, 5, 16, generator=rng)
    raised = torch.zeros(2, 5)
    raised[:, 3:] = -torch.inf
    torch.testing.assert_close(encoder(tokens, raised), encoder(tokens[:, :3], None))


def test_a_raised_token_is_as_many_copies(rng):
    encoder = SetEncoder(CONFIG, 6)
    tokens = torch.randn(2, 5, 16, generator=rng)
    copies = torch.cat([tokens, tokens[:, -1:].expand(-1, 49, -1)], dim=1)
    raised = torch.zeros(2, 5)
    raised[:, -1] = torch.tensor(50.0).log()
    torch.testing.assert_close(encoder(tokens, raised), encoder(copies, None))


def test_shifting_and_scaling_a_latent_token_changes_nothing(rng):
    decoder = SetDecoder(CONFIG)
    z, queries = torch.randn(2, 3, 6, generator=rng), torch.randn(1, 8, 16, generator=rng)
    found = decoder(z, queries, nn.Identity())
    torch.testing.assert_close(decoder(3 * z + 0.5, queries, nn.Identity()), found, rtol=1e-4, atol=1e-5)


def test_answers_do_not_depend_on_how_many_are_given_at_once(rng, monkeypatch):
    decoder, head = SetDecoder(CONFIG), nn.Linear(16, 1)
    z, queries = torch.randn(2, 3, 6, generator=rng), torch.randn(1, 8, 16, generator=rng)

    def run():
        decoder.zero_grad()
        found = decoder(z, queries, head)
        found.square().sum().backward()
        return found.detach(), [p.grad.clone() for p in decoder.parameters()]

    whole, gradients = run()
    monkeypatch.setattr(SetDecoder, "CPU_TILE", 6)
    parts, again = run()
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(again, gradients)
    with torch.no_grad():
        torch.testing.assert_close(decoder(z, queries, head), whole)
