"""One smooth function, learned of noisy examples where there is something to learn."""

import pytest
import torch
from torch import Tensor

from knockon.nn.surface import FOLDS, Surface

GROUPS, GENES = 24, 60


def bend(features: Tensor) -> Tensor:
    """What is to be learned."""
    return (2 * features[:, 0]).tanh() - 0.5 * features[:, 1].square()


def examples(seed: int, groups: int = GROUPS) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(groups * GENES, 3, generator=rng), torch.randn(groups * GENES, generator=rng)


def fitted(features: Tensor, target: Tensor, precision: Tensor | None = None, **shape: float) -> Surface:
    surface = Surface(features.shape[1], **({"cosines": 100} | shape))
    group = torch.arange(len(features)) // GENES
    surface.fit(features, target, torch.ones(len(features)) if precision is None else precision, group)
    return surface


def error(surface: Surface, features: Tensor) -> float:
    return (surface(features) - bend(features)).square().mean().item()


def test_a_smooth_function_is_recovered_from_noisy_examples() -> None:
    (features, noise), (others, _) = examples(0), examples(1)
    target = bend(features)
    assert error(fitted(features, target), others) < 0.08 * target.var()
    assert error(fitted(features, target + noise), others) < 0.12 * target.var()


def test_the_linear_part_carries_on_where_no_example_is() -> None:
    features, _ = examples(0)
    far = torch.tensor([[6.0, 0, 0], [12.0, 0, 0]])
    surface = fitted(features, features[:, 0])
    assert surface(features).sub(features[:, 0]).square().mean() < 0.01
    assert surface(far)[1] > surface(far)[0] > 1.5


def test_where_nothing_can_be_predicted_the_surface_is_zero() -> None:
    zero = 0
    for seed in range(10):
        features, noise = examples(seed)
        surface = fitted(features, noise)
        zero += not surface(features).any()
        assert surface(features).square().mean() < 0.02
    assert zero >= 7


def test_examples_of_one_group_tell_nothing_of_another() -> None:
    """What differs between groups alone, and looks certain within them, is not learned."""
    zero = 0
    for seed in range(10):
        rng = torch.Generator().manual_seed(seed)
        own = torch.randn(GROUPS, 4, generator=rng).repeat_interleave(GENES, 0)
        zero += not fitted(own[:, :3], own[:, 3])(own[:, :3]).any()
    assert zero >= 7


def test_the_surface_without_a_fold_is_the_one_fitted_without_it() -> None:
    features, noise = examples(0)
    target, group = bend(features) + noise, torch.arange(len(features)) // GENES
    surface = fitted(features, target)
    for fold in range(FOLDS):
        there = group % FOLDS != fold
        changed = torch.where(there, target, 100 * noise)
        gram, moment = torch.zeros(()), torch.zeros(())
        for penalty in (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0, 1000.0):
            x = surface._terms(features[there]).double()
            gram, moment = x.T @ x, x.T @ changed[there].double()
            ridge = torch.linalg.solve(gram + penalty * torch.eye(len(gram)).double(), moment)
            if torch.allclose(surface.weight[fold].double(), ridge, atol=2e-3):
                break
        else:
            pytest.fail("no penalty gives these weights")
        got = surface(features[None], torch.tensor([fold + FOLDS]))[0]
        torch.testing.assert_close(
            got, (surface._terms(features).double() @ ridge).float(), atol=1e-2, rtol=0
        )


def test_each_set_is_answered_by_its_own_fold() -> None:
    features, noise = examples(0)
    surface = fitted(features, bend(features) + noise)
    sets = features.reshape(GROUPS, GENES, 3)
    fold = torch.arange(GROUPS)
    together = surface(sets, fold)
    for i in range(GROUPS):
        torch.testing.assert_close(together[i], surface(sets[i : i + 1], fold[i : i + 1])[0])
    assert (together[1] - surface(sets[1])).abs().max() > 1e-4
    torch.testing.assert_close(surface(sets).flatten(), surface(features))


def test_several_threads_fit_what_one_does() -> None:
    features, noise = examples(0)
    target = bend(features) + noise
    one = fitted(features, target, cosines=600)  # torch's batched LU goes wrong from some 150 columns
    torch.set_num_threads(2)
    two = fitted(features, target, cosines=600)
    assert one.weight.any()
    torch.testing.assert_close(two.weight, one.weight, atol=1e-4, rtol=0)


def test_what_rounding_makes_unsolvable_is_left_out() -> None:
    """Without frequencies all cosines are constant, and rounding is larger than the smallest penalties."""
    features = torch.randn(60_000, 2, generator=torch.Generator().manual_seed(0))
    surface = fitted(features, features[:, 0], cosines=600, width=0)
    assert surface.weight.isfinite().all()
    assert fitted(features, features[:, 0].clone().fill_(torch.nan)).weight.eq(0).all()


def test_uncertain_examples_count_less() -> None:
    (features, noise), (others, _) = examples(0), examples(1)
    bad = torch.arange(len(features)) % 2 == 0
    target = bend(features) + torch.where(bad, 5 * noise, 0.1 * noise)
    weighed = fitted(features, target, torch.where(bad, 1 / 25, 100.0))
    assert error(weighed, others) < 0.3 * error(fitted(features, target), others)
    scaled = fitted(features, target, torch.where(bad, 10 / 25, 1000.0))
    torch.testing.assert_close(scaled(others), weighed(others), atol=1e-3, rtol=0)


def test_units_of_features_do_not_matter() -> None:
    features, noise = examples(0)
    target, scale, shift = bend(features) + noise, torch.tensor([1e3, 1e-2, 5.0]), torch.tensor([0.0, 3, -1])
    one, other = fitted(features, target), fitted(scale * features + shift, target)
    torch.testing.assert_close(other(scale * features + shift), one(features), atol=2e-2, rtol=0)


def test_a_feature_that_never_varies_is_harmless() -> None:
    features, _ = examples(0)
    features[:, 2] = 4.0
    surface = fitted(features, bend(features))
    assert error(surface, features) < 0.1
    before = surface(features)
    features[:, 2] = 5.0  # nothing is known of what it does
    torch.testing.assert_close(surface(features), before)


def test_few_groups_give_no_surface_and_none_is_left_of_an_earlier_fit() -> None:
    features, _ = examples(0)
    surface = fitted(features, bend(features))
    assert surface(features).any()
    few = GENES * (FOLDS - 1)
    surface.fit(features[:few], bend(features[:few]), torch.ones(few), torch.arange(few) // GENES)
    assert not surface(features).any()


def test_nothing_is_drawn_from_the_global_generator() -> None:
    state = torch.get_rng_state()
    assert torch.equal(Surface(3).frequency, Surface(3).frequency)
    assert torch.equal(torch.get_rng_state(), state)
