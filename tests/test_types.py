import pytest
import torch

from knockon.types import Condition, Covariate, Label, Noise, Spec, UserError

SPEC = Spec(
    genes=("G1", "G2"),
    perturbations=("A", "B", "drug"),
    covariates=(Covariate("cell_type", ("B cells", "T cells")),),
    slots=2,
)


def test_a_dose_travels_with_its_perturbation() -> None:
    assert Label.of(["B", "A"], [1.0, 2.0]) == Label(("A", "B"), (2.0, 1.0))
    assert str(Label.of(["drug", "A"], [0.5, 0.0], ["T cells"])) == "A+drug@0.5 | T cells"
    assert str(Label()) == "control"


def test_encode() -> None:
    condition = SPEC.encode(
        [Label.of(["drug", "A"], [0.5, 0.0], ["T cells"]), Label(covariates=("B cells",))]
    )
    assert condition.perturbation.tolist() == [[1, 3], [0, 0]]
    assert condition.dose.tolist() == [[0.0, 0.5], [0.0, 0.0]]
    assert condition.covariates.tolist() == [[1], [0]]
    assert len(condition[:1]) == 1
    assert condition.to("cpu").dose.dtype == torch.float32


@pytest.mark.parametrize(
    ("label", "words"),
    [
        (Label.of(["C"], covariates=["B cells"]), ["Unknown perturbation", "C", "--vectors"]),
        (Label.of(["drugs"], covariates=["B cells"]), ["did you mean drug"]),
        (Label.of(["A", "B", "drug"], covariates=["B cells"]), ["Too many", "at most 2"]),
        (Label.of(["A"], covariates=["NK"]), ["Unknown cell_type", "B cells, T cells"]),
        (Label.of(["A"]), ["without its context", "cell_type"]),
    ],
)
def test_encode_refuses_by_name(label: Label, words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        SPEC.encode([label])
    assert all(word in str(error.value) for word in words)


def test_a_user_error_names_three_and_counts_the_rest() -> None:
    error = UserError("Bad", offenders=list("abcde"), expected="good", mend="--flag")
    assert str(error) == "Bad: a, b, c and 2 more. Expected: good. To mend it: --flag."


def test_an_empty_spec_encodes_nothing() -> None:
    condition = Spec(genes=("G",), perturbations=()).encode([Label()])
    assert isinstance(condition, Condition)
    assert condition.covariates.shape == (1, 0)


def test_gamma_numbers_have_mean_and_variance_of_their_shape(rng: torch.Generator) -> None:
    shape = torch.tensor([0.2, 1.0, 7.5]).expand(1, 40_000, 3)
    drawn = Noise(rng).gamma(shape)[0].double()
    assert (drawn >= 0).all()
    torch.testing.assert_close(drawn.mean(0), shape[0, 0].double(), rtol=0.05, atol=0)
    torch.testing.assert_close(drawn.var(0), shape[0, 0].double(), rtol=0.1, atol=0)


def test_binomial_numbers_have_mean_and_variance_of_their_law(rng: torch.Generator) -> None:
    number, probability = torch.tensor([0.0, 1.0, 9.0, 9.0, 40.0]), torch.tensor([0.5, 0.3, 0.0, 1.0, 0.7])
    drawn = Noise(rng).binomial(number.expand(1, 40_000, 5), probability.expand(1, 40_000, 5))[0]
    assert torch.equal(drawn, drawn.round())
    assert ((drawn >= 0) & (drawn <= number)).all()
    mean = number * probability
    torch.testing.assert_close(drawn.mean(0), mean, rtol=0.02, atol=0)
    torch.testing.assert_close(drawn.var(0), mean * (1 - probability), rtol=0.05, atol=0)


@pytest.mark.parametrize("law", ["gamma", "binomial", "poisson", "negative_binomial"])
def test_with_a_generator_for_each_a_set_draws_as_if_alone(law: str) -> None:
    many = torch.full((3, 8, 2), 5.0)
    arguments = {"binomial": [torch.full_like(many, 0.5)], "negative_binomial": [many]}.get(law, [])

    def seeded(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    together = getattr(Noise(*map(seeded, (4, 5, 4))), law)(many, *arguments)
    alone = getattr(Noise(seeded(5)), law)(many[:1], *(x[:1] for x in arguments))
    assert torch.equal(together[1], alone[0])
    assert torch.equal(together[0], together[2])
    assert not torch.equal(together[0], together[1])
