"""Cells without control cells, under conditions of which any part may be left open."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch

from knockon import devices
from knockon.data import conventions
from knockon.model import Model, device_of
from knockon.predict import CHUNK, described, refuse_few, refuse_unknown, words_of
from knockon.types import CONTROL, Label, Noise, Spec, UserError

ANY = "any"
"""How a class that is left open is written."""


@dataclass(frozen=True, kw_only=True)
class Given:
    """A condition of which only some classes are given.

    Parameters
    ----------
    label
        The condition; where a class is open, it has the control or the first level, which mean nothing.
    classes
        Which classes are given, in the order of ``Spec.classes``.
    """

    label: Label
    classes: tuple[bool, ...]

    @classmethod
    def of(cls, conditions: Mapping[str, str], spec: Spec) -> "Given":
        """Read classes as a person names them.

        Parameters
        ----------
        conditions
            Such as ``{"perturbation": "B+A", "cell_type": "CD4"}``; what is not named is open.

        Raises
        ------
        UserError
            If a class is unknown, or the perturbation has a context of its own.
        """
        unknown = [name for name in conditions if name not in spec.classes]
        if unknown:
            raise UserError(
                "Unknown class of conditions",
                offenders=unknown,
                expected="one of " + ", ".join(spec.classes),
                mend="name it as the run's screen does, such as --conditions perturbation=A+B",
            )
        done = conventions.parse(conditions.get("perturbation", CONTROL), known=spec.perturbations)
        if done.covariates:
            raise UserError(
                "A context within the perturbation",
                offenders=[conditions["perturbation"]],
                expected="each class on its own",
                mend="name the context as a further class, such as cell_type=CD4",
            )
        known = set(spec.perturbations)
        doses = zip(done.perturbations, done.doses, strict=True)
        undosed = [name for name, dose in doses if not dose and name in known]
        if undosed and spec.dose_unit is not None:
            raise UserError(
                "A perturbation without its dose",
                offenders=undosed,
                expected=f"a dose in {spec.dose_unit or 'the unit of the screen'}",
                mend=f"write it as {undosed[0]}@10",
            )
        levels = tuple(conditions.get(c.name, c.levels[0]) for c in spec.covariates)
        label = Label(done.perturbations, done.doses, levels)
        return cls(label=label, classes=tuple(name in conditions for name in spec.classes))

    def texts(self, spec: Spec) -> dict[str, str]:
        """Each class with what is given of it."""
        whole = dict(zip(spec.classes, (self.label.perturbation, *self.label.covariates), strict=True))
        return {
            name: text if given else ANY
            for (name, text), given in zip(whole.items(), self.classes, strict=True)
        }


@torch.inference_mode()
def generate(
    model: Model,
    given: Given,
    *,
    cells: int = 256,
    seed: int = 0,
    advance: Callable[[], None] = lambda: None,
) -> anndata.AnnData:
    """Generate cells of one condition from noise alone.

    Cells depend on the model, the seed, what is given and their number; whole chunks of ``CHUNK`` cells do
    not depend on how many follow. Processes that work together share the chunks.

    Parameters
    ----------
    model
        Fitted.
    given
        The condition; without any class given, cells are of no condition in particular.
    advance
        Called after each chunk of ``CHUNK`` cells, for a progress bar.

    Returns
    -------
    AnnData
        ``X`` is float32 CSR in the model's units; ``obs`` has ``perturbation``, the covariates, and
        ``dose`` where the model's screen has doses; what is open is ``any``. Only the first process has
        cells.

    Raises
    ------
    Refusal
        If the model has no basis for the condition.
    UserError
        If the model needs control cells, or a name or level is unknown.
    """
    refuse_few(cells)
    model.eval()
    device, spec = device_of(model), model.spec
    condition = spec.encode([given.label]).to(device)
    shown = torch.tensor([given.classes], dtype=torch.bool, device=device)
    texts = given.texts(spec)
    random = np.random.default_rng(words_of(seed, " | ".join(texts.values())))
    sizes = [min(CHUNK, cells - start) for start in range(0, cells, CHUNK)]
    chunks = list(zip(sizes, random.integers(2**62, size=len(sizes)).tolist(), strict=True))
    if given.classes[0]:
        refuse_unknown(model, [given.label])
    blocks = []
    for size, own in devices.share(chunks):
        drawn = model.generate(condition, shown, size, Noise(torch.Generator(device).manual_seed(own)))[0]
        blocks.append(sp.csr_matrix(drawn.float().cpu().numpy()))
        advance()
    made = [sp.csr_matrix((0, len(spec.genes))), *devices.joined_on_first(blocks)]
    obs = described([given.label], spec.covariates, dosed=spec.dose_unit is not None)
    texts |= {"dose": ANY} if not given.classes[0] and "dose" in obs else {}
    obs = obs.assign(**{name: pd.Categorical([text]) for name, text in texts.items()})
    obs = obs.iloc[np.zeros(sum(block.shape[0] for block in made), dtype=np.int64)]
    obs.index = pd.Index([f"generated_{i}" for i in range(len(obs))])
    matrix = sp.vstack(made, format="csr", dtype=np.float32)
    return anndata.AnnData(matrix, obs=obs, var=pd.DataFrame(index=pd.Index(spec.genes)))
