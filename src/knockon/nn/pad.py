"""The PAD-Transformer of scDFM: velocity of a cell's genes, given a control cell and a condition."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from knockon.nn.attention import DifferentialAttention, SoftmaxAttention
from knockon.nn.blocks import (
    Block,
    GeneModulation,
    Heads,
    Joined,
    TimeEncoder,
    ValueEncoder,
    dropout,
    linear,
)
from knockon.nn.conditions import NOTHING, ConditionEncoder, GeneEncoder
from knockon.types import Condition, Spec


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Sizes of the network, and its departures from the published one."""

    width: int = 128
    """Width of all vectors; a multiple of 8 and of ``heads``."""
    layers: int = 4
    """Layers, each of two attention blocks."""
    heads: int = 8
    """Heads of the attentions over genes."""
    dropout: float = 0.0
    """Rate in the encoders and the adapters, in training only (see ``dropout_in_generation``)."""
    attention: Literal["differential", "softmax"] = "differential"
    """Ablation: ordinary attention in place of the difference of two maps."""
    control_attention: bool = True
    """Ablation: without it, the second block of a layer refers to the state as the first one does."""
    backbone: Literal["pad", "transformer"] = "pad"
    """Ablation: ``transformer`` has the same blocks but neither gene modulation nor adapters; the
    condition is added to time."""
    time_scale: float = 1000.0
    """Factor on time before its waves; 1 in the paper, where t = 0 and t = 1 look nearly the same."""
    zero_init: bool = True
    """Gates and velocity begin at zero, as adaLN-Zero means it; the released program draws them at random."""
    normed_keys: bool = True
    """What an attention refers to is normalized; the released program refers to raw states."""
    residual_adapter: bool = True
    """The adapters add to the state; in the paper they replace it."""


class Adapter(nn.Module):
    """Mixes the condition into every gene of the state."""

    def __init__(self, dim: int, *, rate: float, residual: bool) -> None:
        super().__init__()
        self.rate, self.residual = rate, residual
        self.first = Joined(dim, dim)
        self.second = linear(dim, dim)

    def forward(self, state: Tensor, condition: Tensor, rng: torch.Generator | None) -> Tensor:
        """Mix; ``condition`` is what ``first.project`` made."""
        hidden = dropout(functional.leaky_relu(self.first(state, condition)), self.rate, rng)
        mixed = functional.leaky_relu(self.second(hidden))
        return state + mixed if self.residual else mixed


class LayerKnown(NamedTuple):
    """The part of a layer that depends neither on the state nor on time."""

    genes: tuple[Tensor, Tensor] | None
    condition: Tensor | None
    control: Heads | None


class Layer(nn.Module):
    """Gene modulation, adapter, a block that refers to the state and one that refers to the control cell."""

    def __init__(self, config: Architecture, depth: int) -> None:
        super().__init__()
        dim, zero = config.width, config.zero_init
        self.genes = self.adapter = None
        if config.backbone == "pad":
            self.genes = GeneModulation(dim, zero=zero)
            self.adapter = Adapter(dim, rate=config.dropout, residual=config.residual_adapter)
        self.refers_to_control = config.control_attention
        self.to_state, self.to_control = (
            Block(
                dim,
                DifferentialAttention(dim, config.heads, depth=depth, reference=reference)
                if config.attention == "differential"
                else SoftmaxAttention(dim, config.heads, reference=reference),
                zero=zero,
                normed_keys=config.normed_keys,
            )
            for reference in ("state", "control" if config.control_attention else "state")
        )

    def know(
        self,
        genes: Float[Tensor, "genes dim"],
        condition: Float[Tensor, "cells dim"],
        control: Float[Tensor, "cells genes dim"],
    ) -> LayerKnown:
        """Project the encodings of genes, conditions and control cells."""
        return LayerKnown(
            genes=None if self.genes is None else self.genes.project(genes),
            condition=None if self.adapter is None else self.adapter.first.project(condition[:, None]),
            control=self.to_control.attention.project(control) if self.refers_to_control else None,
        )

    def forward(
        self,
        state: Float[Tensor, "cells genes dim"],
        time: Float[Tensor, "cells dim"],
        known: LayerKnown,
        rng: torch.Generator | None,
    ) -> Float[Tensor, "cells genes dim"]:
        """Advance the state."""
        if self.genes is not None and known.genes is not None:
            state = self.genes(state, known.genes)
        if self.adapter is not None and known.condition is not None:
            state = self.adapter(state, known.condition, rng)
        return self.to_control(self.to_state(state, time), time, known.control)


