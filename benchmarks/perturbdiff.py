"""knockon's PerturbDiff against the literal formulation: the same numbers first, then time.

    python -m benchmarks.perturbdiff [--quick] [--threads 2] [--repeats 5]

- *training*: a step of full sets, half of the time with self-conditioning; the same mathematics in both.
- *sampling*: a screen of many small groups. The literal program fills each up to a set and carries the copies
  along; knockon makes the cells that are asked for. Where groups fill their sets, both must agree.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.literal_perturbdiff import STEPS, Given, LiteralPerturbDiff
from benchmarks.measure import Sample, in_turns, machine, ratio, table
from knockon.models import perturbdiff
from knockon.models.perturbdiff import PerturbDiff
from knockon.nn.joint import hide
from knockon.types import Condition, Covariate, Spec

TOLERANCE = 1e-5
TARGETS = {"training": 1.5, "sampling": 5.0}
GROUP = 2
"""Cells of a small group: 2.03 on average in the Replogle screen, by group of gene, line and batch."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large the network and its work are."""

    genes: int = 2000
    width: int = 512
    layers: int = 8
    sets: int = 4
    """Sets of a batch."""
    cells: int = 32
    """Cells of a set."""
    groups: int = 32
    """Small groups to sample."""
    visited: int = 4
    """Steps of sampling; the released program takes 100, at the same cost each."""


SIZES = {"cpu": Size(), "quick": Size(genes=60, width=32, layers=2, groups=8)}


@dataclass(frozen=True, kw_only=True)
class Work:
    """Cells of some sets, and how they are noised."""

    clean: Tensor
    control: Tensor
    noise: Tensor
    t: Tensor
    label: Tensor
    """Of each set: perturbation, cell type, batch."""

    @classmethod
    def draw(cls, size: Size, sets: int, cells: int) -> "Work":
        rng = torch.Generator().manual_seed(1)
        shape = (sets, cells, size.genes)
        sparse = (torch.rand(2, *shape, generator=rng) < 0.3) * torch.rand(2, *shape, generator=rng) * 0.3
        return cls(
            clean=sparse[0],
            control=sparse[1],
            noise=torch.randn(shape, generator=rng),
            t=torch.randint(STEPS, (sets,), generator=rng),
            label=torch.stack([torch.randint(n, (sets,), generator=rng) for n in (100, 4, 56)], dim=1),
        )

    @property
    def given(self) -> Given:
        return Given(self.control, self.label[:, None].expand(-1, self.control.shape[1], -1))

    @property
    def condition(self) -> Condition:
        code = self.label[:, :1]
        return Condition(perturbation=code, dose=torch.zeros(code.shape), covariates=self.label[:, 1:])

    def filled(self, cells: int) -> "Work":
        """Fill sets up with copies."""
        place = torch.arange(cells) % self.clean.shape[1]
        return replace(self, **{k: getattr(self, k)[:, place] for k in ("clean", "control", "noise")})

    def batch(self, start: int, sets: int) -> "Work":
        return replace(self, **{k: v[start : start + sets] for k, v in vars(self).items()})


class Literal:
    def __init__(self, size: Size) -> None:
        torch.manual_seed(0)  # noqa: TID251 (layers draw their weights from the global generator)
        self.size = size
        self.network = LiteralPerturbDiff(
            genes=size.genes, tables=(101, 4, 56), dim=size.width, layers=size.layers
        )
        for parameter in self.network.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        self.optimizer = torch.optim.AdamW(self.network.parameters())

    def loss(self, work: Work, *, shown: bool) -> Tensor:
        return self.network.loss(work.given, work.clean, work.t, work.noise, shown=shown)

    def sample(self, work: Work) -> Tensor:
        """Fill every group up to a set, a few sets at a time; keep the cells that were asked for."""
        cells = work.clean.shape[1]
        whole = work.filled(self.size.cells)
        parts = [whole.batch(i, self.size.sets) for i in range(0, len(work.clean), self.size.sets)]
        made = [
            self.network.generate(p.given, p.noise, visited=self.size.visited, guidance=1.0) for p in parts
        ]
        return torch.cat(made)[:, :cells]


