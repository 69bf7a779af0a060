"""Several models on one screen, on one split or several: trained, predicted, scored, in one table."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import pandas as pd

from knockon import models
from knockon.data.room import settle
from knockon.data.screen import Screen
from knockon.data.splits import Split, singles
from knockon.evaluate import suites
from knockon.evaluate.summary import BASELINES, summarize
from knockon.files import alone, write_text
from knockon.jobs import Outcome, do_all
from knockon.model import Recipe
from knockon.predict import refuse_few
from knockon.train import Options
from knockon.trial import Comparison, Elsewhere, Trial, judge, make, sent
from knockon.types import UserError

log = logging.getLogger("knockon")


def compare(
    screen: Screen,
    split: Split,
    *,
    out: str | Path,
    comparison: Comparison = Comparison(),
    options: Options = Options(),
    further: Mapping[str, Recipe] | None = None,
) -> pd.DataFrame:
    """Train, predict and score models; what lies in the folder already is not done again.

    Writes ``runs/``, ``predictions/``, ``portraits/``, and the tables of ``Verdict.write``.

    Parameters
    ----------
    further
        Models that are no preset, by the names under which they stand beside the others.

    Returns
    -------
    DataFrame
        The summary: ``model, metric, mean, low, high, floor, ceiling, calibrated``.

    Raises
    ------
    UserError
        If a model failed, after all others were trained, predicted and scored; or another command is at work
        in the folder.
    """
    folder = Path(out)
    trials = {"": _trial(folder, _given(screen, comparison, options), split, comparison, options, further)}
    if _pooled(folder):
        raise UserError(
            f"{folder} holds comparisons of several splits or seeds",
            mend="choose another --out, or name them all",
        )
    with alone(folder):
        ended = _done(trials, cluster=options.cluster, quiet=options.quiet)
    ended.refuse_failed()
    return ended.done[""]


def compare_all(
    screen: Screen,
    held_out: Mapping[str, Split],
    seeds: Sequence[int],
    *,
    out: str | Path,
    comparison: Comparison = Comparison(),
    options: Options = Options(),
) -> dict[str, pd.DataFrame]:
    """Compare models on several splits, with several seeds each.

    Each split and seed is a comparison in a folder of its own, ``SPLIT-seedSEED``. Beside these,
    ``scores.csv`` and ``summary.csv`` hold all of theirs, with the columns ``split`` and ``seed`` in front.

    Parameters
    ----------
    held_out
        Splits by name.
    seeds
        In the place of the comparison's.

    Returns
    -------
    dict
        For each split the summary of the means over seeds, so that intervals are over conditions.

    Raises
    ------
    UserError
        As for ``compare``.
    """
    folder, names = Path(out), [(split, seed) for split in held_out for seed in dict.fromkeys(seeds)]
    if (folder / "runs").exists():
        raise UserError(f"{folder} holds the comparison of one split and seed", mend="choose another --out")
    given, trials = _given(screen, comparison, options), dict[str, Trial]()
    for split, seed in names:
        own, name = dataclasses.replace(comparison, seed=seed), name_of(split, seed)
        trials[name] = _trial(folder / name, given, held_out[split], own, options)
    with alone(folder, *(trial.folder for trial in trials.values())):
        ended = _done(trials, cluster=options.cluster, quiet=options.quiet)
        tables = {}
        for table in ("scores", "summary") if ended.done else ():
            parts = [
                pd.read_csv(trials[name].folder / f"{table}.csv").assign(split=split, seed=seed)
                for (split, seed), name in zip(names, trials, strict=True)
                if name in ended.done
            ]
            tables[table] = pd.concat(parts, ignore_index=True)
            tables[table] = tables[table][[*POOLED, *parts[0].columns.drop(list(POOLED))]]
            write_text(folder / f"{table}.csv", tables[table].to_csv(index=False))
    ended.refuse_failed()
    by = ["split", "model", "condition", "metric"]
    means = tables["scores"].groupby(by, sort=False, as_index=False)["value"].mean()
    return {str(split): summarize(part) for split, part in means.groupby("split", sort=False)}


def name_of(split: str, seed: int) -> str:
    """Name the folder of one comparison among several."""
    return f"{split}-seed{seed}"


POOLED = ("split", "seed")
"""Columns in front of the tables of several comparisons."""


def _pooled(folder: Path) -> bool:
    """Whether a folder holds several comparisons."""
    path = folder / "scores.csv"
    if not path.exists():
        return False
    with path.open(encoding="utf-8", errors="replace") as file:
        return file.readline().startswith(",".join(POOLED))


def _given(screen: Screen, comparison: Comparison, options: Options) -> Screen | Elsewhere:
    """Refuse what no job could do, and make the screen fit for all jobs."""
    compared = recipes(comparison).items()
    able = [name for name, one in compared if name in BASELINES or one.model.guesses]
    if comparison.fallback not in (None, *able):
        raise UserError(
            "Unknown --fallback", offenders=[comparison.fallback], expected="one of " + ", ".join(able)
        )
    if comparison.jobs < 1 or (comparison.jobs > 1 and options.cluster):
        raise UserError(
            f"--jobs {comparison.jobs}" + (" with --cluster" if options.cluster else ""),
            expected="1 or more; without --cluster, whose workers do one job each",
        )
    suites.refuse_unfit(comparison.suite, screen)
    refuse_few(comparison.cells)
    if options.cluster:
        return sent(screen, far=True)
    # values that have room are loaded here, for all processes
    return sent(settle(screen, options.memory), far=False) if comparison.jobs > 1 else screen


def _trial(
    folder: Path,
    screen: Screen | Elsewhere,
    split: Split,
    comparison: Comparison,
    options: Options,
    further: Mapping[str, Recipe] | None = None,
) -> Trial:
    apart = comparison.jobs > 1 or options.cluster is not None
    if options.cluster:  # whose workers work in other folders
        folder, vectors = folder.absolute(), options.vectors and options.vectors.absolute()
        options = dataclasses.replace(options, vectors=vectors)
    return Trial(
        folder=folder,
        split=split,
        comparison=comparison,
        recipes=recipes(comparison, further),
        screen=screen,
        options=dataclasses.replace(options, cluster=None, quiet=options.quiet or apart),
    )


def _done(trials: Mapping[str, Trial], *, cluster: str | None, quiet: bool) -> Outcome[pd.DataFrame]:
    """Train and predict all models of all trials, those first that answer for others; then score each trial.

    Returns
    -------
    Outcome
        The summary of each trial, and what failed of models and trials.
    """
    how = next(iter(trials.values())).comparison
    do = partial(do_all, at_once=how.jobs, cluster=cluster, quiet=quiet)
    for trial in trials.values():
        _announce(trial.split)
    asked = {
        (Path(name) / model).as_posix(): trial.only([model])
        for name, trial in trials.items()
        for model in trial.recipes
    }
    first = {key: one for key, one in asked.items() if how.fallback in one.recipes}
    made = do(make, first) | do(make, {key: one for key, one in asked.items() if key not in first})
    could = {
        name: [model for model in trial.recipes if made.done.get((Path(name) / model).as_posix())]
        for name, trial in trials.items()
    }
    if not made.failed and not all(could.values()):
        raise UserError("No model could predict the test conditions", mend="choose other --models")
    scores = {
        name: (Path(name) / "scores").as_posix()
        for name, found in could.items()
        if found and not any((Path(name) / one).as_posix() in made.failed for one in _named(trials[name]))
    }
    scored = do(judge, {scores[name]: trials[name].only(could[name]) for name in scores})
    return Outcome(
        done={name: scored.done[key] for name, key in scores.items() if key in scored.done},
        failed={**made.failed, **scored.failed},
    )


def _named(trial: Trial) -> set[str]:
    """Models that stand in the tables already: if one of them fails now, the tables stay as they are."""
    path = trial.folder / "summary.csv"
    return set(pd.read_csv(path)["model"]) if path.exists() else set()


def recipes(comparison: Comparison, further: Mapping[str, Recipe] | None = None) -> dict[str, Recipe]:
    """List what is compared by the name of its run, the anchors first, with the shared seed and steps."""
    asked = [text.replace("-", "_") for text in comparison.models]
    found = {}
    for text in (*BASELINES, *(name for name in asked if name not in BASELINES)):
        name, _, preset = text.partition(":")
        found[text.replace(":", "-")] = models.recipe(name, preset or "default")
    for name, recipe in (found | dict(further or {})).items():
        training = dataclasses.replace(recipe.train, seed=comparison.seed)
        if training.steps and comparison.steps is not None:
            training = dataclasses.replace(training, steps=comparison.steps)
        found[name] = Recipe(model=recipe.model.answering(), train=training)
    return found


def _announce(split: Split) -> None:
    """Say what stands in where models that add effects lack a single."""
    measured = {label.everywhere for label in (*split.train, *split.validation)}
    tested = {label.everywhere for label in split.test}
    lacking = sorted({str(s) for label in tested - measured for s in singles(label) if s not in measured})
    if lacking:
        log.info(
            "never measured alone: %s; additive baselines, response_surface and ripple guess their effects",
            ", ".join(lacking),
        )
