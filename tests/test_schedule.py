import numpy as np

from knockon.schedule import seed_of


def test_every_batch_of_every_step_has_its_own_seed() -> None:
    seeds = {seed_of(seed, step, batch) for seed in range(3) for step in range(5) for batch in range(7)}
    assert len(seeds) == 3 * 5 * 7


def test_the_first_batch_has_the_seed_of_the_step() -> None:
    words = np.random.SeedSequence([4, 9]).generate_state(1, np.uint64)
    assert seed_of(4, 9, 0) == int(words[0] >> 1)
