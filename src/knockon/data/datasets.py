"""Public screens: where they are, how they are read, and whom to cite."""

import importlib
from dataclasses import dataclass
from pathlib import Path

from knockon.data.conventions import Columns
from knockon.types import UserError


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A screen that anybody can download.

    Parameters
    ----------
    name
        To ask for it.
    address
        Of the file.
    checksum
        Such as ``md5:...``; None where none was published.
    columns
        What ``Screen.read`` must be told.
    citation
        The publication, with its accession number.
    """

    name: str
    address: str
    checksum: str | None
    columns: Columns
    citation: str


DATASETS = (
    Dataset(
        name="norman2019",
        address="https://zenodo.org/records/13350497/files/NormanWeissman2019_filtered.h5ad",
        checksum="md5:c870e6967d91c017d9da827bab183cd6",
        columns=Columns(perturbation_key="perturbation", control="control"),
        citation="Norman et al., Science 365:786 (2019), GSE133344; as harmonized by scPerturb",
    ),
    Dataset(
        name="combosciplex",
        address="https://figshare.com/ndownloader/files/44229635",
        checksum=None,
        columns=Columns(perturbation_key="condition", layer="counts"),
        citation="Srivatsan et al., Science 367:45 (2020), GSE139944; the subset with combinations",
    ),
)


def download(name: str, folder: str | Path) -> Path:
    """Download a public screen, unless it is there already, and return its path.

    Raises
    ------
    UserError
        If the name is unknown or pooch is not installed.
    """
    found = next((dataset for dataset in DATASETS if dataset.name == name), None)
    if found is None:
        names = ", ".join(dataset.name for dataset in DATASETS)
        raise UserError("Unknown data set", offenders=[name], expected=f"one of {names}")
    try:
        pooch = importlib.import_module("pooch")
    except ModuleNotFoundError as error:
        raise UserError("Downloading needs pooch", mend="pip install 'knockon[data]'") from error
    return Path(pooch.retrieve(found.address, found.checksum, fname=f"{name}.h5ad", path=Path(folder)))
