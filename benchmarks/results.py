"""Every model on every screen, between the best simple baseline and a replicate: `docs/results.md`.

    python -m benchmarks.results [--only demo norman19 ...] [--models ripple ...] [--write docs/results.md]

What is trained and scored stays in the folder `--out`, and is not done again. What is found goes into the
record beside the page, which shows all that is in it, wherever that was trained; a model that is trained anew
takes the place of what was found of it. Times are of the machine that did it, with whatever else it did.
"""

import argparse
import logging
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks import page, record
from benchmarks.jobs import COUNTS, HERE, SHARED, How, Task, finished, has_basis, readable, score
from knockon import models
from knockon.data.conventions import Columns
from knockon.data.simulate import contexts, demo, interaction
from knockon.evaluate.summary import BASELINES
from knockon.files import write_text
from knockon.model import Recipe
from knockon.train import Options

log = logging.getLogger("knockon")

INDEPENDENT = "-independent"
"""Ending of the name of ripple whose cells are nearly independent of each other."""
PAPER = "-paper"
"""Ending of the names of models with the switches of their paper preset; see ``paper_switches``."""
SIZES = {
    "scdfm": ("width", "layers", "heads", "genes_per_step", "solver", "points"),
    "perturbdiff": ("width", "layers", "heads", "branch", "set_size"),
    "scldm": ("width", "layers", "heads", "solver", "steps", "stage_one"),
    "scldm_vae": ("width", "layers", "heads", "cross_heads", "latents", "latent_width"),
}
"""What is no switch but a size, of networks, sets and the sampler's steps."""
LONGER = {"scdfm": ({"solver": "euler", "points": 11}, {"steps": 700, "lr": 1e-3})}
"""What the switches of a paper get, of the model and of training, where the default needs less."""
MODELS = (
    *BASELINES, "linear", "nearest", "latent_additive", "response_surface", "ripple",
    "ripple-independent",
    "scdfm", "scdfm-paper", "perturbdiff", "perturbdiff-paper", "scldm",
    "scldm-paper",
)  # fmt: skip
"""In the order of the tables."""

DOUBLES = str(HERE / "splits" / "norman19_doubles.json")
REPLICATES = str(HERE / "splits" / "papalexi21_replicates.json")
NORMAN, PAPALEXI, KANG = (SHARED / f"{name}.h5ad" for name in ("norman19", "papalexi21", "kang18"))
FOLDS = (42, 43, 44)

TASKS = (
    Task(
        name="demo0",
        about="simulated screen `demo`, seed 0, additive split: doubles of measured singles; the screen that "
        "models were developed on",
        data=demo(),
    ),
    Task(
        name="demo101",
        about="simulated screen `demo`, seed 101, additive split; not used in development",
        data=replace(demo(), seed=101),
    ),
    Task(
        name="demo101-counts",
        about="the same screen in counts, for scLDM, which reads nothing else",
        data=replace(demo(), seed=101),
        columns=COUNTS,
    ),
    Task(
        name="interaction102",
        about="simulated screen `interaction`, seed 102, additive split: many doubles are far from the sum "
        "of their singles; not used in development",
        data=replace(interaction(), seed=102),
    ),
    Task(
        name="contexts103",
        about="simulated screen `contexts`, seed 103, in counts: a third of the drugs, at all doses, in one "
        "cell type, measured in the others; not used in development",
        data=replace(contexts(), seed=103),
        columns=COUNTS,
        split="context",
        fraction=0.34,
    ),
    Task(
        name="norman19-doubles",
        about="`norman19`: the five doubles whose singles are measured",
        data=NORMAN,
        split=DOUBLES,
    ),
    Task(
        name="norman19-unseen",
        about="`norman19`: a tenth of the perturbations, with every double that has one of them, three folds",
        data=NORMAN,
        split="unseen",
        seeds=FOLDS,
        fallback="mean_shift",
    ),
    Task(
        name="papalexi21-replicates",
        about="`papalexi21`, in counts: the cells of each perturbation in one of three replicates",
        data=PAPALEXI,
        columns=replace(COUNTS, covariate_keys=("bio_rep",)),
        split=REPLICATES,
    ),
    Task(
        name="papalexi21-unseen",
        about="`papalexi21`, in counts: a tenth of the perturbations, three folds",
        data=PAPALEXI,
        columns=replace(COUNTS, covariate_keys=()),
        split="unseen",
        seeds=FOLDS,
        fallback="mean_shift",
    ),
    Task(
        name="kang18-context",
        about="`kang18`, its 500 most variable genes: interferon in one cell type, measured in the other "
        "six; each of the seven is a fold",
        data=KANG,
        columns=Columns(covariate_keys=("cell_type",)),
        split="context",
        each_level=True,
        genes=500,
    ),
)


