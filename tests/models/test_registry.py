from pathlib import Path

import pytest

from knockon import models
from knockon.model import Recipe
from knockon.types import UserError


def test_baselines_are_listed_and_helpers_are_not() -> None:
    listed = models.names()
    assert {"no_effect", "mean_shift", "additive", "linear", "nearest", "latent_additive"} <= set(listed)
    assert not [name for name in listed if name.startswith("_")]


def test_hyphens_and_underscores_are_alike() -> None:
    assert models.load("latent-additive") is models.load("latent_additive")


def test_unknown_model_is_named_with_its_likeness() -> None:
    with pytest.raises(UserError, match=r"aditive.*did you mean .*additive"):
        models.load("aditive")


def test_unknown_preset_is_named_with_those_that_exist() -> None:
    with pytest.raises(UserError, match=r"papr.*one of default"):
        models.recipe("additive", "papr")


def test_presets_are_the_functions_that_return_a_recipe() -> None:
    assert models.presets("latent_additive") == ("default", "small")
    assert models.presets("linear") == ("default",)
    assert isinstance(models.recipe("latent_additive", "small"), Recipe)


def test_every_model_has_a_default_preset() -> None:
    assert all("default" in models.presets(name) for name in models.names())


def test_models_are_attributes() -> None:
    assert models.additive.Config().missing == "refuse"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        models.nothing  # noqa: B018


def test_folder_is_the_registry_and_listing_imports_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "explosive.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "_part.py").write_text("")
    monkeypatch.setattr(models, "__path__", [str(tmp_path)])
    assert models.names() == ("explosive",)
    with pytest.raises(RuntimeError, match="imported"):
        models.load("explosive")
