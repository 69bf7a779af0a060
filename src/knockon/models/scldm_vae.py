"""The autoencoder of scLDM: a cell as a set of genes with counts, and back [palla2025].

A cell is pooled to a few latent tokens by learned queries; from them, the queries of any genes read an
expected count each. It is the first stage of ``scldm``, and an embedding of cells. See docs/models/scldm.md.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from knockon.data.arrays import sums
from knockon.dynamics.likelihood import gaussian_kl, negative_binomial_of_cells
from knockon.model import Losses, Model, ModelConfig, Names, Recipe, Training
from knockon.models._released_scldm import autoencoder_from_released as from_released
from knockon.nn.counts import normalized
from knockon.nn.sets import EPSILON, SetArchitecture, SetDecoder, SetEncoder, norm
from knockon.nn.tokens import CountEmbedding, CountEncoder, Tokens, all_genes, expressed_genes
from knockon.types import CP10K, CellSets, Condition, Noise, Spec, UserError

__all__ = ["Config", "SetAutoencoder", "default", "from_released", "paper", "small"]

if TYPE_CHECKING:
    from knockon.data.screen import Screen

LARGEST = 15.0
"""Of the logarithm of an inverse dispersion, either way; beyond it nothing can be told apart or drawn."""


@dataclass(frozen=True, kw_only=True)
class Config(SetArchitecture, ModelConfig):
    """The autoencoder: its sizes (``SetArchitecture``), its tokens, its latents and its likelihood."""

    embedding: CountEmbedding = "modulated"
    """How a count enters a token. ``log1p`` and the three like it do not let the encoder see how large counts
    are; ``modulated`` is not in the paper."""
    tokens: Literal["expressed", "all"] = "expressed"
    """The encoder sees the genes of a cell that have counts, or all of them."""
    padded_to: int = 0
    """Tokens that every cell is filled up to with padding that attention sees, as in the released program; 0
    has none (not in the released program)."""
    likelihood: Literal["negative_binomial", "gaussian"] = "negative_binomial"
    """Of counts, or of log1p of counts per 10,000 with unit variance."""
    dispersion: Literal["gene", "cell"] = "gene"
    """One dispersion for each gene, or one for each gene and cell."""
    rates: bool = True
    """Genes begin at their mean share of counts, instead of alike (not in the paper)."""
    posterior: bool = False
    """Latents are drawn from a Gaussian that the encoder gives, instead of normalized."""
    kl: float = 0.0
    """Weight of the divergence of that Gaussian from the standard one; the paper's bound has 1."""

    def build(self, spec: Spec) -> "SetAutoencoder":
        """Make the model.

        Raises
        ------
        UserError
            If options contradict each other.
        """
        for wrong, expected in (
            (
                self.width % self.heads or self.width % self.cross_heads,
                "width to be a multiple of both heads",
            ),
            (self.kl and not self.posterior, "posterior for a weight kl of its divergence"),
            (self.tokens == "all" and self.padded_to, "no padded_to where all genes are tokens"),
        ):
            if wrong:
                raise UserError("Options of scldm_vae that do not fit together", expected=expected)
        return SetAutoencoder(self, spec)


def default() -> Recipe:
    """Return what is best for some hundred genes on two CPU cores, in minutes."""
    return Recipe(
        model=Config(width=64, layers=2, heads=4, latents=16, latent_width=16, cross_heads=2),
        train=Training(
            steps=1500, sets=64, cells=1, by_cells=True, lr=2e-3, final_lr=1e-4, warmup=100, clip=10.0,
            optimizer="adamw", betas=(0.9, 0.95), validate_every=250, validate_by="loss",
        ),
    )  # fmt: skip


def paper() -> Recipe:
    """Return what was released for the dentate gyrus: 3.4 million parameters at 17,002 genes, 500 epochs.

    The count embedding and the schedule are those of the released program.
    """
    return Recipe(
        model=Config(embedding="log1p", rates=False),
        train=Training(
            steps=56_500, sets=128, cells=1, by_cells=True, lr=1e-3, final_lr=1e-4, warmup=5_650,
            warmup_from=0.01, plateau=0.8, schedule="root", clip=10.0, optimizer="adamw", betas=(0.9, 0.95),
        ),
    )  # fmt: skip


