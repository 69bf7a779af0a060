"""What is kept of cells for the report: read back whole, and true to the cells."""

from dataclasses import replace

import numpy as np
import pytest

from knockon.evaluate.pairs import Pairs
from knockon.evaluate.report import portrait
from knockon.evaluate.report.portrait import Album
from knockon.evaluate.truth import Truth
from knockon.types import UserError


@pytest.fixture(scope="module")
def truth(screen, split):
    return Truth.of(screen, split)


@pytest.fixture
def album(truth, tmp_path):
    return Album.begin(tmp_path, truth)


def drawn(album, name="mine"):
    scene, portraits = portrait.read(album.folder)
    return scene, portraits[name]


def test_a_replicate_of_the_real_cells_is_their_portrait(album, truth):
    album.add("mine", Pairs(truth=truth, cells=truth.cells))
    scene, mine = drawn(album)
    np.testing.assert_allclose(mine.change, scene.change)
    for name in ("cells", "zeros", "quantiles", "spots"):
        np.testing.assert_array_equal(getattr(mine.cells, name), getattr(scene.real, name))


def test_the_real_effect_leads_from_0_to_1(album):
    scene, _ = portrait.read(album.folder)
    np.testing.assert_allclose(scene.control.center[:, 2:], [[0, 0]] * 3, atol=1e-5)
    np.testing.assert_allclose(scene.real.center[:, 2], 1, atol=1e-5)
    for side in (scene.control, scene.real):  # all 30 cells are on the map
        np.testing.assert_allclose(np.nanmean(side.spots, axis=1), side.center, atol=1e-5)


def test_means_are_of_all_cells_however_few_are_looked_at(truth, tmp_path, monkeypatch):
    monkeypatch.setattr(portrait, "LOOKED_AT", 7)
    monkeypatch.setattr(portrait, "SPOTS", 5)
    album = Album.begin(tmp_path, truth)
    controls = portrait.sp.csr_matrix(truth.screen.matrix[truth.screen.control_rows(truth.labels[0])])
    album.add("mine", Pairs(truth=truth, cells=(controls,) * 3))
    scene, mine = drawn(album)
    assert scene.control.cells[0] > 7
    for side, along in ((scene.control, 0), (scene.real, 1), (mine.cells, 0)):
        np.testing.assert_allclose(side.center[:, 2], along, atol=1e-5)
    np.testing.assert_allclose(mine.cells.center, scene.control.center, atol=1e-5)
    whole = [truth.space.project(cells)[:, :2].mean(axis=0) for cells in truth.cells]
    np.testing.assert_allclose(scene.real.center[:, :2], whole, atol=1e-5)


def test_half_of_the_effect_lies_half_way(album, truth):
    controls = album._controls[()][:30]
    mixed = tuple(portrait.sp.vstack([cells[:15], controls[:15]]).tocsr() for cells in truth.cells)
    album.add("mine", Pairs(truth=truth, cells=mixed))
    scene, mine = drawn(album)
    expected = (
        np.nanmean(scene.real.spots[:, :15, 2], axis=1) + np.nanmean(scene.control.spots[:, :15, 2], axis=1)
    ) / 2
    np.testing.assert_allclose(np.nanmean(mine.cells.spots[:, :, 2], axis=1), expected, atol=1e-5)


def test_genes_come_by_their_real_change_and_distributions_are_those_of_cells(album, truth):
    scene, _ = portrait.read(album.folder)
    size = np.abs(scene.change)
    assert (np.diff(size, axis=1) <= 1e-7).all()
    values = truth.cells[0][:, scene.shown[0, 0]].toarray().ravel()
    assert scene.real.zeros[0, 0] == pytest.approx((values == 0).mean())
    np.testing.assert_allclose(
        scene.real.quantiles[0, 0], np.quantile(values[values > 0], portrait.LEVELS), rtol=1e-5
    )


