"""Transformer whose tokens are cells: a set of noised cells beside a set of control cells."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from knockon.nn.attention import split_heads
from knockon.nn.blocks import FeedForward, Joined, TimeEncoder, linear, modulate, zero

Streams = tuple[Float[Tensor, "sets cells dim"], Float[Tensor, "sets cells dim"]]
"""States of the cells and of the control cells beside them."""
Modulation = Float[Tensor, "sets #cells dim"]
"""What conditions a layer; one for a set, or one for each of its cells."""
Real = Bool[Tensor, "sets cells"] | None
"""Cells that count; the others fill a set up. None where all do."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Sizes of the network, and its departures from the published one."""

    width: int = 512
    """Width of each stream; a multiple of ``heads``."""
    layers: int = 8
    """Blocks."""
    heads: int = 8
    """Heads of the attention over cells."""
    join: Literal["features", "tokens"] = "features"
    """A cell and its control cell are one token of twice the width, or two tokens."""
    maps_see_attention: bool = True
    """The feed-forward maps read the state that attention has changed; in the paper's program, the block's
    input."""
    norm_by_variance: bool = False
    """Queries and keys are divided by their unbiased standard deviation, not by their root mean square: the
    rule of the library under the released program depends on its version."""


class JointAttention(nn.Module):
    """Attention over the cells of a set, with normalized queries and keys, of both streams at once."""

    def __init__(self, config: Architecture, *, last: bool) -> None:
        super().__init__()
        self.heads, self.by_tokens, self.by_variance = (
            config.heads,
            config.join == "tokens",
            config.norm_by_variance,
        )
        streams, width = (2, config.width) if self.by_tokens else (1, 2 * config.width)
        kept = 1 if last else 2
        self.inputs = nn.ModuleList(linear(width, 3 * width) for _ in range(streams))
        outputs = (width,) * kept if self.by_tokens else (kept * config.width,)
        self.outputs = nn.ModuleList(linear(width, wide) for wide in outputs)
        self.query_scale = nn.Parameter(torch.ones(width // config.heads))
        self.key_scale = nn.Parameter(torch.ones(width // config.heads))

    def forward(self, streams: Streams, real: Real) -> tuple[Tensor, ...]:
        """Return the update of each stream; of the cells alone in the last block."""
        tokens = streams if self.by_tokens else (torch.cat(streams, -1),)
        packed = torch.cat([to(z) for to, z in zip(self.inputs, tokens, strict=True)], dim=1)
        queries, keys, values = split_heads(packed, 3, self.heads)
        mask = None
        if real is not None:
            mask = torch.cat([real] * len(tokens), dim=1)[:, None, None]
        context = functional.scaled_dot_product_attention(
            self.normalize(queries, self.query_scale), self.normalize(keys, self.key_scale), values, mask
        )
        context = context.transpose(1, 2).flatten(2)
        if not self.by_tokens:
            return self.outputs[0](context).split(streams[0].shape[-1], dim=-1)
        halves = context.split(streams[0].shape[1], dim=1)
        return tuple(out(half) for out, half in zip(self.outputs, halves, strict=False))

    def normalize(self, x: Tensor, scale: Tensor) -> Tensor:
        """Bring queries or keys to unit size, then scale them."""
        if self.by_variance:
            return x * torch.rsqrt(x.var(-1, keepdim=True) + 1e-6) * scale
        return functional.rms_norm(x, scale.shape, scale.to(x.dtype), eps=1e-6)


class Stream(nn.Module):
    """What a block does to one of the two streams: modulation, and feed-forward maps.

    Parameters
    ----------
    read_only
        Nothing reads the stream after this block: it is modulated for the attention, and that is all.
    """

    def __init__(self, dim: int, *, maps_see_attention: bool, read_only: bool = False) -> None:
        super().__init__()
        self.maps_see_attention = maps_see_attention
        self.modulation = zero(linear(dim, (2 if read_only else 6) * dim))
        self.maps = None if read_only else FeedForward(dim)

    def enter(self, state: Tensor, condition: Modulation) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return what attention sees, and the modulation of what follows."""
        shift, scale, *rest = self.modulation(condition).chunk(2 if self.maps is None else 6, dim=-1)
        return modulate(state, shift.to(state.dtype), scale.to(state.dtype)), tuple(rest)

    def leave(self, state: Tensor, update: Tensor, rest: tuple[Tensor, ...]) -> Tensor:
        """Add what attention and the maps found."""
        assert self.maps is not None
        gate, shift, scale, gate_maps = (x.to(state.dtype) for x in rest)
        attended = torch.addcmul(state, gate, update)
        read = attended if self.maps_see_attention else state
        return torch.addcmul(attended, gate_maps, self.maps(modulate(read, shift, scale)))


class JointBlock(nn.Module):
    """Attention over both streams, then maps of each."""

    def __init__(self, config: Architecture, *, last: bool) -> None:
        super().__init__()
        self.attention = JointAttention(config, last=last)
        late = config.maps_see_attention
        self.cells = Stream(config.width, maps_see_attention=late)
        self.control = Stream(config.width, maps_see_attention=late, read_only=last)

    def forward(self, streams: Streams, condition: Modulation, real: Real) -> Streams:
        """Advance both streams; the last block leaves the control stream as it is."""
        parts = (self.cells, self.control)
        entered = [part.enter(x, condition) for part, x in zip(parts, streams, strict=True)]
        updates = self.attention((entered[0][0], entered[1][0]), real)
        moved = [
            part.leave(x, update, rest)
            for part, x, update, (_, rest) in zip(parts, streams, updates, entered, strict=False)
        ]
        return moved[0], moved[1] if len(moved) > 1 else streams[1]


class JointTransformer(nn.Module):
    """Denoises sets of cells: tokens are cells without order, so permuting a set permutes the answer.

    Parameters
    ----------
    genes
        Size of the panel.
    """

    def __init__(self, genes: int, config: Architecture) -> None:
        super().__init__()
        dim = config.width
        self.state = Joined(genes, dim)
        self.control = linear(genes, dim)
        self.token = nn.Parameter(torch.randn(dim))
        self.time = TimeEncoder(dim, 1.0)
        for layer in (self.time.maps[0], self.time.maps[2]):
            assert isinstance(layer, nn.Linear)
            nn.init.normal_(layer.weight, std=0.02)
        blocks = range(config.layers)
        self.blocks = nn.ModuleList(JointBlock(config, last=i == blocks[-1]) for i in blocks)
        self.modulation = zero(linear(dim, 2 * dim))
        self.head = linear(dim, genes)

    def entries(self, genes: Sequence[str]) -> dict[str, tuple[Sequence[str] | None, ...]]:
        """Names along the dimensions of parameters that belong to genes."""
        shown = [f"{of} {gene}" for of in ("state", "estimate") for gene in genes]
        return {
            "state.weight": (None, shown),
            "control.weight": (None, genes),
            "head.weight": (genes, None),
            "head.bias": (genes,),
        }

    def embed_control(self, control: Float[Tensor, "sets cells genes"]) -> Float[Tensor, "sets cells dim"]:
        """Embed the control cells; they stay the same while cells are denoised."""
        return self.control(control) + self.token

    def forward(
        self,
        x: Float[Tensor, "sets cells genes"],
        estimate: Float[Tensor, "sets cells genes"] | None,
        control: Float[Tensor, "sets cells dim"],
        condition: Modulation,
        real: Real = None,
    ) -> Float[Tensor, "sets cells genes"]:
        """Return what a rectifier turns into clean cells.

        Parameters
        ----------
        x
            Noised cells.
        estimate
            An earlier estimate of the clean cells; none is the same as zeros.
        control
            What ``embed_control`` made.
        condition
            Encoded time and condition, summed.
        real
            Cells that count.
        """
        other = self.state.bias[None, None] if estimate is None else self.state.project(estimate)
        state = self.state(x, other) + self.token
        condition = functional.silu(condition)
        streams = (state, control.to(state.dtype))
        for block in self.blocks:
            streams = block(streams, condition, real)
        shift, scale = self.modulation(condition).to(streams[0].dtype).chunk(2, dim=-1)
        return self.head(modulate(streams[0], shift, scale))


class Parts(NamedTuple):
    """How many parts a set of cells is cut into, of how many cells each; the last is filled up."""

    cells: int
    number: int
    size: int

    @classmethod
    def of(cls, cells: int, most: int) -> "Parts":
        """Cut into parts of at most so many cells, as equal as they can be."""
        number = -(-cells // most)
        return cls(cells, number, -(-cells // number))

    def cut(self, x: Float[Tensor, "sets cells genes"]) -> Float[Tensor, "parts size genes"]:
        """Cut, and fill up with copies."""
        places = torch.arange(self.number * self.size, device=x.device) % self.cells
        return x[:, places].reshape(-1, self.size, x.shape[-1])

    def join(self, x: Float[Tensor, "parts size genes"]) -> Float[Tensor, "sets cells genes"]:
        """Undo ``cut``."""
        return x.reshape(-1, self.number * self.size, x.shape[-1])[:, : self.cells]

    def real(self, sets: int, device: torch.device) -> Real:
        """Tell cells from what fills up; None where nothing does."""
        if self.number * self.size == self.cells:
            return None
        places = torch.arange(self.number * self.size, device=device) < self.cells
        return places.expand(sets, -1).reshape(-1, self.size)


class Hidden(NamedTuple):
    """What training hides or shows, for each set."""

    condition: Bool[Tensor, "sets"]
    control: Bool[Tensor, "sets"]
    shown: Int[Tensor, "shown"]
    """Sets that are shown an earlier estimate."""


def hide(
    sets: int, *, condition: bool, control: bool, shown: int, device: torch.device | str = "cpu"
) -> Hidden:
    """Hide the same from all sets, and show the first ones an earlier estimate."""
    every = torch.ones(sets, dtype=torch.bool, device=device)
    return Hidden(every & condition, every & control, torch.arange(shown, device=device))
