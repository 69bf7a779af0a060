"""knockon's scLDM against the literal formulation: the same numbers first, then memory and time.

    python -m benchmarks.scldm [--size default] [--threads 2] [--repeats 3] [--only "stage one" ...]

- *stage one*: a training step of the autoencoder, its peak memory and its time.
- *stage two*: a training step of the flow. The literal program encodes the cells of every batch again;
  knockon encodes every cell once, before the first step, and looks its latent tokens up.
- *sampling*: cells of a condition at weight 1, from noise to counts, at a large and a small panel. The
  literal program solves as many unguided cells beside, with three evaluations of the network for each
  that knockon needs.
"""

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.literal_scldm import Attend, Given, LiteralAutoencoder, LiteralFlow, Sizes, draw
from benchmarks.measure import GIB, Sample, growth_in_child, in_turns, machine, ratio, table
from knockon.models import scldm, scldm_vae
from knockon.models.scldm import LatentFlow
from knockon.models.scldm_vae import SetAutoencoder
from knockon.types import CellSets, Condition, Covariate, Label, Noise, Spec

TOLERANCE = {"gradients": 3e-4}
"""Of entries, relative to the largest; 1e-5 where nothing else is said. Some gradients of the literal
formulation are further than that from double precision, and knockon's are not: it sums thousands of paddings
one by one."""
TASKS = ("memory", "stage one", "stage two", "sampling")
TARGETS = {"memory": 4.0, "stage two": 5.0, "sampling": 3.0}
CLASSES = ("perturbation", "cell_type")
LEVELS = (100, 4)


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large the networks and their work are."""

    genes: int = 17_002
    small: int = 2_000
    """Genes of the small panel."""
    tokens: int = 6_147
    """Genes that a cell is filled up to."""
    expressed: int = 2_000
    """Genes of a cell that have counts, about."""
    width: int = 128
    latents: int = 128
    latent_width: int = 16
    layers: int = 2
    heads: int = 4
    flow_width: int = 256
    flow_layers: int = 8
    flow_heads: int = 8
    held: int = 48
    """Cells of the batch of stage one whose memory is measured; the literal one takes 11 GiB with it."""
    cells: int = 16
    """Cells of a batch of stage one."""
    batch: int = 32
    """Cells of a batch of stage two."""
    made: int = 4
    """Cells to sample."""
    steps: int = 10
    """Of Heun's method; two evaluations each."""

    @property
    def networks(self) -> Sizes:
        same = {name: getattr(self, name) for name in Sizes.__annotations__ if hasattr(self, name)}
        return Sizes(**same, cross_heads=1, tables=dict(zip(CLASSES, LEVELS, strict=True)))

    @property
    def of_small(self) -> "Size":
        share = self.small / self.genes
        expressed, tokens = (max(1, int(share * n)) for n in (self.expressed, self.tokens))
        return replace(self, genes=self.small, expressed=expressed, tokens=tokens)


