from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from knockon.data import h5ad
from knockon.data.h5ad import read_h5ad, write_h5ad
from knockon.types import UserError


@pytest.fixture
def cells() -> anndata.AnnData:
    values = np.random.default_rng(0).random((50, 20), dtype=np.float32)
    obs = pd.DataFrame({"perturbation": ["A", "B"] * 25}, index=[f"c{i}" for i in range(50)])
    made = anndata.AnnData(
        sp.csr_matrix(values), obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(20)])
    )
    made.layers["dense"] = values
    made.obsm["X_latent"] = values[:, :2]
    made.uns["knockon"] = {"model": "m", "total": -1.0, "none": [], "table": pd.DataFrame({"a": [1.0]})}
    return made


def test_what_is_written_is_what_anndata_writes(cells: anndata.AnnData, tmp_path: Path) -> None:
    write_h5ad(cells, tmp_path / "ours.h5ad")
    cells.write_h5ad(tmp_path / "theirs.h5ad")
    ours, theirs = (anndata.read_h5ad(tmp_path / f"{name}.h5ad") for name in ("ours", "theirs"))
    assert (ours.X != theirs.X).nnz == 0
    pd.testing.assert_frame_equal(ours.obs, theirs.obs)
    assert str(ours) == str(theirs)
    assert str(ours.uns) == str(theirs.uns)
    np.testing.assert_array_equal(ours.layers["dense"], theirs.layers["dense"])


def test_the_same_cells_are_the_same_bytes(cells: anndata.AnnData, tmp_path: Path) -> None:
    for name in "ab":
        write_h5ad(cells, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_flipped_bit_of_a_value_is_found_by_any_reader(cells: anndata.AnnData, tmp_path: Path) -> None:
    write_h5ad(cells, tmp_path / "a.h5ad")
    content = bytearray((tmp_path / "a.h5ad").read_bytes())
    content[content.index(cells.layers["dense"].tobytes()) + 1000] ^= 1
    (tmp_path / "a.h5ad").write_bytes(content)
    with pytest.raises(OSError, match="filter returned failure"):
        anndata.read_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(UserError, match=r"a.h5ad .*filter returned failure"):
        read_h5ad(tmp_path / "a.h5ad")


@pytest.mark.parametrize("room", [0, 500, 3000, 20000])
def test_a_full_disk_is_a_message_and_leaves_the_file_before(
    cells: anndata.AnnData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    (tmp_path / "a.h5ad").write_text("before")

    class Full(h5ad._Sink):
        def write(self, data: object) -> int:
            if self.tell() > room:
                self.failure = OSError(28, "No space left on device")
            return super().write(data)

    monkeypatch.setattr(h5ad, "_Sink", Full)
    with pytest.raises(UserError, match=r"a.h5ad \(No space left on device\)"):
        write_h5ad(cells, tmp_path / "a.h5ad")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]