class Ours:
    def __init__(self, size: Size, literal: Literal) -> None:
        self.size = size
        names = [tuple(map(str, range(n))) for n in (size.genes, 100, 4, 56)]
        spec = Spec(
            genes=names[0],
            perturbations=names[1],
            covariates=(Covariate("type", names[2]), Covariate("batch", names[3])),
        )
        config = replace(
            perturbdiff.paper().model,
            width=size.width,
            layers=size.layers,
            scale=1.0,
            visited=size.visited,
        )
        self.model: PerturbDiff = config.build(spec)
        weights = {k: v.detach().numpy() for k, v in literal.network.state_dict().items()}
        self.model.load_state_dict(perturbdiff.from_released(weights, spec), strict=False)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)

    def loss(self, work: Work, *, shown: bool) -> Tensor:
        sets, model = len(work.clean), self.model
        hidden = hide(sets, condition=False, control=False, shown=sets if shown else 0)
        x = perturbdiff.diffusion.noised(work.clean, work.noise, model.bars[work.t])
        found = model.denoise(x, work.control, model.encode(work.condition), work.t, hidden)
        return model.objective(found, work.clean)["total"]

    @torch.no_grad()
    def sample(self, work: Work) -> Tensor:
        """All groups side by side, and nothing but the cells that were asked for."""
        encoded = self.model.encode(work.condition)
        *_, (made, _) = self.model.chain(work.noise, work.control, encoded, lambda: work.noise)
        return made


def deviations(size: Size, literal: Literal, ours: Ours) -> dict[str, float]:
    """Largest deviations on full sets, of the largest entry (at least 1).

    Raises
    ------
    SystemExit
        If one is above the tolerance, for then their times mean nothing.
    """
    work, found = Work.draw(size, size.sets, size.cells), {}
    for shown in (False, True):
        a, b = literal.loss(work, shown=shown), ours.loss(work, shown=shown)
        found[f"loss{' shown' * shown}"] = float((a - b).abs().detach() / a.abs().detach().clamp_min(1))
    a, b = literal.sample(work), ours.sample(work)
    found["sample"] = float((a - b).abs().max() / a.abs().max().clamp_min(1))
    if max(found.values()) > TOLERANCE:
        raise SystemExit(f"The two formulations disagree: {found}. Nothing was timed.")
    return found


def train(contestant: Literal | Ours, work: Work) -> None:
    """Two steps, one of them with self-conditioning."""
    for shown in (False, True):
        contestant.optimizer.zero_grad()
        contestant.loss(work, shown=shown).backward()
        contestant.optimizer.step()


def compete(size: Size, repeats: int) -> tuple[dict[str, float], dict[str, dict[str, list[Sample]]]]:
    """Check that both give the same numbers, then time them in turns."""
    literal = Literal(size)
    ours = Ours(size, literal)
    found = deviations(size, literal, ours)
    full, small = Work.draw(size, size.sets, size.cells), Work.draw(size, size.groups, GROUP)
    tasks: dict[str, dict[str, Callable[[], object]]] = {
        "training": {"literal": lambda: train(literal, full), "knockon": lambda: train(ours, full)},
        "sampling": {"literal": lambda: literal.sample(small), "knockon": lambda: ours.sample(small)},
    }
    device = torch.device("cpu")
    return found, {name: in_turns(task, repeats=repeats, device=device) for name, task in tasks.items()}


def main(arguments: Sequence[str] | None = None) -> str:
    """Measure, print, and return the lines for the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a small network, to try the benchmark itself")
    parser.add_argument("--repeats", type=int, default=5, help="rounds that count")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    size = SIZES["quick" if options.quick else "cpu"]
    found, samples = compete(size, options.repeats)
    rows = []
    for task, runs in samples.items():
        for name, run in runs.items():
            seconds = statistics.median(s.clock for s in run)
            clock = ratio([s.clock for s in runs["literal"]], [s.clock for s in run])
            processor = ratio([s.processor for s in runs["literal"]], [s.processor for s in run])
            aim = "" if name == "literal" else f"{TARGETS[task]:g}"
            rows.append((task, name, f"{seconds:.3g}", clock, processor, aim))
    agreement = ", ".join(f"{name} {value:.1e}" for name, value in found.items())
    header = ("task", "formulation", "seconds", "ratio", "ratio of processor time", "target")
    text = "\n\n".join(
        (
            f"{machine(torch.device('cpu'))}. {size}, float32, {GROUP} cells in a small group.",
            f"Largest deviation between the two, relative to the largest entry: {agreement}.",
            table(header, rows),
        )
    )
    print(text)
    return text


if __name__ == "__main__":
    main()