def small() -> Recipe:
    """Return a model for tests: some seconds on one core."""
    return Recipe(
        model=Config(width=16, layers=1, heads=2, latents=4, latent_width=8),
        train=Training(steps=100, sets=32, cells=1, by_cells=True, lr=5e-3, warmup=10, clip=10.0),
    )


class SetAutoencoder(Model):
    """Encodes cells and decodes them; it knows of no condition, and predicts the control cells themselves."""

    units = "counts"

    def __init__(self, config: Config, spec: Spec) -> None:
        super().__init__(spec)
        self.config = config
        genes, gaussian = len(spec.genes), config.likelihood == "gaussian"
        self.counts = CountEncoder(genes, config.width, config.embedding)
        self.encoder = SetEncoder(config, config.latent_width * (2 if config.posterior else 1))
        self.decoder = SetDecoder(config)
        by_cell = config.dispersion == "cell" and not gaussian
        # A shift of all logits changes no share, so a bias would be dead.
        self.head = nn.Linear(config.width, 2 if by_cell else 1, bias=by_cell or gaussian)
        self.head_norm = nn.LayerNorm(config.width, eps=EPSILON) if gaussian else nn.Identity()
        self.log_inverse = None if by_cell or gaussian else nn.Parameter(torch.ones(genes))
        self.rates = nn.Parameter(torch.zeros(genes)) if config.rates else None

    def fit_statistics(self, train: "Screen") -> None:
        """Let genes begin at their share of all counts, or at the mean of their log1p."""
        if self.rates is None:
            return
        gaussian = self.config.likelihood == "gaussian"
        found = sums(train.matrix, train.every, CP10K if gaussian else None)
        if gaussian:
            start = found / train.num_cells
        else:
            start = np.log((found + 0.5) / (found.sum() + 0.5 * len(found)))
        with torch.no_grad():
            self.rates.copy_(torch.from_numpy(start))

    def knows(self, condition: Condition) -> Bool[Tensor, "sets"]:
        """All: what was done makes no difference."""
        return torch.ones(len(condition), dtype=torch.bool, device=condition.perturbation.device)

    @property
    def learns_controls(self) -> bool:
        """A control cell is as good as any."""
        return True

    def entries(self) -> dict[str, Names]:
        """Names of genes."""
        genes = self.spec.genes
        return {"counts.table.weight": (("", *genes), None), "log_inverse": (genes,), "rates": (genes,)}

    def loss(self, batch: CellSets, rng: torch.Generator) -> Losses:
        """Negative log-likelihood of all genes of a cell, given its library size, in nats."""
        cells = batch.target.flatten(0, 1)
        latents, kl = self.encode(self.tokens(cells), rng)
        nll = self.nll(cells, latents)
        counted = torch.ones_like(nll) if batch.real is None else batch.real.flatten().to(nll.dtype)
        losses = {"nll": nll, "kl": kl} if self.config.posterior else {"nll": nll}
        means = {name: (x * counted).sum() / counted.sum().clamp_min(1) for name, x in losses.items()}
        return {"total": means["nll"] + self.config.kl * means.get("kl", 0.0), **means}

    def tokens(self, cells: Float[Tensor, "cells genes"]) -> Tokens:
        """Choose what the encoder sees of cells.

        Raises
        ------
        UserError
            If a cell has more genes with counts than ``padded_to``.
        """
        if self.config.tokens == "all":
            return all_genes(cells)
        tokens, most = expressed_genes(cells, self.config.padded_to), self.config.padded_to
        if most and tokens.genes.shape[1] - 1 > most:
            raise UserError(
                f"A cell with {tokens.genes.shape[1] - 1} genes that have counts",
                expected=f"at most padded_to = {most}",
                mend="train with a larger --model.padded-to, or with 0, which has no padding",
            )
        return tokens

    def encode(
        self, tokens: Tokens, rng: torch.Generator | None = None
    ) -> tuple[Float[Tensor, "cells latents latent"], Float[Tensor, "cells"]]:
        """Latent tokens, and the divergence of their Gaussian; its mean is taken without a generator."""
        found = self.encoder(self.counts(tokens.genes, tokens.counts), tokens.raised)
        if not self.config.posterior:
            return norm(found), found.new_zeros(len(found))
        found = found.to(torch.promote_types(found.dtype, torch.float32))
        mean, log_variance = found.chunk(2, dim=-1)
        log_variance = log_variance.clamp(-14, 10)
        kl = gaussian_kl(mean, log_variance).flatten(1).sum(1)
        if rng is None:
            return mean, kl
        noise = torch.randn(mean.shape, generator=rng, device=mean.device, dtype=mean.dtype)
        return torch.addcmul(mean, noise, (log_variance / 2).exp()), kl

    def decode(
        self,
        latents: Float[Tensor, "cells latents latent"],
        sizes: Float[Tensor, "cells"],
        genes: Int[Tensor, "#cells queries"] | None = None,
    ) -> tuple[Float[Tensor, "cells queries"], Float[Tensor, "#cells queries"]]:
        """Expect counts of genes in cells of these library sizes; also their inverse dispersions.

        With the Gaussian likelihood it is the mean of log1p of counts per 10,000, and its inverse variance.

        Parameters
        ----------
        sizes
            What the counts of the genes that are asked for sum to.
        genes
            Their places in the panel, the same for all cells or others for each; all in order without it.
        """
        if genes is None:
            genes = torch.arange(len(self.spec.genes), device=latents.device)[None]
        found = self.decoder(latents, self.counts.table(genes + 1), lambda x: self.head(self.head_norm(x)))
        found = found.to(sizes.dtype) if found.dtype.itemsize < sizes.dtype.itemsize else found
        first = found[..., 0] if self.rates is None else found[..., 0] + self.rates[genes]
        if self.config.likelihood == "gaussian":
            return first, torch.ones_like(first)
        inverse = found[..., 1] if self.log_inverse is None else self.log_inverse[genes]
        return sizes[:, None] * first.softmax(-1), inverse.clamp(-LARGEST, LARGEST).exp()

    def nll(
        self,
        cells: Float[Tensor, "cells genes"],
        latents: Float[Tensor, "cells latents latent"],
    ) -> Float[Tensor, "cells"]:
        """Negative log-likelihood of cells, given their library sizes; a squared error where Gaussian."""
        with torch.autocast(cells.device.type, enabled=False):
            sizes = cells.sum(-1)
        mean, inverse = self.decode(latents, sizes)
        with torch.autocast(cells.device.type, enabled=False):
            if self.config.likelihood == "gaussian":
                return (mean - normalized(cells)).square().sum(-1)
            return -negative_binomial_of_cells(cells, mean, inverse)

    def draw(
        self,
        latents: Float[Tensor, "sets cells latents latent"],
        sizes: Float[Tensor, "sets cells"],
        noise: Noise | None,
    ) -> Float[Tensor, "sets cells genes"]:
        """Draw counts, or return expected ones where there is no noise."""
        mean, inverse = self.decode(latents.flatten(0, 1), sizes.flatten())
        mean, inverse = (x.expand_as(mean).unflatten(0, sizes.shape) for x in (mean, inverse))
        return self.emit(mean, inverse, sizes, noise)

    def emit(
        self,
        mean: Float[Tensor, "sets cells genes"],
        inverse: Float[Tensor, "sets cells genes"],
        sizes: Float[Tensor, "sets cells"],
        noise: Noise | None,
    ) -> Float[Tensor, "sets cells genes"]:
        """Draw counts from what ``decode`` has found, or return expected ones where there is no noise."""
        if self.config.likelihood == "gaussian":
            counts = mean.clamp_min(0).expm1() * sizes[..., None] / CP10K
            return counts if noise is None else counts.round()
        return mean if noise is None else noise.negative_binomial(mean, inverse)

    def embed(self, cells: Float[Tensor, "cells genes"]) -> Float[Tensor, "cells dim"]:
        """Latent tokens of cells, side by side."""
        return self.encode(self.tokens(cells))[0].flatten(1)

    def sample(
        self, control: Float[Tensor, "sets cells genes"], condition: Condition, noise: Noise
    ) -> Float[Tensor, "sets cells genes"]:
        """Encode the control cells and draw new ones of the same library sizes from what is decoded."""
        latents, _ = self.encode(self.tokens(control.flatten(0, 1)))
        return self.draw(latents.unflatten(0, control.shape[:2]), control.sum(-1), noise)
