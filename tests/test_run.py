import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from knockon.data import simulate, splits
from knockon.data.screen import Screen
from knockon.files import LOCK
from knockon.record import RECORD, SPEC, SPLIT, WEIGHTS, Record, read_spec, write_spec
from knockon.run import Run
from knockon.train import train
from knockon.types import UserError


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("screen") / "tiny.h5ad"
    simulate.simulate(simulate.tiny()).write_h5ad(path)
    return path


@pytest.fixture
def run(file: Path, tmp_path: Path) -> Run:
    screen = Screen.read(file)
    return train("additive", screen, splits.additive(screen), out=tmp_path / "run")


def test_a_loaded_run_predicts_the_same_bits(run: Run) -> None:
    loaded = Run.load(run.folder)
    first, second = run.predict("test", cells=5), loaded.predict("test", cells=5)
    assert (first.X != second.X).nnz == 0
    assert first.obs.equals(second.obs)
    assert loaded.record == run.record


def test_everything_is_plain(run: Run) -> None:
    names = {path.name for path in run.folder.rglob("*") if path.is_file()}
    assert names >= {WEIGHTS, RECORD, SPEC, SPLIT}
    assert {Path(name).suffix for name in names - {LOCK}} <= {".json", ".jsonl", ".safetensors"}


@pytest.mark.parametrize("name", [WEIGHTS, SPEC, SPLIT])
def test_an_edited_folder_is_refused_by_file(run: Run, name: str) -> None:
    with (run.folder / name).open("ab") as file:
        file.write(b" ")
    with pytest.raises(UserError, match=f"{name} was changed"):
        Run.load(run.folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": "no_such_model"}, "no_such_model"),
        ({"model": "../../evil"}, "evil"),
        ({"config": {"missing": "refuse", "extra": 1}}, "extra"),
        ({"config": {"missing": "everything"}}, "missing"),
        ({"files": {}}, "not finished"),
        ({"screen": "0" * 64}, "another screen"),
        ({"source": "gone.h5ad"}, "--data"),
    ],
)
def test_an_edited_record_is_a_message(run: Run, change: dict, words: str) -> None:
    path = run.folder / RECORD
    path.write_text(json.dumps(json.loads(path.read_text()) | {"checksum": None} | change))
    with pytest.raises(UserError, match=words):
        Run.load(run.folder)


def test_no_flipped_bit_of_a_record_goes_unseen(run: Run) -> None:
    path = run.folder / RECORD
    whole = path.read_bytes()
    for place in range(0, len(whole), 1 + len(whole) // 150):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        try:
            Record.read(run.folder)
        except UserError as error:
            assert RECORD in str(error)  # noqa: PT017 (one that changes white space only is none)
        else:
            assert json.loads(flipped) == json.loads(whole)


def test_another_screen_is_refused(run: Run, tmp_path: Path) -> None:
    simulate.simulate(dataclasses.replace(simulate.tiny(), seed=9)).write_h5ad(tmp_path / "other.h5ad")
    with pytest.raises(UserError, match="another screen"):
        Run.load(run.folder, screen=tmp_path / "other.h5ad")


def test_a_missing_folder_is_a_message(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no "):
        Run.load(tmp_path / "nothing")


def test_a_spec_with_vectors_survives(tmp_path: Path) -> None:
    screen = Screen.from_anndata(simulate.simulate(simulate.tiny()))
    spec = screen.spec()
    vectors = np.arange(2.0 * len(spec.perturbations), dtype=np.float32).reshape(-1, 2)
    spec = dataclasses.replace(spec, vectors=vectors)
    write_spec(spec, tmp_path)
    back = read_spec(tmp_path)
    assert back.genes == spec.genes
    assert back.perturbations == spec.perturbations
    assert back.covariates == spec.covariates
    assert np.array_equal(back.vectors, vectors)


def test_conditions_in_any_spelling(run: Run) -> None:
    label = run.split.test[0]
    backwards = "+".join(reversed(label.perturbations))
    assert run.resolve([backwards]) == [label]
    assert run.resolve([label]) == [label]
    assert run.resolve("test") == list(run.split.test)
    with pytest.raises(UserError, match="Unknown perturbation"):
        run.predict(["NOSUCHGENE"])


def test_a_prediction_tells_where_it_is_from(run: Run, tmp_path: Path) -> None:
    predicted = run.predict("test", cells=4, seed=3)
    about = predicted.uns["knockon"]
    assert about["model"] == "additive"
    assert about["units"] == "log1p"
    assert about["seed"] == 3
    predicted.write_h5ad(tmp_path / "pred.h5ad")
    again = Screen.read(tmp_path / "pred.h5ad")
    assert again.genes == run.screen.genes
    assert set(again.conditions) == set(run.split.test)
