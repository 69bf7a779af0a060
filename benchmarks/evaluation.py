"""How long an evaluation takes, and what the engines of rank tests make of it.

    python -m benchmarks.evaluation [--only suites engines] [--doubles 37] [--data SCREEN.h5ad]

Suites: `core` and `de`, with all anchors and without, beside cell-eval on the same files: a simulated screen
(preset `norman`) and the additive baseline's cells of its held-out doubles. knockon reads the whole screen,
cell-eval the scored conditions and the controls. Each is a fresh process, and they take turns.

Engines: illico and pdex beside scanpy on a real screen, each perturbation against control.
"""

import argparse
import contextlib
import io
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import scanpy as sc
import scipy.sparse as sp
import torch

from benchmarks.measure import GIB, Sample, machine, ratio, table, timed_in_child
from knockon.data import simulate, split_file, splits
from knockon.data.screen import Screen
from knockon.evaluate.pairs import Pairs
from knockon.evaluate.scores import evaluate
from knockon.evaluate.suites import score
from knockon.models.additive import Config
from knockon.predict import generate

SHARED = Path(__file__).parents[2] / "shared" / "data"
TARGET = "cell-eval full"
"""What is to be outrun."""


@dataclass(frozen=True)
class Job:
    """Where the files of the suites lie."""

    folder: Path
    screen: Path
    threads: int

    @property
    def split(self) -> Path:
        return self.folder / "split.json"

    @property
    def prediction(self) -> Path:
        return self.folder / "prediction.h5ad"

    @property
    def real(self) -> Path:
        """The scored conditions and the controls alone, which is what cell-eval takes."""
        return self.folder / "real.h5ad"


# ---- suites ----------------------------------------------------------------------------------------


def prepare(job: Job, doubles: int, cells: int) -> str:
    """Write the files, and say what they hold."""
    if not job.screen.exists():
        simulate.simulate(simulate.norman()).write_h5ad(job.screen)
    screen = Screen.read(job.screen)
    whole = splits.additive(screen)
    split = replace(whole, test=whole.test[:doubles])
    split.write(job.split)
    model = Config().build(screen.spec())
    model.fit_statistics(screen.select((*split.train, *split.validation, *screen.controls)))
    predicted = generate(model, screen, split.test, cells=cells, seed=1)
    predicted.uns["knockon"] = {"units": model.units, "total": screen.total or -1.0, "model": "tested"}
    predicted.write_h5ad(job.prediction)
    rows = np.sort(np.concatenate([screen.rows[label] for label in (*split.test, *screen.controls)]))
    adata = anndata.read_h5ad(job.screen)[rows]
    anndata.AnnData(adata.X, obs=adata.obs[["perturbation"]], var=adata.var[[]]).write_h5ad(job.real)
    controls = sum(len(screen.rows[label]) for label in screen.controls)
    return (
        f"{len(split.test)} doubles of {len(rows) - controls:,} real and {cells} predicted cells each, "
        f"{controls:,} control cells, {len(screen.genes):,} genes; the screen has {screen.num_cells:,} cells."
    ).replace(" real and", " real cells in all and")


def knockon(job: Job, suites: Sequence[str], *, anchored: bool) -> None:
    torch.set_num_threads(job.threads)
    screen = Screen.read(job.screen)
    split = split_file.read(job.split, screen)
    if anchored:
        evaluate(job.prediction, screen, split, suite=suites)
    else:
        score(Pairs.of(job.prediction, screen, split), suites)


def cell_eval(job: Job, profile: str) -> None:
    from cell_eval import MetricsEvaluator  # noqa: PLC0415 - its import is part of its time

    with tempfile.TemporaryDirectory() as out:
        evaluator = MetricsEvaluator(
            adata_pred=str(job.prediction),
            adata_real=str(job.real),
            control_pert="control",
            pert_col="perturbation",
            num_threads=job.threads,
            outdir=out,
        )
        evaluator.compute(profile=profile, write_csv=False)


SUITES: Mapping[str, Callable[[Job], None]] = {
    "knockon core, de": partial(knockon, suites=("core", "de"), anchored=False),
    "knockon core, de, anchors": partial(knockon, suites=("core", "de"), anchored=True),
    "cell-eval de": partial(cell_eval, profile="de"),
    TARGET: partial(cell_eval, profile="full"),
}


def measure_suites(job: Job, repeats: int) -> str:
    """Run all in turns, each time in a fresh process, and return a table."""
    times: dict[str, list[Sample]] = {name: [] for name in SUITES}
    peaks = dict.fromkeys(SUITES, 0)
    for _ in range(repeats):
        for name, task in SUITES.items():
            samples, peak = timed_in_child(task, job, repeats=0)
            times[name] += samples
            peaks[name] = max(peaks[name], peak)
    slow = times[TARGET]
    rows = [
        (
            name,
            *(f"{np.median([getattr(s, kind) for s in found]):.1f}" for kind in ("clock", "processor")),
            ratio([s.clock for s in slow], [s.clock for s in found]),
            ratio([s.processor for s in slow], [s.processor for s in found]),
            f"{peaks[name] / GIB:.2f}",
        )
        for name, found in times.items()
    ]
    header = [
        "evaluation",
        "seconds",
        "processor (s)",
        "times as fast",
        "by processor time",
        "peak memory (GiB)",
    ]
    return table(header, rows)


# ---- engines ---------------------------------------------------------------------------------------


