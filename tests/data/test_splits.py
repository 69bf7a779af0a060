import dataclasses
import json

import numpy as np
import pytest

from knockon.data import splits
from knockon.data.conventions import Columns, parse
from knockon.data.screen import Screen
from knockon.types import Label, UserError

from .screens import DOUBLES, adata

NAMES = [f"P{i}" for i in range(12)]
PAIRS = [f"{a}+{b}" for i, a in enumerate(NAMES) for b in NAMES[i + 1 : i + 4]]


def labels(*texts):
    return tuple(parse(text) for text in texts)


@pytest.fixture(scope="module")
def screen():
    return Screen.from_anndata(adata({"control": 9} | dict.fromkeys([*NAMES, *PAIRS], 4)))


@pytest.fixture(scope="module")
def contexts():
    names = ["control"] * 16 + ["A"] * 16 + ["B"] * 16
    data = adata({"x": 48})
    data.obs["perturbation"], data.obs["cell_type"] = names, ["T", "B", "NK", "M"] * 12
    return Screen.from_anndata(data)


def test_the_published_norman_folds(shared, request):
    doubles = (request.path.parent / "norman_doubles.txt").read_text().split()
    published = json.loads((shared / "specs" / "norman_additive_folds.json").read_text())
    assert len(doubles) == 125
    for fold in range(5):
        assert splits.additive_test(doubles, seed=42 + fold) == published[f"fold{fold}"]


def test_the_published_folds_of_a_whole_screen(shared, request):
    doubles = (request.path.parent / "norman_doubles.txt").read_text().split()
    singles = sorted({name for double in doubles for name in double.split("+")})
    conditions = {"ctrl": 9} | dict.fromkeys([*doubles, *(f"{name}+ctrl" for name in singles)], 1)
    screen = Screen.from_anndata(adata(conditions, key="condition"))
    published = json.loads((shared / "specs" / "norman_additive_folds.json").read_text())["fold0"]
    assert splits.additive(screen, seed=42).test == labels(*published)
    fifteen = splits.combinations15(screen, seed=42)
    assert fifteen.test[:15] == labels(*published[:15])
    assert len(fifteen.test) == 15 + 23


@pytest.mark.parametrize("size", ["small", "large"])
def test_parity_of_additive_and_combinations(shared, size):
    stored = np.load(shared / "parity" / "scdfm.npz")
    conditions = dict.fromkeys(stored[f"split/{size}/conditions"].tolist(), 2)
    screen = Screen.from_anndata(adata(conditions, key="condition"))
    for fold in range(5):
        expected = stored[f"split/{size}/additive/fold{fold}/test"].tolist()
        assert splits.additive_test(stored[f"split/{size}/doubles"].tolist(), seed=42 + fold) == expected
        first = stored[f"split/{size}/combinations/fold{fold}/test_doubles"].tolist()
        alone = stored[f"split/{size}/combinations/fold{fold}/test_singles_sorted"].tolist()
        found = splits.combinations15(screen, seed=42 + fold, validation=0)
        assert found.test[: len(first)] == labels(*first)
        assert set(found.test) == set(labels(*first, *alone))
        kept = stored[f"split/{size}/combinations/fold{fold}/train_conditions"].tolist()
        assert set(found.train) | {Label()} == set(labels(*kept)) | {Label()}


@pytest.mark.parametrize("kind", ["additive", "combinations15", "unseen", "random"])
@pytest.mark.parametrize("seed", [0, 1, 2, 42])
def test_parts_are_disjoint_and_complete(screen, kind, seed):
    split = splits.make(kind, screen, seed=seed)
    parts = (split.train, split.validation, split.test)
    assert sorted(label for part in parts for label in part) == sorted(screen.conditions)
    assert all(parts)
    assert split == splits.make(kind, screen, seed=seed)
    assert splits.audit(split, screen) == []
    assert not set(splits.training(split, screen).conditions) & set(split.test)
    assert splits.training(split, screen).controls == screen.controls
    assert splits.part(split, screen, "test").conditions == tuple(
        label for label in screen.conditions if label in split.test
    )


def test_seeds_differ(screen):
    assert len({splits.additive(screen, seed=seed).test for seed in range(5)}) == 5


def test_additive_holds_out_doubles_of_measured_singles(screen):
    split = splits.additive(screen, seed=3)
    assert len(split.test) == int(0.3 * len(PAIRS))
    for label in (*split.test, *split.validation):
        assert len(label.perturbations) == 2
        assert set(splits.singles(label)) <= set(split.train)
    some = Screen.from_anndata(adata(DOUBLES))
    assert set(splits.additive(some, fraction=1.0).test) == set(labels("A+B", "B+C", "A+D", "C+D"))
    assert Label.of(["A", "E"]) in splits.additive(some, fraction=1.0).train