SIZES = {
    "released": Size(),
    "default": Size(
        width=64, latents=16, flow_width=128, flow_layers=4, flow_heads=4, cells=16, batch=128, made=32
    ),
    "quick": Size(
        genes=60, small=30, tokens=40, expressed=15, width=16, latents=4, latent_width=8, flow_width=32,
        flow_layers=2, flow_heads=2, held=4, cells=4, batch=4, made=4, steps=2,
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Work:
    """Counts of cells, each of a condition of its own."""

    counts: Tensor
    labels: Mapping[str, Tensor]

    @classmethod
    def draw(cls, size: Size, cells: int) -> "Work":
        rng = torch.Generator().manual_seed(1)
        share = torch.rand(size.genes, generator=rng).pow(3)
        on = torch.rand(cells, size.genes, generator=rng) < share * (size.expressed / share.sum())
        counts = 1 + torch.poisson(4 * share.expand(cells, -1), generator=rng)
        codes = [torch.randint(n, (cells,), generator=rng) for n in LEVELS]
        return cls(counts=on * counts, labels=dict(zip(CLASSES, codes, strict=True)))

    @property
    def condition(self) -> Condition:
        done, kind = (self.labels[name][:, None] for name in CLASSES)
        return Condition(perturbation=done + 1, dose=torch.zeros(done.shape), covariates=kind)


class Literal:
    def __init__(self, size: Size) -> None:
        torch.manual_seed(0)  # noqa: TID251 (layers draw their weights from the global generator)
        self.size = size
        self.autoencoder, self.flow = LiteralAutoencoder(size.networks), LiteralFlow(size.networks)
        self.optimizers = [torch.optim.AdamW(x.parameters()) for x in (self.autoencoder, self.flow)]

    def stage_one(self, cells: int) -> Callable[[], object]:
        given = Given.of(Work.draw(self.size, cells).counts, self.size.tokens)
        return lambda: step(self.optimizers[0], lambda: self.autoencoder.loss(given))

    def stage_two(self, cells: int) -> Callable[[], object]:
        work = Work.draw(self.size, cells)
        given = Given.of(work.counts, self.size.tokens)

        def loss() -> Tensor:
            with torch.no_grad():
                z = self.autoencoder.encode(given)
            t, u = torch.rand(2, cells)
            return self.flow.loss(z, torch.randn_like(z), t, work.labels, u < 0.8)

        return lambda: step(self.optimizers[1], loss)

    def sampling(self, cells: int) -> Callable[[], object]:
        work, shape = Work.draw(self.size, cells), (cells, self.size.latents, self.size.latent_width)
        sizes = work.counts.sum(1, keepdim=True).repeat(2, 1)

        def sample() -> Tensor:
            z = self.flow.generate(torch.randn(shape), work.labels, steps=self.size.steps)
            return draw(self.autoencoder, z, sizes)

        return sample


class Fused(Literal):
    """The literal formulation with a kernel of attention that stores no scores."""

    def __init__(self, size: Size) -> None:
        super().__init__(size)
        for network in (self.autoencoder, self.flow):
            for module in network.modules():
                if isinstance(module, Attend):
                    module.FUSED = True


class Ours:
    def __init__(self, size: Size, literal: Literal | None = None) -> None:
        self.size, literal = size, literal or Literal(size)
        names = [tuple(map(str, range(n))) for n in (size.genes, *LEVELS)]
        self.spec = Spec(
            genes=names[0],
            perturbations=names[1],
            covariates=(Covariate(CLASSES[1], names[2]),),
            units="counts",
        )
        first = replace(
            scldm_vae.paper().model, padded_to=size.tokens, width=size.width, latents=size.latents,
            latent_width=size.latent_width, layers=size.layers, heads=size.heads,
        )  # fmt: skip
        config = replace(
            scldm.paper().model, autoencoder=first, width=size.flow_width, layers=size.flow_layers,
            heads=size.flow_heads, solver="heun", steps=size.steps,
        )  # fmt: skip
        self.autoencoder: SetAutoencoder = first.build(self.spec)
        self.flow: LatentFlow = config.build(self.spec)
        self.autoencoder.load_state_dict(self.translated(literal)[0])
        self.flow.load_state_dict(self.translated(literal)[1], strict=False)
        self.flow.network.places = literal.flow.pos_embed[0]
        self.flow.take(self.autoencoder)
        trained = [[p for p in x.parameters() if p.requires_grad] for x in (self.autoencoder, self.flow)]
        self.optimizers = [torch.optim.AdamW(parameters, fused=True) for parameters in trained]

    def translated(self, literal: Literal, *, gradients: bool = False) -> list[dict[str, Tensor]]:
        """Weights of the literal formulation, or their gradients, under the names that they have here."""
        found = []
        for network in (literal.autoencoder, literal.flow):
            tensors = network.state_dict(keep_vars=True)
            if gradients:
                tensors = {k: v.grad for k, v in tensors.items() if v.grad is not None}
            found.append({k: v.detach().numpy() for k, v in tensors.items()})
        return [
            scldm_vae.from_released(found[0], self.spec),
            scldm.from_released(found[1], self.spec, CLASSES),
        ]

    def stage_one(self, cells: int) -> Callable[[], object]:
        work, rng = Work.draw(self.size, cells), torch.Generator().manual_seed(0)
        batch = CellSets(target=work.counts[:, None], control=work.counts[:, None], condition=work.condition)
        return lambda: step(self.optimizers[0], lambda: self.autoencoder.loss(batch, rng)["total"])

    def stage_two(self, cells: int) -> Callable[[], object]:
        work, rng = Work.draw(self.size, cells), torch.Generator().manual_seed(0)
        batch = CellSets(
            target=work.counts[:, None],
            control=work.counts[:, None],
            condition=work.condition,
            embedded=self.flow.embed(work.counts)[:, None],
        )
        return lambda: step(self.optimizers[1], lambda: self.flow.loss(batch, rng)["total"])

    def sampling(self, cells: int) -> Callable[[], object]:
        work = Work.draw(self.size, cells)
        self.flow.sizes.fit({Label(covariates=("0",)): work.counts.sum(1).numpy()}, self.spec)
        control, noise = work.counts[:, None], Noise(torch.Generator().manual_seed(0))

        @torch.no_grad()
        def sample() -> Tensor:
            return self.flow.sample(control, work.condition, noise)

        return sample


def step(optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor]) -> None:
    optimizer.zero_grad()
    loss().backward()
    optimizer.step()


def deviations(size: Size, literal: Literal, ours: Ours, cells: int) -> dict[str, float]:
    """Largest deviations, of the largest entry.

    Raises
    ------
    SystemExit
        If one is above the tolerance, for then their memory and times mean nothing.
    """
    work = Work.draw(size, cells)
    given = Given.of(work.counts, size.tokens)
    theirs, own = literal.autoencoder, ours.autoencoder
    pairs = {"latents": (theirs.encode(given), own.encode(own.tokens(work.counts))[0])}
    decoded = zip(
        theirs.decode(pairs["latents"][0], given.genes, given.library_size),
        own.decode(pairs["latents"][0], given.library_size[:, 0]),
        strict=True,
    )
    pairs["means"], pairs["inverse dispersions"] = decoded
    pairs["loss"] = theirs.loss(given), own.nll(work.counts, own.encode(own.tokens(work.counts))[0]).mean()

    rng = torch.Generator().manual_seed(2)
    z, x0 = pairs["latents"][0].detach(), torch.randn(pairs["latents"][0].shape, generator=rng)
    t, hidden = torch.rand(cells, generator=rng), torch.rand(cells, generator=rng) < 0.5
    shown = ~hidden[:, None, None].expand(-1, 1, len(CLASSES))
    told = ours.flow.conditions(work.condition, shown) + ours.flow.tell(t[:, None])
    pairs["velocity"] = (
        literal.flow(x0, t, literal.flow.hide(work.labels, hidden)),
        ours.flow.network(x0[:, None], told)[:, 0],
    )
    pairs["loss of the flow"] = (
        literal.flow.loss(z, x0, t, work.labels, hidden),
        ours.flow.errors(x0[:, None], z[:, None], t[:, None], work.condition, shown).mean(),
    )
    for name in ("loss", "loss of the flow"):
        for loss in pairs[name]:
            loss.backward()
    found = {name: deviation(*both) for name, both in pairs.items()} | _gradients(literal, ours)
    with torch.no_grad():
        sampled = literal.flow.generate(x0, work.labels, steps=size.steps)[cells:]
        shown = torch.ones_like(shown[:, 0])
        found["guided"] = deviation(sampled, ours.flow.flow(x0[:, None], work.condition, shown)[:, 0])
    if any(value > TOLERANCE.get(name, 1e-5) for name, value in found.items()):
        raise SystemExit(f"The two formulations disagree: {found}. Nothing was timed.")
    return found


def _gradients(literal: Literal, ours: Ours) -> dict[str, float]:
    translated, found = ours.translated(literal, gradients=True), []
    for wanted, network in zip(translated, (ours.autoencoder, ours.flow), strict=True):
        for name, parameter in network.named_parameters():
            if parameter.grad is not None:
                found.append(deviation(wanted[name], parameter.grad))
                parameter.grad = None
    return {"gradients": max(found)}


def deviation(theirs: Tensor, own: Tensor) -> float:
    return float((theirs - own).abs().max().detach() / theirs.abs().max().detach().clamp_min(1e-6))


CONTESTANTS: Mapping[str, type[Literal] | type[Ours]] = {
    "literal": Literal,
    "literal, fused attention": Fused,
    "knockon": Ours,
}


def prepare(name: str, size: Size, threads: int) -> Callable[[], object]:
    """Make a training step of stage one, in a process of its own."""
    torch.set_num_threads(threads)
    return CONTESTANTS[name](size).stage_one(size.held)


def memory(size: Size, threads: int) -> list[tuple[object, ...]]:
    """Peak memory of a training step, less what the weights and the cells take before it."""
    peaks = {name: growth_in_child(prepare, name, size, threads) for name in CONTESTANTS}
    return [
        (
            f"stage one, {size.held} cells, {size.genes:,} genes",
            name,
            f"{peak / GIB:.2f}",
            f"{peaks['literal'] / peak:.1f}",
            f"{TARGETS['memory']:g}" if name == "knockon" else "",
        )
        for name, peak in peaks.items()
    ]


def times(size: Size, only: Sequence[str], repeats: int) -> tuple[dict[str, float], list[tuple[object, ...]]]:
    """Check that all give the same numbers, then time them in turns."""
    found: dict[str, float] = {}
    samples: dict[str, dict[str, list[Sample]]] = {}
    for part in (size, size.of_small):
        literal = Literal(part)
        ours = Ours(part, literal)
        for name, value in deviations(part, literal, ours, min(2, part.cells)).items():
            found[name] = max(value, found.get(name, 0.0))
        works = {"stage one": part.cells, "stage two": part.batch, "sampling": part.made}
        for task, cells in works.items():
            if task not in only or (part is not size and task != "sampling"):
                continue
            method = task.replace(" ", "_")
            runs = {n: getattr(x, method)(cells) for n, x in (("literal", literal), ("knockon", ours))}
            heading = f"{task}, {cells} cells, {part.genes:,} genes"
            samples[heading] = in_turns(runs, repeats=repeats, device=torch.device("cpu"))
    return found, [row for heading, runs in samples.items() for row in _rows(heading, runs)]


def _rows(heading: str, runs: Mapping[str, Sequence[Sample]]) -> list[tuple[object, ...]]:
    rows = []
    for name, run in runs.items():
        seconds = statistics.median(s.clock for s in run)
        clock = ratio([s.clock for s in runs["literal"]], [s.clock for s in run])
        processor = ratio([s.processor for s in runs["literal"]], [s.processor for s in run])
        aim = TARGETS.get(heading.partition(",")[0], "") if name == "knockon" else ""
        rows.append((heading, name, f"{seconds:.3g}", clock, processor, aim and f"{aim:g}"))
    return rows


def main(arguments: Sequence[str] | None = None) -> str:
    """Measure, print, and return the lines for the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--size",
        choices=tuple(SIZES),
        default="released",
        help="of the networks: the released ones, those of the default presets, or tiny ones, to try it",
    )
    parser.add_argument("--only", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--held", type=int, help="cells of the batch whose memory is measured")
    parser.add_argument("--repeats", type=int, default=3, help="rounds that count")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    size = SIZES[options.size]
    size = replace(size, held=options.held or size.held)
    found, rows = times(size, options.only, options.repeats)
    agreement = ", ".join(f"{name} {value:.1e}" for name, value in found.items())
    parts = [
        f"{machine(torch.device('cpu'))}. {size}, float32.",
        f"Largest deviation between the two, relative to the largest entry: {agreement}.",
    ]
    if rows:
        header = ("task", "formulation", "seconds", "ratio", "ratio of processor time", "target")
        parts.append(table(header, rows))
    if "memory" in options.only:
        header = ("task", "formulation", "peak memory of a step (GiB)", "times less", "target")
        parts.append(table(header, memory(size, options.threads)))
    text = "\n\n".join(parts)
    print(text)
    return text


if __name__ == "__main__":
    main()
