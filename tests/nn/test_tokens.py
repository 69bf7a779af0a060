import math

import pytest
import torch

from knockon.nn.tokens import NO_GENE, CountEncoder, all_genes, expressed_genes

COUNTS = torch.tensor([[0.0, 3, 0, 1, 7], [0, 0, 0, 0, 0], [2, 0, 0, 0, 0]])


def test_genes_with_counts_become_tokens():
    tokens = expressed_genes(COUNTS)
    assert tokens.genes.tolist() == [[2, 4, 5, NO_GENE], [NO_GENE] * 4, [1, *[NO_GENE] * 3]]
    assert tokens.counts.tolist() == [[3, 1, 7, 0], [0] * 4, [2, 0, 0, 0]]
    seen = tokens.raised.exp()
    assert seen.tolist() == [[1, 1, 1, 0], [0, 0, 0, 1], [1, 0, 0, 0]]  # an empty cell attends to no gene


def test_seen_padding_is_one_token_that_counts_as_often_as_it_is_repeated():
    tokens = expressed_genes(COUNTS, padded_to=5)
    assert tokens.raised.exp().tolist() == [
        pytest.approx([1, 1, 1, 2]),
        pytest.approx([0, 0, 0, 5]),
        pytest.approx([1, 0, 0, 4]),
    ]
    full = expressed_genes(COUNTS, padded_to=3)
    assert full.raised[0].tolist() == [0, 0, 0, -math.inf]


def test_all_genes_are_tokens():
    tokens = all_genes(COUNTS)
    assert tokens.genes.tolist() == [[1, 2, 3, 4, 5]]
    assert tokens.raised is None


@pytest.mark.parametrize(
    ("kind", "seen"),
    [
        ("log1p", "whether"), ("log1pzero", "whether"), ("anscombe", "nothing"), ("sqrt", "nothing"),
        ("proj", "how many"), ("projconcat", "how many"), ("softbin", "how many"), ("modulated", "how many"),
    ],
)  # fmt: skip
def test_what_a_norm_leaves_of_a_count(kind, seen, rng):
    """Whoever reads tokens through a layer norm cannot see by how much a row was scaled."""
    torch.manual_seed(0)
    encoder = CountEncoder(5, 16, kind)

    def read(counts):
        tokens = encoder(torch.arange(1, 6)[None], counts)
        return torch.nn.functional.layer_norm(tokens, (16,), eps=1e-8)

    more = torch.where(COUNTS > 0, COUNTS + 4, COUNTS)
    other = COUNTS.flip(1)
    differs = [not torch.allclose(read(COUNTS), read(x), atol=1e-4) for x in (more, other)]
    assert differs == {"nothing": [False, False], "whether": [False, True], "how many": [True, True]}[seen]


def test_copies_of_a_count_need_one_column(rng):
    torch.manual_seed(0)
    encoder = CountEncoder(5, 8, "projconcat")
    rows = encoder.table(torch.arange(1, 6)[None]).expand(3, -1, -1)
    both = torch.cat([rows, COUNTS.log1p()[..., None].expand_as(rows)], dim=-1)
    torch.testing.assert_close(encoder(torch.arange(1, 6)[None], COUNTS), encoder.mix(both))
