import anndata
import numpy as np
import pandas as pd
import pytest
import torch

from knockon import models
from knockon.data import simulate
from knockon.data.conventions import Columns
from knockon.data.screen import Screen
from knockon.embed import annotated, embed, refuse_without_embedding
from knockon.model import Model
from knockon.types import UserError


@pytest.fixture(scope="module")
def adata() -> anndata.AnnData:
    return simulate.simulate(simulate.tiny())


@pytest.fixture(scope="module")
def screen(adata: anndata.AnnData) -> Screen:
    return Screen.from_anndata(adata, columns=Columns(layer="counts"))


@pytest.fixture(scope="module")
def model(screen: Screen) -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = models.recipe("scldm_vae", "small").model.build(screen.spec())
    model.fit_statistics(screen)
    return model.eval()


def test_cells_keep_their_order_and_what_is_known_of_them(
    adata: anndata.AnnData, screen: Screen, model: Model
) -> None:
    embedded = annotated(model, screen)
    assert list(embedded.obs_names) == list(adata.obs_names)
    assert (embedded.obs["perturbation"].astype(str) == adata.obs["perturbation"].astype(str)).all()
    assert (adata.layers["counts"] != embedded.X).nnz == 0
    latents = embedded.obsm["X_scldm_vae"]
    assert latents.dtype == np.float32
    assert latents.shape == (adata.n_obs, 4 * 8)
    some = np.array([3, 700, 5])
    assert np.array_equal(latents[some], embed(model, screen, some).numpy())


def test_own_columns_take_the_place_of_what_was_recognized(screen: Screen, model: Model) -> None:
    obs = pd.DataFrame({"batch": np.arange(len(screen.cells))}, index=list(screen.cells))
    assert annotated(model, screen, obs).obs.equals(obs)


def test_a_selection_embeds_only_its_cells(screen: Screen, model: Model) -> None:
    label = screen.conditions[2]
    embedded = annotated(model, screen.select([label]))
    assert embedded.n_obs == len(screen.rows[label])
    assert set(embedded.obs["perturbation"]) == {label.perturbation}
    assert np.array_equal(embedded.X.toarray(), screen.gather(np.sort(screen.rows[label])))


def test_a_model_without_embedding_is_refused(screen: Screen, model: Model) -> None:
    refuse_without_embedding(model)
    with pytest.raises(UserError, match="no_effect has no embedding"):
        refuse_without_embedding(models.recipe("no_effect").model.build(screen.spec()))
