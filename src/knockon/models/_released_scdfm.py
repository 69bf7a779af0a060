"""Weights of the released scDFM program, under the names and in the shapes that they have here."""

from collections.abc import Iterator

import torch
from torch import Tensor

from knockon.models._released import Weights, renamed, tensors
from knockon.types import CONTROL, Spec, UserError

SPECIALS = ("<pad>", "<cls>", "<mask>", CONTROL)
"""First tokens of a released vocabulary; the sorted genes follow."""

RENAMED = (
    ("encoder.enc_norm", "genes.table_norm"),
    ("encoder.perturbation_interaction.norm1", "genes.query_norm"),
    ("encoder.perturbation_interaction.cross_attn.out_proj", "genes.attention.out"),
    ("encoder.perturbation_interaction.norm2", "genes.maps_norm"),
    ("encoder.perturbation_interaction.linear1", "genes.maps.0"),
    ("encoder.perturbation_interaction.linear2", "genes.maps.1"),
    ("value_encoder_1.linear1", "values.first"),
    ("value_encoder_1.linear2", "values.second"),
    ("value_encoder_1.norm", "values.norm"),
    ("value_encoder_2.linear1", "control_values.first"),
    ("value_encoder_2.linear2", "control_values.second"),
    ("value_encoder_2.norm", "control_values.norm"),
    ("fusion_layer.0", "fusion"),
    ("fusion_layer.2", "fusion_out.1"),
    ("fusion_layer.3", "fusion_out.2"),
    ("t_embedder.mlp.0", "time.maps.0"),
    ("t_embedder.mlp.2", "time.maps.2"),
    ("final_layer.fc.0", "head"),
    ("final_layer.fc.2", "head_out.1"),
    ("final_layer.fc.4", "velocity"),
)
IN_LAYER = (
    ("gene_adaLN.{}.norm", "genes.norm"),
    ("gene_adaLN.{}.adaLN_modulation.1", "genes.modulation"),
    ("adapter_layer.{}.0", "adapter.first"),
    ("adapter_layer.{}.3", "adapter.second"),
)
IN_BLOCK = (
    ("adaLN_modulation.1", "modulation"),
    ("mlp.fc1", "maps.0"),
    ("mlp.fc2", "maps.2"),
    ("attn.out_proj", "attention.out"),
)
BLOCKS = (
    ("diff_self_attn", "to_state", ("q_proj_1", "q_proj_2", "v_proj"), ("k_proj_1", "k_proj_2")),
    ("diff_cross_attn", "to_control", ("q_proj_1", "k_proj_1", "v_proj"), ("q_proj_2", "k_proj_2")),
)
"""Released and own names of the blocks of a layer; what they project from the state and the reference."""


def from_released(weights: Weights, spec: Spec) -> dict[str, Tensor]:
    """Parameters of an ``SCDFM`` from those of a released checkpoint.

    Linear in the weights, so gradients are translated as well. Left out are the head that predicts
    perturbations, and rows of tables that belong to no gene and no perturbation of the spec.

    Parameters
    ----------
    weights
        By their released names.
    spec
        Its genes are the vocabulary of the checkpoint, in any order. Perturbations that are not among
        them are, with ``control``, the rows of its drug table in sorted order.

    Returns
    -------
    dict
        All parameters of the model, and no buffer.

    Raises
    ------
    UserError
        If the tables are too small for the spec.
    """
    released = tensors(weights)
    return {f"network.{name}": tensor for name, tensor in _translated(released, spec)}


def _translated(released: dict[str, Tensor], spec: Spec) -> Iterator[tuple[str, Tensor]]:
    yield from renamed(released, RENAMED, "", "")
    yield from _tables(released, spec)
    yield from _neighbor_attention(released)
    layers = 1 + max(int(name.split(".")[1]) for name in released if name.startswith("blocks."))
    for index in range(layers):
        numbered = tuple((theirs.format(index), ours) for theirs, ours in IN_LAYER)
        yield from renamed(released, numbered, "", f"layers.{index}.")
        for theirs, ours, of_state, of_reference in BLOCKS:
            old, new = f"blocks.{index}.{theirs}.", f"layers.{index}.{ours}."
            yield from renamed(released, IN_BLOCK, old, new)
            for name, parts in (("from_state", of_state), ("from_reference", of_reference)):
                stacked = torch.cat([released[f"{old}attn.{part}.weight"] for part in parts])
                yield f"{new}attention.{name}.weight", stacked
            lambdas = [released[f"{old}attn.lambda_{part}"] for part in ("q1", "k1", "q2", "k2")]
            yield f"{new}attention.lambdas", torch.stack(lambdas)
            yield f"{new}attention.scale", released[f"{old}attn.subln.weight"]


def _tables(released: dict[str, Tensor], spec: Spec) -> Iterator[tuple[str, Tensor]]:
    vocabulary = [*SPECIALS, *sorted(spec.genes)]
    yield "genes.table.weight", _rows(released["encoder.embedding.weight"], vocabulary, spec.genes)
    if spec.vectors is None and not set(spec.perturbations) <= set(spec.genes):
        drugs, old = sorted([CONTROL, *spec.perturbations]), "perturbation_embedder."
        yield (
            "conditions.own.table.weight",
            _rows(released[f"{old}embedding.weight"], drugs, spec.perturbations),
        )
        yield from renamed(released, ((f"{old}enc_norm", "conditions.own.norm"),), "", "")


def _rows(table: Tensor, vocabulary: list[str], names: tuple[str, ...]) -> Tensor:
    if len(vocabulary) > len(table):
        raise UserError(
            f"A table of {len(table)} rows is too small for {len(vocabulary)} names",
            expected="the genes and perturbations that the checkpoint was trained on",
        )
    position = {name: row for row, name in enumerate(vocabulary)}
    return table[[position[name] for name in (CONTROL, *names)]]


def _neighbor_attention(released: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for kind in ("weight", "bias"):
        query, key, value = released[f"encoder.perturbation_interaction.cross_attn.in_proj_{kind}"].chunk(3)
        yield f"genes.attention.query.{kind}", query
        yield f"genes.attention.key_value.{kind}", torch.cat([key, value])
