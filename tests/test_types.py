import pytest
import torch

from knockon.types import Condition, Covariate, Label, Spec, UserError

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
