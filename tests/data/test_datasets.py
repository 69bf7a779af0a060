import sys
import types

import pytest

from knockon.data import datasets
from knockon.types import UserError


def test_names_are_unique_and_addresses_secure():
    assert len({dataset.name for dataset in datasets.DATASETS}) == len(datasets.DATASETS)
    assert all(dataset.address.startswith("https://") for dataset in datasets.DATASETS)


def test_a_download_is_checked_and_named(monkeypatch, tmp_path):
    asked = []
    fake = types.ModuleType("pooch")
    fake.retrieve = lambda *arguments, **options: (
        asked.append((arguments, options)) or tmp_path / options["fname"]
    )
    monkeypatch.setitem(sys.modules, "pooch", fake)
    first = datasets.DATASETS[0]
    assert datasets.download(first.name, tmp_path) == tmp_path / f"{first.name}.h5ad"
    assert asked[0][0] == (first.address, first.checksum)


def test_what_cannot_be_downloaded_is_explained(monkeypatch, tmp_path):
    with pytest.raises(UserError, match=r"Unknown data set: nothing.*norman2019"):
        datasets.download("nothing", tmp_path)
    monkeypatch.setitem(sys.modules, "pooch", None)
    with pytest.raises(UserError, match=r"needs pooch.*knockon\[data\]"):
        datasets.download("norman2019", tmp_path)
