"""Whatever is in a file, reading it works or ends in a message; nothing in it is executed or followed."""

import dataclasses
import json
import pickle
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import anndata
import h5py
import numpy as np
import pytest
import torch

from knockon.checkpoint import Journal
from knockon.cli import main
from knockon.data import simulate, splits
from knockon.data.h5ad import write_h5ad
from knockon.data.screen import Screen
from knockon.data.vectors import read_vectors
from knockon.evaluate import prediction
from knockon.evaluate.report import page
from knockon.ranking import targets
from knockon.record import Record, read_spec
from knockon.run import Run
from knockon.types import UserError

from .hostile import variants


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One small file or folder of each kind."""
    folder = tmp_path_factory.mktemp("good")
    tiny = dataclasses.replace(simulate.tiny(), cells=120, genes=20, singles=4, doubles=3)
    write_h5ad(simulate.simulate(tiny), folder / "screen.h5ad")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        anndata.read_h5ad(folder / "screen.h5ad").write_zarr(folder / "screen.zarr")
    for line in (
        "split {0}/screen.h5ad --out {0}/split.json",
        "train additive --data {0}/screen.h5ad --split {0}/split.json --out {0}/run --quiet",
        "predict {0}/run --part test --cells 4 --out {0}/pred.h5ad --quiet",
        "evaluate --pred {0}/pred.h5ad --real {0}/screen.h5ad --split {0}/split.json --out {0}/scores",
    ):
        main(line.format(folder).split())
    (folder / "vectors.csv").write_text("name,a,b\nA,1,0.5\nB,2,-1\n")
    (folder / "weights.csv").write_text("gene,weight\n" + "".join(f"G{i},{i}\n" for i in range(9)))
    (folder / "log.jsonl").write_text('{"step": 1, "total": 0.5}\n{"step": 2, "total": 0.25}\n')
    return folder


@pytest.fixture(scope="module")
def screen(good: Path) -> Screen:
    return Screen.read(good / "screen.h5ad")


@pytest.fixture(autouse=True)
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unpickling is out of reach: whoever tried would fail, and not with a message."""

    def unpickle(*_: object, **__: object) -> None:
        raise AssertionError("a pickle was read")

    for module, name in ((pickle, "load"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, unpickle)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


Reader = Callable[[Path, Screen], object]
READERS: dict[str, tuple[str, int, Reader]] = {
    "screen": ("screen.h5ad", 20, lambda path, _: Screen.read(path)),
    "backed": ("screen.h5ad", 10, lambda path, _: Screen.read(path, backed=True)),
    "prediction": ("pred.h5ad", 15, prediction.read),
    "target": ("weights.csv", 100, lambda path, _: targets.read([path], {})),
    "split": ("split.json", 100, splits.read),
    "record": ("run/run.json", 60, lambda path, _: Record.read(path.parent)),
    "spec": ("run/spec.json", 100, lambda path, _: read_spec(path.parent)),
    "run": ("run/weights.safetensors", 30, lambda path, screen: Run.load(path.parent, screen=screen)),
    "vectors": ("vectors.csv", 60, lambda path, _: read_vectors(path)),
    "log": ("log.jsonl", 100, lambda path, _: Journal(path, 2)),
}


def survives(read: Callable[[], object]) -> bool:
    """Read; whether it was taken. Anything but a message is an error of the test."""
    try:
        read()
    except UserError as error:
        assert str(error)  # noqa: PT017
        return False
    return True


@pytest.mark.parametrize("name", READERS)
def test_every_reader_works_or_says_what_is_wrong(
    good: Path, screen: Screen, tmp_path: Path, name: str
) -> None:
    all_survive(good, screen, tmp_path, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_every_reader_does_so_many_times(good: Path, screen: Screen, tmp_path: Path, name: str) -> None:
    all_survive(good, screen, tmp_path, name, times=10, seed=1)


def all_survive(
    good: Path, screen: Screen, tmp_path: Path, name: str, *, times: int = 1, seed: int = 0
) -> None:
    file, count, read = READERS[name]
    source = good / file
    path = (shutil.copytree(source.parent, tmp_path / "x") if "/" in file else tmp_path) / source.name
    content = source.read_bytes()
    taken = 0
    for variant in variants(content, times * count, is_json=path.suffix == ".json", seed=seed):
        path.write_bytes(variant)
        taken += survives(lambda: read(path, screen))
    assert taken < times * count
    path.write_bytes(content)
    assert survives(lambda: read(path, screen))


@pytest.mark.slow
@pytest.mark.parametrize(
    "file", ["scores.csv", "summary.csv", "strata.csv", "about.json", "portraits/truth.npz"]
)
def test_a_report_of_anything_is_a_page_or_a_message(good: Path, tmp_path: Path, file: str) -> None:
    folder = shutil.copytree(good / "scores", tmp_path / "scores")
    path = folder / file
    for variant in variants(path.read_bytes(), 40, is_json=path.suffix == ".json"):
        path.write_bytes(variant)
        survives(lambda: page.write(folder, tmp_path / "page.html"))


def changed(good: Path, path: Path, change: Callable[[h5py.File], object]) -> Path:
    shutil.copy(good / "screen.h5ad", path)
    with h5py.File(path, "a") as file:
        change(file)
    return path


def of(file: h5py.File, name: str, value: object) -> None:
    del file[name]
    file[name] = value


STRUCTURES: dict[str, Callable[[h5py.File], object]] = {
    "values elsewhere": lambda file: of(file, "X/data", h5py.ExternalLink("/etc/passwd", "/data")),
    "a table elsewhere": lambda file: of(file, "obs", h5py.ExternalLink("other.h5ad", "/obs")),
    "a circle": lambda file: of(file, "X", h5py.SoftLink("/X")),
    "itself": lambda file: of(file, "obs", file["/"]),
    "nowhere": lambda file: of(file, "var", h5py.SoftLink("/nothing")),
    "texts for values": lambda file: of(file, "X/data", ["x"] * 5),
    "a number for a table": lambda file: of(file, "obs", 3),
    "an index beyond": lambda file: file["X/indices"].__setitem__(0, 10**6),
    "an index below": lambda file: file["X/indices"].__setitem__(0, -5),
    "rows that run back": lambda file: file["X/indptr"].__setitem__(1, 10**6),
    "a huge shape": lambda file: file["X"].attrs.__setitem__("shape", [2**40, 2**40]),
    "another encoding": lambda file: file["X"].attrs.__setitem__("encoding-type", "pickle"),
    "a pickle": lambda file: of(file, "obs/_index", np.void(pickle.dumps({"a": 1}))),
    "raw bytes": lambda file: of(file, "uns", np.void(b"\x80\x04.")),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_strange_structures_end_in_a_message(good: Path, tmp_path: Path, name: str) -> None:
    path = changed(good, tmp_path / "a.h5ad", STRUCTURES[name])
    survives(lambda: Screen.read(path).means())
    survives(lambda: Screen.read(path, backed=True).means())


@pytest.mark.parametrize("link", ["X/data", "X", "obs", "var"])
def test_links_out_of_an_h5ad_are_not_followed(good: Path, tmp_path: Path, link: str) -> None:
    shutil.copy(good / "screen.h5ad", tmp_path / "secret.h5ad")
    path = changed(
        good, tmp_path / "a.h5ad", lambda file: of(file, link, h5py.ExternalLink("secret.h5ad", f"/{link}"))
    )
    with pytest.raises(UserError, match="another file"):
        Screen.read(path)


def test_values_in_an_external_file_are_not_read(good: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(bytes(4 * 120 * 20))

    def dense(file: h5py.File) -> None:
        del file["X"]
        made = file.create_dataset("X", (120, 20), "f4", external=[(str(tmp_path / "secret"), 0, 9600)])
        made.attrs["encoding-type"], made.attrs["encoding-version"] = "array", "0.2.0"

    with pytest.raises(UserError, match="another file"):
        Screen.read(changed(good, tmp_path / "a.h5ad", dense))


def test_links_out_of_a_zarr_are_not_followed(good: Path, tmp_path: Path) -> None:
    path = shutil.copytree(good / "screen.zarr", tmp_path / "a.zarr")
    shutil.move(path / "obs", tmp_path / "obs")
    (path / "obs").symlink_to(tmp_path / "obs")
    with pytest.raises(UserError, match="leads out of it"):
        Screen.read(path)


@pytest.mark.parametrize("name", ["../../evil", "CON\x00"])
def test_no_name_in_a_file_leads_out_of_a_folder(
    good: Path, screen: Screen, tmp_path: Path, name: str
) -> None:
    folder = shutil.copytree(good / "scores", tmp_path / "in" / "scores")
    for table in ("scores", "summary", "strata"):
        text = (folder / f"{table}.csv").read_text().replace("additive", name)
        (folder / f"{table}.csv").write_text(text)
    survives(lambda: page.write(folder, tmp_path / "in" / "page.html"))
    record = json.loads((good / "run" / "run.json").read_text()) | {"model": name, "checksum": None}
    (tmp_path / "in" / "run.json").write_text(json.dumps(record))
    assert not survives(lambda: Record.read(tmp_path / "in"))
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_script_in_a_name_is_a_name_in_a_report(good: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(good / "scores", tmp_path / "scores")
    evil = "<script>alert(1)</script>"
    for path in folder.glob("*.csv"):
        path.write_text(path.read_text().replace("additive", evil))
    about = json.loads((folder / "about.json").read_text())
    (folder / "about.json").write_text(
        json.dumps(about | {"notes": {evil: [evil]}, "versions": {"knockon": evil, evil: evil}})
    )
    page.write(folder, tmp_path / "page.html")
    assert evil not in (tmp_path / "page.html").read_text()