class Known(NamedTuple):
    """All that the network needs and that depends neither on the state nor on time."""

    genes: Float[Tensor, "genes dim"]
    condition: Float[Tensor, "cells dim"]
    fusion: Float[Tensor, "cells genes dim"]
    layers: tuple[LayerKnown, ...]
    head: Float[Tensor, "cells 1 dim"]


class PADTransformer(nn.Module):
    """Velocity network of scDFM [scdfm2026, fig. 1].

    A cell is a sequence of genes without order: each token is the encoding of a gene plus that of its
    value, so any genes of the panel can be computed at once. ``encode`` does what all cells share,
    ``know`` what stays the same along the path of a cell, and ``forward`` the rest.
    """

    def __init__(self, spec: Spec, config: Architecture) -> None:
        super().__init__()
        dim = config.width
        self.config = config
        self.genes = GeneEncoder(len(spec.genes), dim, dropout=config.dropout)
        self.conditions = ConditionEncoder(spec, dim)
        self.time = TimeEncoder(dim, config.time_scale)
        self.values, self.control_values = ValueEncoder(dim), ValueEncoder(dim)
        self.fusion = Joined(dim, dim)
        self.fusion_out = nn.Sequential(nn.GELU(), linear(dim, dim), nn.LayerNorm(dim))
        self.layers = nn.ModuleList(Layer(config, depth) for depth in range(config.layers))
        self.head = Joined(dim, dim)
        self.head_out = nn.Sequential(nn.LeakyReLU(), linear(dim, dim), nn.LeakyReLU())
        self.velocity = linear(dim, 1)
        if config.zero_init:
            nn.init.zeros_(self.velocity.weight)

    def encode(
        self, genes: Int[Tensor, "genes"], condition: Condition, rng: torch.Generator | None = None
    ) -> tuple[Float[Tensor, "genes dim"], Float[Tensor, "sets dim"]]:
        """Encode genes, by their positions in the panel, and conditions; ``rng`` switches dropout on."""
        slots = self.conditions.token[condition.perturbation]
        nothing = slots.new_full((1,), NOTHING)
        encoded = self.genes(torch.cat([genes + 1, nothing, slots.flatten()]), rng)
        g, empty, perturbed = encoded.split([len(genes), 1, slots.numel()])
        return g, self.conditions(condition, perturbed.unflatten(0, slots.shape), empty[0])

    def know(
        self,
        genes: Float[Tensor, "genes dim"],
        control: Float[Tensor, "cells genes"],
        condition: Float[Tensor, "cells dim"],
        rng: torch.Generator | None = None,
    ) -> Known:
        """Compute what depends neither on the state nor on time, from encodings and control cells."""
        control_states = dropout(self.control_values(control), self.config.dropout, rng) + genes
        reference = control_states
        if self.config.normed_keys:
            reference = functional.layer_norm(control_states, control_states.shape[-1:], eps=1e-6)
        return Known(
            genes=genes,
            condition=condition,
            fusion=self.fusion.project(control_states),
            layers=tuple(layer.know(genes, condition, reference) for layer in self._layers()),
            head=self.head.project(condition[:, None]),
        )

    def forward(
        self,
        x_t: Float[Tensor, "cells genes"],
        t: Float[Tensor, "cells"],
        known: Known,
        rng: torch.Generator | None = None,
    ) -> Float[Tensor, "cells genes"]:
        """Velocity of the state ``x_t`` at time ``t``, at least in float32; ``rng`` switches dropout on."""
        state, time = self.embed(x_t, t, known, rng)
        for layer, layer_known in zip(self._layers(), known.layers, strict=True):
            state = layer(state, time, layer_known, rng)
        hidden = self.head_out(self.head(state, known.head))
        with torch.autocast(hidden.device.type, enabled=False):
            return self.velocity(hidden.to(x_t.dtype)).squeeze(-1)

    def embed(
        self, x_t: Tensor, t: Tensor, known: Known, rng: torch.Generator | None
    ) -> tuple[Float[Tensor, "cells genes dim"], Float[Tensor, "cells dim"]]:
        """Make the first state and the encoding of time (and condition, where there are no adapters)."""
        value = dropout(self.values(x_t), self.config.dropout, rng)
        state = self.fusion_out(self.fusion(value + known.genes, known.fusion))
        time = self.time(t)
        return state, time + known.condition if self.config.backbone == "transformer" else time

    def _layers(self) -> Iterable[Layer]:
        return cast("Iterable[Layer]", self.layers)