def paper_switches(name: str) -> Recipe:
    """Make the published objective and the switches of network and sampler trainable in minutes.

    Sizes are those of the default preset, and so is the training: the published rates are made for 200,000
    steps, and would leave a model of some hundred steps where it began.
    """
    default, paper = models.recipe(name), models.recipe(name, "paper")
    sizes = {field: getattr(default.model, field) for field in SIZES[name]}
    model, training = LONGER.get(name, ({}, {}))
    if name == "scldm":
        sizes["autoencoder"] = paper_switches("scldm_vae").model
    return Recipe(model=replace(paper.model, **(sizes | model)), train=replace(default.train, **training))


def chosen(names: Sequence[str]) -> dict[str, Recipe]:
    """Recipes by the names of the table, without the anchors; what is not there is skipped and said."""
    found = {}
    for name in names:
        base = name.removesuffix(PAPER)
        if name == "ripple" + INDEPENDENT:
            recipe = models.recipe("ripple")
            found[name] = replace(recipe, model=replace(recipe.model, together=1024))
        elif base not in models.names() or (name != base and base not in SIZES):
            log.warning("%s is skipped: there is no such model", name)
        elif name not in BASELINES:
            found[name] = paper_switches(base) if name != base else models.recipe(name)
    return found


def run(task: Task, how: How, further: dict[str, Recipe], kept: Path) -> None:
    """Score what is missing of all folds of a task, count each look, and record what was found."""
    screen = task.screen(how.out)
    folds, baseless, further = task.folds(screen), [], readable(further, screen)
    if task.fallback:
        options, tests = replace(how.options, genes=task.genes), list(folds.values())
        baseless = [name for name, one in further.items() if not has_basis(one, screen, tests, options)]
        further = {name: recipe for name, recipe in further.items() if name not in baseless}
    for fold, split in folds.items():
        folder = how.out / task.name / fold
        log.info("%s, fold %s", task.name, fold)
        for name in score(task, folder, screen, split, how, further):
            what = f"{name} {finished(folder)[name]['configuration']}"
            record.count(kept, f"{task.name}/{fold}", what)
    record.keep(kept, task, how.out, further, baseless)


def main(arguments: Sequence[str] | None = None, tasks: Sequence[Task] = TASKS) -> None:
    """Run what is missing, and write the page."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    asked = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    how = How(
        out=asked.out,
        cells=asked.cells,
        seed=asked.seed,
        steps=asked.steps,
        options=Options(device=asked.device),
        again=tuple(asked.again),
    )
    further = chosen(asked.models)
    for task in tasks:
        if any(task.name.startswith(name) for name in asked.only or [""]) and not asked.page_only:
            run(task, how, further, asked.record)
    if asked.write:
        command = shlex.join(["python", "-m", "benchmarks.results", *arguments])
        text = page.written(tasks, record.Record.read(asked.record), order=MODELS, command=command)
        write_text(asked.write, text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", help="beginnings of the names of tasks; all without it")
    parser.add_argument("--models", nargs="+", default=MODELS, help="the anchors are always there")
    parser.add_argument("--again", nargs="+", default=(), help="of these, what is there is not used")
    parser.add_argument("--out", type=Path, default=Path("runs/results"), help="folder of all runs")
    parser.add_argument("--write", type=Path, help="the page to write")
    parser.add_argument("--page-only", action="store_true", help="train and score nothing")
    parser.add_argument(
        "--record", type=Path, default=HERE.parent / "docs", help="folder of the record; another for trials"
    )
    parser.add_argument("--cells", type=int, default=256, help="predicted cells of each condition")
    parser.add_argument("--seed", type=int, default=0, help="of training, prediction and ceiling")
    parser.add_argument("--steps", type=int, help="of training, for a trial")
    parser.add_argument("--device", default="auto")
    return parser


if __name__ == "__main__":
    main()
