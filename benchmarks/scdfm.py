"""knockon's scDFM against the literal formulation: the same numbers first, then time and memory.

    python -m benchmarks.scdfm [--quick] [--device cuda] [--compile] [--threads 2] [--repeats 5]

Both get the same weights, cells, genes, noise and times. Their velocities, losses, gradients and a short
generation must agree to 1e-4 before anything is timed. Ratios are against the literal formulation in float32.
"""

import argparse
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from benchmarks import literal_scdfm
from benchmarks.literal_scdfm import Given, LiteralScDFM
from benchmarks.measure import GIB, Sample, in_turns, machine, peak_in_child, ratio, table
from knockon.dynamics import solve
from knockon.models import scdfm
from knockon.models._released_scdfm import from_released
from knockon.models.scdfm import Pairs
from knockon.types import Condition, Spec

TOLERANCE = 1e-4
SPECIALS = 4
NEIGHBORS = 30
Task = Literal["training", "training without dropout", "generation"]
TASKS: tuple[Task, ...] = ("training", "training without dropout", "generation")


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large the network and its work are."""

    panel: int = 5029
    """Genes of the vocabulary, besides its special tokens."""
    width: int = 512
    layers: int = 4
    heads: int = 8
    cells: int
    """Cells of a training step."""
    generated: int
    """Cells of a generation."""
    genes: int
    """Genes of a step, drawn from the panel."""
    points: int
    """Grid points of a generation; four evaluations for each but the last."""


SIZES = {
    "cpu": Size(cells=8, generated=8, genes=500, points=3),
    "cuda": Size(cells=48, generated=128, genes=1000, points=20),
    "quick": Size(panel=300, width=64, layers=2, cells=4, generated=4, genes=60, points=3),
}
TARGETS: Mapping[tuple[str, str, str], float] = {
    ("cpu", "training", "float32"): 2.5,
    ("cpu", "training", "bf16"): 4.2,
    ("cpu", "generation", "float32"): 1.6,
    ("cpu", "generation", "bf16"): 2.5,
    ("cuda", "training", "bf16"): 12.0,
    ("cuda", "generation", "bf16"): 15.0,
}


@dataclass(frozen=True, kw_only=True)
class Cells:
    """Cells of one double, their controls, noise and times; and the genes that are computed."""

    genes: Tensor
    control: Tensor
    noise: Tensor
    target: Tensor
    t: Tensor
    pair: tuple[int, int]
    """Positions of the two perturbed genes in the panel."""

    @classmethod
    def draw(cls, size: Size, count: int, device: torch.device) -> "Cells":
        rng = torch.Generator().manual_seed(1)
        shape = (count, size.genes)
        sparse = (torch.rand(2, *shape, generator=rng) < 0.3) * torch.rand(2, *shape, generator=rng) * 3
        return cls(
            genes=torch.randperm(size.panel, generator=rng)[: size.genes].to(device),
            control=sparse[0].to(device),
            target=sparse[1].to(device),
            noise=torch.randn(shape, generator=rng).to(device),
            t=torch.rand(count, generator=rng).to(device),
            pair=(0, 1),
        )


class Contestant(Protocol):
    """One of the two formulations, with what it needs to train."""

    @property
    def optimizer(self) -> torch.optim.Optimizer: ...

    def velocity(self, cells: Cells) -> Tensor: ...

    def loss(self, cells: Cells, *, dropout: bool) -> Tensor: ...

    def generate(self, cells: Cells, points: int) -> Tensor: ...


class LiteralContestant:
    def __init__(self, size: Size, device: torch.device) -> None:
        adjacency = graph(size.panel)
        forbidden = torch.ones(size.panel + SPECIALS, size.panel + SPECIALS, dtype=torch.bool)
        forbidden[SPECIALS:, SPECIALS:] = torch.from_numpy(~adjacency.toarray())
        forbidden.fill_diagonal_(fill_value=False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # noqa: TID251 (layers draw their weights from the global generator)
            self.network = LiteralScDFM(forbidden, dim=size.width, heads=size.heads, layers=size.layers).to(
                device
            )
        self.optimizer: torch.optim.Optimizer = torch.optim.Adam(self.network.parameters())

    def given(self, cells: Cells) -> Given:
        count = len(cells.control)
        return Given(
            gene_ids=(cells.genes + SPECIALS).expand(count, -1),
            control=cells.control,
            perturbation=torch.tensor(cells.pair, device=cells.genes.device).expand(count, -1) + SPECIALS,
        )

    def velocity(self, cells: Cells) -> Tensor:
        return self.network.eval()(self.given(cells), cells.noise, cells.t)

    def loss(self, cells: Cells, *, dropout: bool) -> Tensor:
        self.network.train(dropout)
        return literal_scdfm.loss(self.network, self.given(cells), cells.noise, cells.target, cells.t)[
            "total"
        ]

    def generate(self, cells: Cells, points: int) -> Tensor:
        states = literal_scdfm.trajectory(self.network.eval(), self.given(cells), cells.noise, points=points)
        return states[-1].clamp_min(0)


class KnockonContestant:
    def __init__(self, size: Size, device: torch.device, *, compiled: bool = False) -> None:
        names = tuple(f"g{index:05d}" for index in range(size.panel))
        self.spec = Spec(genes=names, perturbations=names[:100], slots=2)
        preset = scdfm.paper().model
        assert isinstance(preset, scdfm.Config)
        config = replace(preset, width=size.width, layers=size.layers, heads=size.heads)
        self.model = scdfm.SCDFM(config, self.spec)
        self.model.network.genes.connect(graph(size.panel))
        self.model.to(device)
        self.optimizer: torch.optim.Optimizer = torch.optim.Adam(self.model.parameters())
        self.rng = torch.Generator(device).manual_seed(2)
        self.objective, self.field = self.model.objective, self.model.velocity
        if compiled:
            self.objective, self.field = torch.compile(self.objective), torch.compile(self.field)

    def take(self, network: LiteralScDFM) -> None:
        """Take over the weights of the literal network."""
        weights = {name: tensor.detach().cpu().numpy() for name, tensor in network.named_parameters()}
        self.model.load_state_dict(from_released(weights, self.spec), strict=False)

    def condition(self, cells: Cells) -> Condition:
        codes = torch.tensor([cells.pair]) + 1
        return Condition(
            perturbation=codes, dose=torch.zeros(codes.shape), covariates=codes.new_zeros(1, 0)
        ).to(cells.genes.device)

    def velocity(self, cells: Cells) -> Tensor:
        encoded, condition = self.model.network.encode(cells.genes, self.condition(cells))
        known = self.model.network.know(encoded, cells.control, condition.expand(len(cells.control), -1))
        return self.field(cells.genes, cells.noise, cells.t, known)

    def loss(self, cells: Cells, *, dropout: bool) -> Tensor:
        pairs = Pairs(cells.noise[None], cells.target[None], cells.control[None], cells.t[None])
        rng = self.rng if dropout else None
        return self.objective(cells.genes, pairs, self.condition(cells), rng)["total"]

    def generate(self, cells: Cells, points: int) -> Tensor:
        with torch.no_grad():
            encoded, condition = self.model.network.encode(cells.genes, self.condition(cells))
            known = self.model.network.know(encoded, cells.control, condition.expand(len(cells.control), -1))

            def field(x: Tensor, t: Tensor) -> Tensor:
                return self.field(cells.genes, x, t.expand(len(x)), known)

            times = torch.linspace(0, 1, points, device=cells.noise.device)
            return solve.integrate(field, cells.noise, times, "rk4_38").clamp_min(0)


def graph(panel: int) -> sp.csr_matrix:
    """A symmetric graph in which every gene selected 30 others at random, and is its own neighbor."""
    rng = np.random.default_rng(0)
    chosen = np.argpartition(rng.random((panel, panel), dtype=np.float32), NEIGHBORS, axis=1)[:, :NEIGHBORS]
    rows = np.repeat(np.arange(panel), NEIGHBORS)
    half = sp.csr_matrix((np.ones(rows.size, bool), (rows, chosen.ravel())), shape=(panel, panel))
    return sp.csr_matrix(half + half.T + sp.eye(panel, dtype=bool, format="csr"))


def precision(name: str, device: torch.device) -> AbstractContextManager[object]:
    return torch.autocast(device.type, torch.bfloat16) if name == "bf16" else nullcontext()


def step(contestant: Contestant, cells: Cells, size: Size, task: Task, kind: str) -> None:
    """Do one training step or one generation."""
    device = cells.genes.device
    with precision(kind, device):
        if task == "generation":
            contestant.generate(cells, size.points)
            return
        loss = contestant.loss(cells, dropout=task == "training")
    contestant.optimizer.zero_grad()
    loss.backward()
    contestant.optimizer.step()


def draw(size: Size, task: Task, device: torch.device) -> Cells:
    return Cells.draw(size, size.generated if task == "generation" else size.cells, device)


def deviations(
    size: Size, literal: LiteralContestant, fast: KnockonContestant, cells: Cells
) -> dict[str, float]:
    """Largest deviation of each result, relative to its largest entry (at least 1).

    Raises
    ------
    SystemExit
        If one is above the tolerance, for then their times mean nothing.
    """
    results: list[dict[str, Tensor]] = []
    for contestant in (literal, fast):
        with torch.no_grad():
            result = {
                "velocity": contestant.velocity(cells),
                "generation": contestant.generate(cells, min(size.points, 3)),
            }
        contestant.optimizer.zero_grad()
        loss = contestant.loss(cells, dropout=False)
        loss.backward()
        results.append(result | {"loss": loss.detach()})
    found = {name: deviation(results[1][name], truth) for name, truth in results[0].items()}
    found["gradients"] = gradient_deviation(literal, fast)
    if max(found.values()) > TOLERANCE:
        raise SystemExit(f"The two formulations disagree: {found}. Nothing was timed.")
    return found


def gradient_deviation(literal: LiteralContestant, fast: KnockonContestant) -> float:
    """Length of the difference of two gradients, relative to that of the literal one.

    Single entries can differ by more: where rounding moves a value over the kink of a leaky unit.
    """
    gradients = {
        name: (torch.zeros_like(parameter) if parameter.grad is None else parameter.grad).cpu().numpy()
        for name, parameter in literal.network.named_parameters()
    }
    truth = from_released(gradients, fast.spec)
    ours = {name: parameter.grad for name, parameter in fast.model.named_parameters()}
    given = {name: gradient.cpu() for name, gradient in ours.items() if gradient is not None}
    off = sum(float((gradient - truth[name]).square().sum()) for name, gradient in given.items())
    return math.sqrt(off / sum(float(gradient.square().sum()) for gradient in truth.values()))


def deviation(ours: Tensor, truth: Tensor) -> float:
    return float((ours - truth).abs().max() / truth.abs().max().clamp_min(1))


def compete(
    size: Size,
    device: torch.device,
    *,
    tasks: Sequence[Task],
    repeats: int,
    compiled: bool,
    only: Sequence[str] | None = None,
) -> tuple[dict[str, float], dict[Task, dict[str, list[Sample]]]]:
    """Check that both give the same numbers, then time them in turns."""
    literal, fast = LiteralContestant(size, device), KnockonContestant(size, device)
    fast.take(literal.network)
    found = deviations(size, literal, fast, Cells.draw(size, min(size.cells, 4), device))
    runners: dict[str, tuple[Contestant, str]] = {
        "literal float32": (literal, "float32"),
        "literal bf16": (literal, "bf16"),
        "knockon float32": (fast, "float32"),
        "knockon bf16": (fast, "bf16"),
    }
    if compiled:
        quick = KnockonContestant(size, device, compiled=True)
        quick.take(literal.network)
        runners |= {"knockon float32 compiled": (quick, "float32"), "knockon bf16 compiled": (quick, "bf16")}
    runners = {k: v for k, v in runners.items() if only is None or k in ("literal float32", *only)}
    samples = {}
    for task in tasks:
        cells = draw(size, task, device)

        def bound(
            runner: tuple[Contestant, str], task: Task = task, cells: Cells = cells
        ) -> Callable[[], None]:
            return lambda: step(runner[0], cells, size, task, runner[1])

        turns = {name: bound(runner) for name, runner in runners.items()}
        samples[task] = in_turns(turns, repeats=repeats, device=device)
    return found, samples


def alone(name: str, size: Size, device: torch.device, task: Task, threads: int) -> None:
    """Do a task twice in a process of its own (the second step has the optimizer's moments)."""
    torch.set_num_threads(threads)
    maker = LiteralContestant if name.startswith("literal") else KnockonContestant
    contestant, cells = maker(size, device), draw(size, task, device)
    for _ in range(1 if task == "generation" else 2):
        step(contestant, cells, size, task, name.split()[1])


def speed_table(samples: dict[Task, dict[str, list[Sample]]], sizes: str) -> str:
    rows = []
    for task, runs in samples.items():
        base = runs["literal float32"]
        for name, run in runs.items():
            target = TARGETS.get((sizes, task, name.split()[1]))
            aim = f"{target:g}" if target and name.startswith("knockon") else ""
            clock = ratio([s.clock for s in base], [s.clock for s in run])
            processor = ratio([s.processor for s in base], [s.processor for s in run])
            seconds = statistics.median(s.clock for s in run)
            rows.append((task, name, f"{seconds:.3g}", clock, processor, aim))
    return table(("task", "formulation", "seconds", "ratio", "ratio of processor time", "target"), rows)


def memory_table(size: Size, device: torch.device, tasks: Sequence[Task], threads: int) -> str:
    rows = []
    names = ("literal float32", "knockon float32", "knockon bf16")
    for task in tasks:
        peaks = {name: peak_in_child(alone, name, size, device, task, threads) for name in names}
        base = peaks["literal float32"]
        rows += [(task, name, f"{peak / GIB:.2f}", f"{base / peak:.1f}") for name, peak in peaks.items()]
    return table(("task", "formulation", "peak memory (GiB)", "times less"), rows)


def main(arguments: Sequence[str] | None = None) -> str:
    """Measure, print, and return the lines for the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="a small network, to try the benchmark itself")
    parser.add_argument("--compile", action="store_true", help="time knockon's model compiled, too")
    parser.add_argument("--repeats", type=int, default=5, help="rounds that count")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--formulations", nargs="+", help='such as "knockon bf16"; all without it')
    parser.add_argument("--points", type=int, help="grid points of a generation")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    torch.set_num_threads(options.threads)
    sizes = "quick" if options.quick else device.type
    size = SIZES[sizes] if options.points is None else replace(SIZES[sizes], points=options.points)
    memory = memory_table(size, device, options.tasks, options.threads)
    found, samples = compete(
        size,
        device,
        tasks=options.tasks,
        repeats=options.repeats,
        compiled=options.compile,
        only=options.formulations,
    )
    agreement = ", ".join(f"{name} {value:.1e}" for name, value in found.items())
    text = "\n\n".join(
        (
            f"{machine(device)}. {size}.",
            f"Largest deviation between the two, relative to the largest entry: {agreement}.",
            speed_table(samples, sizes),
            memory,
        )
    )
    print(text)
    return text


if __name__ == "__main__":
    main()