def test_what_singles_add_up_to(album, truth, screen):
    scene, _ = portrait.read(album.folder)
    means = {str(label): mean for label, mean in screen.means().items()}
    both = (means["A"] - means["control"]) + (means["B"] - means["control"])
    row = scene.conditions.index("A+B")
    np.testing.assert_allclose(scene.expected[row], both[scene.shown[row]], atol=1e-5)


def test_an_unmeasured_part_adds_up_to_nothing_known(make, tmp_path):
    screen = make.screen(make.cells(["control", "A", "B", "A+C"]))
    split = make.split(screen, lambda label: len(label.perturbations) == 2)
    scene = Album.begin(tmp_path, Truth.of(screen, split)).scene
    assert np.isnan(scene.expected).all()


def test_what_only_a_model_changes_is_kept_too(truth, tmp_path, monkeypatch):
    for name, count in (("CHANGED", 6), ("SURPRISING", 4), ("OWN", 5), ("TOP", 2)):
        monkeypatch.setattr(portrait, name, count)
    album = Album.begin(tmp_path, truth)
    quiet = next(gene for gene in range(40) if gene not in album.scene.shown[0])
    cells = [cells.tolil() for cells in truth.cells]
    cells[0][:, quiet] = 9.0
    album.add("mine", Pairs(truth=truth, cells=tuple(c.tocsr() for c in cells)))
    scene, mine = drawn(album)
    assert scene.shown.shape == (3, 10)
    assert mine.own[0, 0] == quiet
    assert mine.own_change[0, 0] == pytest.approx(9 - truth.control[0, quiet], rel=1e-5)
    assert all(set(own).isdisjoint(shown) for own, shown in zip(mine.own, scene.shown, strict=True))


def test_a_model_may_lack_conditions(album, truth):
    part = truth.select(truth.labels[1:])
    album.add("mine", Pairs(truth=part, cells=part.cells))
    scene, mine = drawn(album)
    assert mine.conditions == scene.conditions[1:]
    np.testing.assert_allclose(mine.change, scene.change[1:])


def test_less_is_kept_of_each_of_many_conditions(album, monkeypatch):
    monkeypatch.setattr(portrait, "MANY", 1)
    assert album._share(400) == 133
    assert album._share(12) == portrait.TOP


@pytest.mark.parametrize("name", ["a/b", "../up", "ü <b>", "truth"])
def test_any_name_of_a_model_is_a_file(album, truth, name):
    album.add(name, Pairs(truth=truth, cells=truth.cells))
    assert list(portrait.read(album.folder)[1]) == [name]


def test_portraits_of_another_scene_are_left_out(album, truth, tmp_path):
    album.add("mine", Pairs(truth=truth, cells=truth.cells))
    portrait.save(tmp_path, replace(album.scene, mark="other"))
    assert portrait.read(tmp_path)[1] == {}


def test_nothing_was_drawn(tmp_path):
    assert portrait.read(tmp_path) is None


@pytest.mark.parametrize("damage", [b"", b"no archive", None])
def test_a_damaged_file_is_one_message(album, truth, damage):
    path = album.folder / "portraits" / "truth.npz"
    if damage is None:
        np.savez(path, genes=np.array(["x"]))
    else:
        path.write_bytes(damage)
    with pytest.raises(UserError, match=r"truth\.npz"):
        portrait.read(album.folder)


def test_nothing_in_a_file_is_executed(album):
    path = album.folder / "portraits" / "truth.npz"
    np.savez(path, genes=np.array([object()], dtype=object))
    with pytest.raises(UserError, match=r"truth\.npz"):
        portrait.read(album.folder)


def test_one_gene_one_condition_one_cell(make, tmp_path):
    adata = make.cells(["control", "A", "B"], cells=3)
    keep = np.r_[0:7]
    screen = make.screen(adata[keep][:, :2].copy())
    split = make.split(screen, lambda label: label.perturbations == ("B",))
    truth = Truth.of(screen, split)
    album = Album.begin(tmp_path, truth)
    album.add("mine", Pairs(truth=truth, cells=truth.cells))
    scene, mine = drawn(album)
    assert scene.real.cells.tolist() == [1]
    assert mine.change.shape == (1, 2)
