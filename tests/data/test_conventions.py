import pytest
from hypothesis import given
from hypothesis import strategies as st

from knockon.data.conventions import is_control_name, parse, read_parts, split_text
from knockon.types import Label, UserError

names = st.from_regex(r"[A-Z][A-Z0-9]{1,6}", fullmatch=True).filter(lambda name: not is_control_name(name))
doses = st.floats(1e-4, 1e9).map(lambda dose: float(f"{dose:g}"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A", Label.of(["A"])),
        ("A+ctrl", Label.of(["A"])),
        ("ctrl+A", Label.of(["A"])),
        ("ctrl", Label()),
        ("control+control", Label()),
        ("non-targeting", Label()),
        ("B+A", Label.of(["A", "B"])),
        ("A_B", Label.of(["A", "B"])),
        ("B_A", Label.of(["A", "B"])),
        ("A_ctrl", Label.of(["A"])),
        ("HLA_A", Label.of(["HLA_A"])),
        ("HLA_A_B", Label.of(["B", "HLA_A"])),
        ("A+A", Label.of(["A"])),
        ("drug@10uM", Label.of(["drug"], [10.0])),
        ("drug@10nM", Label.of(["drug"], [0.01])),
        ("drug@0.5mM+A", Label.of(["drug", "A"], [500.0, 0.0])),
        ("drug@1e+06", Label.of(["drug"], [1e6])),
        ("(+)-JQ1", Label.of(["(+)-JQ1"])),
        ("(+)-JQ1@2+A", Label.of(["(+)-JQ1", "A"], [2.0, 0.0])),
        ("[('drug', 0.05, 'uM')]", Label.of(["drug"], [0.05])),
        ("[('z', 5.0, 'nM'), ('a', 1.0, 'uM')]", Label.of(["z", "a"], [0.005, 1.0])),
        ("A+B | T cell", Label.of(["A", "B"], covariates=["T cell"])),
        ("control | T cell", Label(covariates=("T cell",))),
    ],
)
def test_every_spelling_has_one_meaning(text, expected):
    assert parse(text, known={"A", "B", "HLA_A"}) == expected


def test_an_underscore_separates_only_known_names():
    assert parse("NKX2_1") == Label.of(["NKX2_1"])
    assert [part.name for part in split_text("A_B_C", {"A", "B_C", "A_B", "C"})] == ["A_B_C"]


def test_a_gene_may_be_called_like_a_control():
    assert parse("NT", known={"NT"}) == Label.of(["NT"])
    assert parse("A+NT", known={"NT"}) == Label.of(["A", "NT"])


@pytest.mark.parametrize("text", ["", "A+", "+A", " "])
def test_an_empty_part_is_refused(text):
    with pytest.raises(UserError, match="empty condition"):
        parse(text)


@given(
    st.lists(st.tuples(names, doses | st.just(0.0)), min_size=1, max_size=4, unique_by=lambda part: part[0])
)
def test_order_does_not_matter_and_text_survives(parts):
    texts = [f"{name}@{dose:g}" if dose else name for name, dose in parts]
    label = parse("+".join(texts))
    assert parse("+".join(reversed(texts))) == label
    assert parse("+".join(["ctrl", *texts])) == label
    assert dict(zip(label.perturbations, label.doses, strict=True)) == dict(parts)
    assert parse(str(label)) == label


@given(st.permutations(["z@3", "a@1uM", "m@500nM"]))
def test_a_dose_travels_with_its_drug(texts):
    assert parse("+".join(texts)) == Label.of(["a", "m", "z"], [1.0, 0.5, 3.0])


@pytest.mark.parametrize(("text", "dose"), [("z+a", "0.1+2"), ("a+z", "2+0.1"), ("z+ctrl+a", "0.1+1+2")])
def test_a_dose_column_follows_the_order_of_the_file(text, dose):
    parts, _ = read_parts(text, dose, known={"a", "z"}, controls={"ctrl"})
    assert {part.name: part.dose for part in parts} == {"a": 2.0, "z": 0.1}


@pytest.mark.parametrize("dose", ["1+2+3", "much", "1+"])
def test_a_dose_that_cannot_be_read_is_refused(dose):
    with pytest.raises(UserError, match="dose"):
        read_parts("a+b", dose, known=(), controls=())