def test_unseen_hides_every_condition_of_a_perturbation(screen):
    split = splits.unseen(screen, seed=0, fraction=0.2)
    assert len(split.heldout) == 2
    for label in (*split.train, *split.validation):
        assert not set(label.perturbations) & set(split.heldout)
    assert {splits.seen(split.train, label) for label in split.test} >= {0, 1}
    for label in split.test:
        assert splits.seen(split.train, label) < len(label.perturbations)
    named = splits.unseen(screen, holdout=["P3"])
    assert {label for label in screen.conditions if "P3" in label.perturbations} == set(named.test)


def test_context_hides_the_perturbed_cells_of_a_level(contexts):
    split = splits.make("context", contexts, holdout=["NK"])
    assert set(split.test) == {Label.of([p], covariates=["NK"]) for p in "AB"}
    assert len(split.validation) == 1
    assert Label(covariates=("NK",)) in splits.training(split, contexts).rows
    assert splits.audit(split, contexts) == []


def test_a_share_of_the_perturbations_of_a_level_can_be_hidden(contexts):
    split = splits.make("context", contexts, holdout=["NK"], fraction=0.5)
    whole = splits.make("context", contexts, holdout=["NK"])
    hidden = {label.perturbations for label in split.test}
    assert set(split.test) < set(whole.test)
    assert len(hidden) == len({label.perturbations for label in whole.test}) // 2
    left = {label.perturbations for label in (*split.train, *split.validation) if label.covariates[0] == "NK"}
    assert left
    assert not left & hidden
    assert splits.audit(split, contexts) == []


def test_other_kinds_hold_out_in_every_context(contexts):
    split = splits.random(contexts, fraction=0.5, validation=0)
    assert len(split.test) == 4
    assert len({label.everywhere for label in split.test}) == 1


@pytest.mark.parametrize("kind", [*splits.KINDS, "combinations15"])
def test_a_split_survives_its_file(tmp_path, screen, contexts, kind):
    use = contexts if kind == "context" else screen
    split = splits.make(kind, use)
    split.write(tmp_path / "split.json")
    assert splits.read(tmp_path / "split.json", use) == split


def test_contexts_are_written_as_objects(tmp_path, contexts):
    split = splits.context(contexts, holdout=["T"])
    split.write(tmp_path / "split.json")
    assert {"perturbation": "A", "cell_type": "T"} in json.loads((tmp_path / "split.json").read_text())[
        "test"
    ]


def test_a_hand_written_file_needs_only_test(tmp_path, screen):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"test": ["P1+P0", "P2_P1", "ctrl+P5"]}))
    split = splits.make(path, screen)
    assert split.kind == "custom"
    assert split.test == labels("P0+P1", "P1+P2", "P5")
    assert split.validation
    assert len(split.train) + len(split.validation) + 3 == len(screen.conditions)


def test_a_file_without_context_means_every_context(tmp_path, contexts):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"test": ["A"], "validation": []}))
    split = splits.read(path, contexts)
    assert len(split.test) == 4
    assert split.validation == ()


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ({"tests": ["P1"]}, "no test conditions: tests"),
        ({"test": ["P1", "P99"]}, r"without cells in the screen: P99.*did you mean"),
        ({"test": "P1"}, "holds str"),
        ({"test": ["P1"], "validation": ["P1"]}, "two parts of the split: P1"),
        ({"test": [{"cell": "P1"}]}, "without cells"),
        ({"test": ["P1"], "digest": "0123456789"}, r"another screen \(digest 01234567\).*knockon split"),
        ({"test": ["control"]}, "Too few conditions"),
        ({"test": ["P1"], "valid": ["P2"]}, "unknown entries: valid"),
        ({"test": ["P1"], "seed": "x"}, "seed is 'x'"),
        ({"test": ["P1"], "seed": -1}, "seed is -1"),
        ({"test": ["P1"], "heldout": True}, "heldout is True"),
    ],
)
def test_files_that_make_no_sense_are_refused(tmp_path, screen, content, match):
    path = tmp_path / "split.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=match):
        splits.read(path, screen)


def test_a_split_of_another_file_names_both(tmp_path, screen, contexts):
    split = splits.random(screen)
    split.write(tmp_path / "split.json")
    for action in (
        lambda: splits.read(tmp_path / "split.json", contexts),
        lambda: splits.training(split, contexts),
    ):
        with pytest.raises(UserError, match=f"{screen.digest[:8]}.*{contexts.digest[:8]}"):
            action()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"kind": "simulation"}, "Unknown kind of split: simulation.*additive, combinations15"),
        ({"kind": "random", "fraction": 1.0}, "Too few conditions"),
        ({"kind": "random", "fraction": 1.5}, "at most 1"),
        ({"kind": "context"}, "no contexts.*--covariate-keys"),
        ({"kind": "unseen", "holdout": ["P77"]}, "Unknown perturbation in --holdout: P77"),
        ({"kind": "additive", "holdout": ["P1"]}, "leave out --holdout"),
    ],
)
def test_wrong_wishes_are_explained(screen, arguments, match):
    with pytest.raises(UserError, match=match):
        splits.make(arguments.pop("kind"), screen, **arguments)


