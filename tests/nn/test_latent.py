import torch

from knockon.nn.latent import LatentArchitecture, LatentTransformer

CONFIG = LatentArchitecture(width=16, layers=2, heads=2)


def build(*, lively: bool) -> LatentTransformer:
    torch.manual_seed(0)
    network = LatentTransformer(CONFIG, 3, 5)
    if lively:
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return network


def test_velocity_begins_at_zero(rng):
    z, told = torch.randn(2, 4, 3, 5, generator=rng), torch.randn(2, 4, 16, generator=rng)
    assert not build(lively=False)(z, told).any()


def test_cells_know_nothing_of_each_other(rng):
    network = build(lively=True)
    z, told = torch.randn(2, 4, 3, 5, generator=rng), torch.randn(2, 4, 16, generator=rng)
    whole = network(z, told)
    torch.testing.assert_close(network(z[1:, 2:3], told[1:, 2:3]), whole[1:, 2:3])


def test_what_is_told_to_a_set_is_told_to_its_cells(rng):
    network = build(lively=True)
    z, told = torch.randn(2, 4, 3, 5, generator=rng), torch.randn(2, 1, 16, generator=rng)
    torch.testing.assert_close(network(z, told), network(z, told.expand(-1, 4, -1)))


def test_latent_tokens_have_places(rng):
    network = build(lively=True)
    z, told = torch.randn(1, 1, 3, 5, generator=rng), torch.randn(1, 1, 16, generator=rng)
    assert not torch.allclose(network(z.flip(2), told), network(z, told).flip(2))