def logged(screen: Path, layout: str) -> anndata.AnnData:
    """Counts as log1p per 10,000, in some layout."""
    whole = anndata.read_h5ad(screen)
    adata = anndata.AnnData(
        sp.csr_matrix(whole.layers["counts"], dtype=np.float32), whole.obs[["perturbation"]], whole.var[[]]
    )
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    layouts = {"rows": sp.csr_matrix, "columns": sp.csc_matrix, "dense": lambda x: x.toarray()}
    adata.X = layouts[layout](adata.X)
    return adata


def by_scanpy(adata: anndata.AnnData, _: int) -> pd.DataFrame:
    sc.tl.rank_genes_groups(adata, "perturbation", reference="control", method="wilcoxon", tie_correct=True)
    found = sc.get.rank_genes_groups_df(adata, None)
    return _tidy(found, "group", "names", "pvals", np.exp2(found["logfoldchanges"]))


def by_illico(adata: anndata.AnnData, threads: int) -> pd.DataFrame:
    """Without continuity, as scanpy is; fold changes of means of log1p, as scanpy's are."""
    from illico import asymptotic_wilcoxon  # noqa: PLC0415
    from loguru import logger  # noqa: PLC0415

    logger.disable("illico")
    found = asymptotic_wilcoxon(
        adata,
        is_log1p=True,
        group_keys="perturbation",
        reference="control",
        n_threads=threads,
        use_continuity=False,
        exp_post_agg=True,
    ).reset_index()
    return _tidy(found, "pert", "feature", "p_value", found["fold_change"])


def by_pdex(adata: anndata.AnnData, threads: int) -> pd.DataFrame:
    from pdex import pdex  # noqa: PLC0415

    found = pdex(
        adata,
        groupby="perturbation",
        mode="ref",
        reference="control",
        threads=threads,
        is_log1p=True,
        as_pandas=True,
    )
    return _tidy(found, "target", "feature", "p_value", np.exp2(found["log2_fold_change"]))


def _tidy(found: pd.DataFrame, group: str, gene: str, p: str, ratios: pd.Series) -> pd.DataFrame:
    """p-values and fold changes by perturbation and gene, in one order."""
    frame = pd.DataFrame({"p": found[p].to_numpy(), "change": ratios.to_numpy()})
    frame.index = pd.MultiIndex.from_arrays([found[group].astype(str), found[gene].astype(str)])
    return frame[frame.index.get_level_values(0) != "control"].sort_index()


ENGINES = {"scanpy": by_scanpy, "pdex": by_pdex, "illico": by_illico}


def run_engine(name: str, prepared: Path, threads: int) -> None:
    torch.set_num_threads(threads)
    with contextlib.redirect_stderr(io.StringIO()):
        ENGINES[name](anndata.read_h5ad(prepared), threads)


def measure_engines(screen: Path, folder: Path, repeats: int) -> str:
    """Agreement with scanpy, times and memory of each engine, layout of values and number of threads."""
    reference = by_scanpy(logged(screen, "rows"), 1)
    rows = []
    for layout in ("rows", "columns", "dense"):
        prepared = folder / f"{layout}.h5ad"
        logged(screen, layout).write_h5ad(prepared)
        for name, engine in ENGINES.items():
            if (name, layout) in {("scanpy", "columns"), ("scanpy", "dense"), ("pdex", "columns")}:
                continue
            with contextlib.redirect_stderr(io.StringIO()):
                found = engine(logged(screen, layout), 1)
            apart = np.abs(np.log10(found["p"] / reference["p"])).max()
            changes = np.abs(np.log2(found["change"] / reference["change"])).median()
            for threads in (1,) if name == "scanpy" else (1, 2):
                samples, peak = timed_in_child(run_engine, name, prepared, threads, repeats=repeats)
                warm = [min(getattr(s, kind) for s in samples[1:]) for kind in ("clock", "processor")]
                times = (f"{samples[0].clock:.2f}", *(f"{seconds:.3f}" for seconds in warm))
                figures = (*times, f"{apart:.1g}", f"{changes:.1g}")
                rows.append((name, layout, threads, *figures, f"{peak / GIB:.2f}"))
    times = ["first (s)", "warm (s)", "warm, processor (s)"]
    apart = ["largest difference from scanpy in log10 p", "median in log2 fold change"]
    return table(["engine", "values by", "threads", *times, *apart, "peak memory (GiB)"], rows)


def main(arguments: Sequence[str] | None = None) -> str:
    """Measure, print, and return the lines for the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=("suites", "engines"), default=("suites", "engines"))
    parser.add_argument("--data", type=Path, help="a screen of the preset norman; simulated without it")
    parser.add_argument("--real", type=Path, default=SHARED / "papalexi21.h5ad", help="for the engines")
    parser.add_argument("--doubles", type=int, default=37, help="at most so many test conditions")
    parser.add_argument("--cells", type=int, default=128, help="predicted of each")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    parts = [f"{machine(torch.device('cpu'))}."]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "suites" in options.only:
            job = Job(folder, options.data or folder / "screen.h5ad", options.threads)
            parts += [prepare(job, options.doubles, options.cells), measure_suites(job, options.repeats)]
        if "engines" in options.only:
            parts += [f"{options.real.stem}.", measure_engines(options.real, folder, options.repeats)]
    text = "\n\n".join(parts)
    print(text)
    return text


if __name__ == "__main__":
    main()
