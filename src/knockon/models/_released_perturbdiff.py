"""Weights of the released PerturbDiff program, under the names and in the shapes that they have here."""

from collections.abc import Iterator, Sequence

from torch import Tensor

from knockon.models._released import Weights, renamed, tensors
from knockon.types import Spec, UserError

RENAMED = (
    ("model.t_embedder.mlp.0", "network.time.maps.0"),
    ("model.t_embedder.mlp.2", "network.time.maps.2"),
    ("model.class_embedding.emb", "condition"),
    ("model.x_embedder", "network.state"),
    ("model.final_layer.adaLN_modulation.1", "network.modulation"),
    ("model.final_layer.linear", "network.head"),
    ("cov_encoder.transform", "conditions.join"),
)
BLOCK = (
    ("attn.qkv", "attention.inputs.0"),
    ("adaLN_modulation.1", "cells.modulation"),
    ("control_adaLN_modulation.1", "control.modulation"),
    ("mlp.fc1", "cells.maps.0"),
    ("mlp.fc2", "cells.maps.2"),
    ("control_mlp.fc1", "control.maps.0"),
    ("control_mlp.fc2", "control.maps.2"),
)
COVARIATES = ("cov_encoder.celltype_encoder.weight", "cov_encoder.batch_encoder.weight")


def from_released(weights: Weights, spec: Spec, covariates: Sequence[str] = COVARIATES) -> dict[str, Tensor]:
    """Parameters of a ``PerturbDiff`` in its paper preset from those of a released checkpoint.

    Linear in the weights, so gradients are translated as well. Left out is what never reaches an output:
    the head of the control cells and their last maps, the second half of their embedding, and the embedding
    of genes.

    Parameters
    ----------
    weights
        By their released names.
    spec
        Perturbations, covariates and genes in the order of the checkpoint's tables.
    covariates
        Released names of the tables of the spec's covariates.

    Raises
    ------
    UserError
        If the checkpoint was made for other genes or perturbations than the spec's.
    """
    released = tensors(weights)
    genes, known = len(released["model.final_layer.linear.bias"]), len(spec.perturbations) + 1
    rows = len(released["cov_encoder.pert_encoder.weight"])
    if (genes, rows) != (len(spec.genes), known):
        raise UserError(
            f"A checkpoint of {genes} genes and {rows - 1} perturbations",
            expected=f"{len(spec.genes)} genes and {known - 1} perturbations",
        )
    return dict(_translated(released, covariates))


def _translated(released: dict[str, Tensor], covariates: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    yield from renamed(released, RENAMED, "", "")
    genes = len(released["model.final_layer.linear.bias"])
    yield "network.control.weight", released["model.x_control_embedder.weight"][:, :genes]
    yield "network.control.bias", released["model.x_control_embedder.bias"]
    yield "network.token", released["model.gene_embedding.null_emb.weight"][0]
    yield "hidden", released["model.class_embedding.null_emb.weight"][0]
    yield "conditions.own.table.weight", released["cov_encoder.pert_encoder.weight"]
    for index, name in enumerate(covariates):
        yield f"conditions.covariates.{index}.table.weight", released[name]
    blocks = 1 + max(int(name.split(".")[2]) for name in released if name.startswith("model.blocks."))
    for index in range(blocks):
        yield from _block(released, index, last=index == blocks - 1)


def _block(released: dict[str, Tensor], index: int, *, last: bool) -> Iterator[tuple[str, Tensor]]:
    old, new = f"model.blocks.{index}.block.", f"network.blocks.{index}."
    yield f"{new}attention.query_scale", released[f"{old}attn.q_norm.weight"]
    yield f"{new}attention.key_scale", released[f"{old}attn.k_norm.weight"]
    width = len(released[f"{old}mlp.fc2.bias"])
    for kind in ("weight", "bias"):
        out = released[f"{old}attn.proj.{kind}"]
        yield f"{new}attention.outputs.0.{kind}", out[:width] if last else out
    for name, tensor in renamed(released, BLOCK, old, new):
        if not last or ".control." not in name:
            yield name, tensor
        elif "modulation" in name:
            yield name, tensor[: 2 * width]
