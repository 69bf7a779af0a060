import numpy as np
import pytest

from knockon.data.vectors import read_vectors, stacked
from knockon.types import UserError


@pytest.mark.parametrize(("name", "mark"), [("v.csv", ","), ("v.tsv", "\t")])
def test_names_and_numbers(tmp_path, name, mark):
    (tmp_path / name).write_text(
        mark.join(["name", "a", "b"]) + "\n" + mark.join(["KLF1", "1", "2.5"]) + "\n"
    )
    vectors = read_vectors(tmp_path / name)
    assert list(vectors) == ["KLF1"]
    np.testing.assert_array_equal(vectors["KLF1"], np.array([1, 2.5], dtype=np.float32))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name,a\nX,1\nX,2\n", "twice: X"),
        ("name,a\nX,one\n", "not finite numbers: X"),
        ("name,a\nX,\n", "not finite numbers: X"),
        ("name,a\nX,inf\n", "not finite numbers: X"),
        ("name\nX\n", "not finite"),
        ("", "Cannot read"),
    ],
)
def test_faults_are_named(tmp_path, text, words):
    (tmp_path / "v.csv").write_text(text)
    with pytest.raises(UserError, match=words):
        read_vectors(tmp_path / "v.csv")


def test_a_missing_table_is_a_message(tmp_path):
    with pytest.raises(UserError, match="Cannot read"):
        read_vectors(tmp_path / "none.csv")


def test_coverage_is_told(caplog):
    vectors = {"A": np.zeros(2), "B": np.ones(2), "MORE": np.ones(2)}
    names = ["A", "B", "C", "D", "MORE"]
    with caplog.at_level("INFO", logger="knockon"):
        found = stacked(vectors, names, {"A", "B", "C", "D"})
    assert np.isnan(found).all(1).tolist() == [False, False, True, True, False]
    assert caplog.messages == [
        "vectors: 2 of 4 perturbations of the screen have one",
        "without a vector, known by their own cells alone: C, D",
    ]
    with pytest.raises(UserError, match=r"No perturbation of the screen has a vector: C, D"):
        stacked(vectors, names, {"C", "D"})