def test_kinds_are_named_alike(screen):
    assert splits.make("Additive", screen) == splits.make("additive", screen)


def test_a_screen_without_doubles_has_no_additive_split():
    some = Screen.from_anndata(adata({"control": 9, "A": 9, "B": 9}))
    with pytest.raises(UserError, match=r"No combination.*\(of 0\).*--split random"):
        splits.additive(some)


def test_validation_keeps_what_training_must_know(screen):
    split = splits.additive(screen, seed=0, validation=0.5)
    known = {name for label in split.train for name in label.perturbations}
    assert known == set(NAMES)


# Planted leaks


def plant(split, **parts):
    return dataclasses.replace(split, **parts)


def test_a_condition_in_two_parts(screen):
    split = splits.additive(screen)
    leaks = splits.audit(plant(split, train=(*split.train, split.test[0])), screen)
    assert {leak.kind for leak in leaks} == {"same condition", "identical cells"}


def test_reversed_names_and_aliases():
    names = {"control": 9, "A": 9, "B": 9, "A|B": 9, "B|A": 9, "a|B": 9}
    screen = Screen.from_anndata(adata(names))
    whole = {str(label): label for label in screen.conditions}
    split = splits.Split(
        kind="custom",
        seed=0,
        train=(whole["A"], whole["B|A"]),
        validation=(),
        test=(whole["A|B"],),
        digest=screen.digest,
    )
    assert [leak.kind for leak in splits.audit(split, screen)] == ["reversed names"]
    alias = plant(split, train=(whole["A"], whole["a|B"]))
    assert [leak.kind for leak in splits.audit(alias, screen)] == ["alias"]
    assert splits.audit(plant(split, train=(whole["A"], whole["B"])), screen) == []


def test_a_control_partner_is_an_alias():
    screen = Screen.from_anndata(adata({"DMSO": 9, "A": 9, "A|ctrl": 9}))
    one, other = screen.conditions
    split = splits.Split(
        kind="custom", seed=0, train=(one,), validation=(), test=(other,), digest=screen.digest
    )
    assert [leak.kind for leak in splits.audit(split, screen)] == ["alias"]


def test_a_heldout_perturbation_hidden_in_a_double(screen):
    split = splits.unseen(screen, holdout=["P3"])
    leak = next(label for label in split.test if len(label.perturbations) == 2)
    hidden = plant(split, train=(*split.train, leak), test=tuple(la for la in split.test if la != leak))
    found = splits.audit(hidden, screen)
    assert {(leak.kind, leak.known) for leak in found} == {("held-out perturbation", leak)}


def test_a_heldout_context_in_training(contexts):
    split = splits.context(contexts, holdout=["T"])
    moved, *rest = split.test
    found = splits.audit(plant(split, train=(*split.train, moved), test=tuple(rest)), contexts)
    assert [leak.kind for leak in found] == ["held-out perturbation"]


def test_copied_cells():
    data = adata(DOUBLES)
    values = data.X.toarray()
    values[data.obs["perturbation"] == "A+B"] = values[data.obs["perturbation"] == "C"][:15]
    data.X = values
    screen = Screen.from_anndata(data)
    split = splits.additive(screen, fraction=1.0)
    found = splits.audit(split, screen)
    assert [(leak.kind, str(leak.held), str(leak.known)) for leak in found] == [
        ("identical cells", "A+B", "C")
    ]
    assert "15 of 15" in str(found[0])


@pytest.mark.parametrize("name", ["norman19", "papalexi21", "kang18"])
def test_real_splits_are_clean(shared, name):
    screen = Screen.read(shared / "data" / f"{name}.h5ad")
    for kind in {"norman19": ["additive", "unseen"], "papalexi21": ["random"], "kang18": ["context"]}[name]:
        assert splits.audit(splits.make(kind, screen), screen) == []


def test_norman19_holds_out_its_five_doubles(shared):
    screen = Screen.read(shared / "data" / "norman19.h5ad", perturbation_key="perturbation")
    test = splits.make("additive", screen, fraction=1.0).test
    expected = "KLF1+MAP2K6 KLF1+TGFBR2 MAP2K3+MAP2K6 MAP2K3+SLC38A2 MAPK1+TGFBR2"
    assert set(test) == set(labels(*expected.split()))


def test_columns_are_part_of_a_split(contexts):
    assert splits.random(contexts, fraction=0.5).covariates == ("cell_type",)
    assert Columns() == Columns()
