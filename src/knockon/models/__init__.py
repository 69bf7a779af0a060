"""The models: this folder is the registry, one module for each, and ``_modules`` are not models.

A model's file is imported only when it is asked for, so that listing them costs nothing.
"""

import difflib
import importlib
import inspect
import pkgutil
from types import ModuleType

from knockon.model import Recipe
from knockon.types import UserError


def names() -> tuple[str, ...]:
    """All models, sorted, as their files are called; nothing is imported."""
    found = (module.name for module in pkgutil.iter_modules(__path__))
    return tuple(sorted(name for name in found if not name.startswith("_")))


def load(name: str) -> ModuleType:
    """Import the module of a model; hyphens and underscores are alike.

    Raises
    ------
    UserError
        If there is no such model.
    """
    module = name.replace("-", "_")
    if module not in names():
        raise UserError(
            "Unknown model",
            offenders=[name],
            expected="one of " + ", ".join(names()),
            mend=_suggest(module, names()),
        )
    return importlib.import_module(f"{__name__}.{module}")


def presets(name: str) -> tuple[str, ...]:
    """Presets of a model: the public functions of its module that are annotated to return a ``Recipe``."""
    functions = inspect.getmembers(load(name), inspect.isfunction)
    return tuple(
        preset
        for preset, function in functions
        if not preset.startswith("_") and inspect.signature(function).return_annotation is Recipe
    )


def recipe(name: str, preset: str = "default") -> Recipe:
    """Return a model and how it is trained, by the names of both.

    Raises
    ------
    UserError
        If there is no such model, or it has no such preset.
    """
    if preset not in presets(name):
        raise UserError(
            f"The model {name} has no such preset",
            offenders=[preset],
            expected="one of " + ", ".join(presets(name)),
            mend=_suggest(preset, presets(name)),
        )
    return getattr(load(name), preset)()


def _suggest(wrong: str, right: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(wrong, right, 3, 0.5)
    return "did you mean " + " or ".join(near) + "?" if near else ""


def __getattr__(name: str) -> ModuleType:
    """Import a model at first use, as in ``knockon.models.additive.Config``."""
    if name.startswith("_") or name not in names():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return load(name)
