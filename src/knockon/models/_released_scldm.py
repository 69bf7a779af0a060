"""Weights of the released scLDM program, under the names and in the shapes that they have here."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from knockon.models._released import Weights, renamed, tensors
from knockon.types import Spec, UserError

BLOCK = (("attn.c_attn", "attention.inputs"), ("attn.c_proj", "attention.out"))
CROSS = (
    ("ln_1", "set_norm"),
    ("ln_1q", "query_norm"),
    ("ln_2", "maps_norm"),
    ("attn.c_attn", "key_value"),
    ("attn.c_attn_q", "query"),
    ("attn.c_proj", "out"),
)
SELF = (("ln_1", "attention_norm"), ("ln_2", "maps_norm"), *BLOCK)
INPUTS = (
    ("input_layer.gene_embedding", "counts.table"),
    ("input_layer.projection.count_embedding", "counts.count"),
    ("input_layer.projection.mix", "counts.mix"),
    ("input_layer.projection.mlp_count.0", "counts.choice.0"),
    ("input_layer.projection.mlp_count.2", "counts.choice.2"),
    ("encoder.encoder_latent_input.0", "encoder.out"),
    ("decoder.decoder_latent_input.1", "decoder.inputs"),
    ("decoder_head.ln", "head_norm"),
    ("decoder_head.params", "head"),
)
FLOW = (
    ("input_proj", "network.inputs"),
    ("t_embedder.mlp.0", "network.time.maps.0"),
    ("t_embedder.mlp.2", "network.time.maps.2"),
    ("final_layer.adaln_modulation.1", "network.modulation"),
    ("final_layer.linear", "network.out"),
)


def autoencoder_from_released(weights: Weights, spec: Spec) -> dict[str, Tensor]:
    """Parameters of a ``SetAutoencoder`` from those of a released checkpoint, without prefixes.

    Linear in the weights, so gradients are translated as well. Left out are a frozen table of zeros and what
    has no effect: the bias of logits, of which all genes have the same, and the dispersion of no gene.

    Raises
    ------
    UserError
        If the checkpoint was made for another number of genes.
    """
    released = tensors(weights)
    rows = len(released["input_layer.gene_embedding.weight"])
    if rows != len(spec.genes) + 1:
        raise UserError(f"A checkpoint of {rows - 1} genes", expected=f"{len(spec.genes)}")
    return dict(_autoencoder(released))


def from_released(weights: Weights, spec: Spec, classes: Sequence[str]) -> dict[str, Tensor]:
    """Parameters of a ``LatentFlow`` but its autoencoder, from those of a released checkpoint.

    Parameters
    ----------
    weights
        By their released names, without a prefix.
    spec
        Perturbations and levels in the order of the checkpoint's tables. Its table of perturbations has no
        row of nothing, which gets zeros.
    classes
        Released names of the class of perturbations and of those of the spec's covariates.

    Raises
    ------
    UserError
        If the checkpoint's tables have other lengths.
    """
    released = tensors(weights)
    tables = [released[f"class_embeddings.{name}.weight"] for name in classes]
    found = [len(table) - 1 for table in tables]
    expected = [len(spec.perturbations), *(len(covariate.levels) for covariate in spec.covariates)]
    if found != expected:
        raise UserError(f"A checkpoint whose tables have {found} rows", expected=str(expected))
    return dict(_flow(released, tables))


def _autoencoder(released: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    shared = "decoder_head.theta.weight" in released
    for name, tensor in renamed(released, INPUTS, "", ""):
        if not (shared and name == "head.bias"):
            yield name, tensor
    if shared:
        yield "log_inverse", released["decoder_head.theta.weight"][1:, 0]
    if "input_layer.projection.bin_embeddings" in released:
        yield "counts.bins", released["input_layer.projection.bin_embeddings"]
    yield "encoder.queries", released["encoder.ca_layer.inducing_points"]
    for theirs, ours in (
        ("encoder.ca_layer.", "encoder.pool."),
        ("decoder.decoder_cross_attention.", "decoder.unpool."),
    ):
        yield from renamed(released, CROSS, theirs, ours)
        yield from _maps(released, theirs, ours)
    for side in ("encoder", "decoder"):
        for index in _indices(released, f"{side}.{side}_layers."):
            theirs, ours = f"{side}.{side}_layers.{index}.", f"{side}.blocks.{index}."
            yield from renamed(released, SELF, theirs, ours)
            yield from _maps(released, theirs, ours)


def _flow(released: dict[str, Tensor], tables: list[Tensor]) -> Iterator[tuple[str, Tensor]]:
    yield from renamed(released, FLOW, "", "")
    for index in _indices(released, "blocks."):
        theirs, ours = f"blocks.{index}.", f"network.blocks.{index}."
        yield from renamed(released, BLOCK, theirs, ours)
        yield from _maps(released, theirs, ours)
        for kind in ("weight", "bias"):
            parts = released[f"{theirs}adaln_modulation.1.{kind}"].chunk(6)
            yield f"{ours}modulation.{kind}", torch.cat([parts[i] for i in (1, 0, 2, 4, 3, 5)])
    yield "conditions.own.table.weight", torch.cat([torch.zeros_like(tables[0][:1]), tables[0][:-1]])
    for index, table in enumerate(tables[1:]):
        yield f"conditions.covariates.{index}.table.weight", table[:-1]
    yield "conditions.hidden", torch.stack([table[-1] for table in tables])


def _maps(released: dict[str, Tensor], old: str, new: str) -> Iterator[tuple[str, Tensor]]:
    yield f"{new}maps.inputs.weight", torch.cat([released[f"{old}mlp.w{i}.weight"] for i in (1, 2)])
    yield f"{new}maps.out.weight", released[f"{old}mlp.c_proj.weight"]


def _indices(released: dict[str, Tensor], prefix: str) -> range:
    found = {int(name.removeprefix(prefix).split(".")[0]) for name in released if name.startswith(prefix)}
    return range(len(found))
