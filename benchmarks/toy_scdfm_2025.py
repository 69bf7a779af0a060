"""Numbers of cell-eval 0.5.42 with pdex 0.1.21 on the toy screen, as the tests of the suite expect them.

    python -m venv old && old/bin/pip install cell-eval==0.5.42 pdex==0.1.21
    old/bin/python benchmarks/toy_scdfm_2025.py

Genes are numbers, as where scDFM's tables were made, so that no target gene is left out.
"""

import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import anndata
import pandas as pd
from cell_eval import MetricsEvaluator

TESTS = Path(__file__).parents[1] / "tests" / "evaluate" / "suites"
SKIPPED = ["pearson_edistance", "clustering_agreement", "de_nsig_counts"]
SKIPPED += [f"{kind}_at_{k}" for kind in ("overlap", "precision") for k in ("N", 50, 100, 200, 500)][1:]


def main() -> None:
    """Score the five predictions and write the table."""
    sys.path.insert(0, str(TESTS))
    import toy  # noqa: PLC0415 (of the tests)

    found, drawn = [], toy.toy()
    real = toy.log1p(drawn.real[drawn.real.obs["perturbation"] != toy.TRAINED])
    for name, prediction in drawn.predictions.items():
        control = real[real.obs["perturbation"] == "control"]
        sides = [anndata.concat([control, toy.log1p(prediction)], index_unique="-"), real.copy()]
        for side in sides:
            side.X = side.X.toarray()
            side.var_names = [str(i) for i in range(side.n_vars)]
        with tempfile.TemporaryDirectory() as folder:
            evaluator = MetricsEvaluator(
                *sides, control_pert="control", pert_col="perturbation", num_threads=1, outdir=folder
            )
            scores, _ = evaluator.compute(write_csv=False, skip_metrics=SKIPPED)
        found.append(scores.to_pandas().assign(prediction=name))
    table = pd.concat(found).set_index(["prediction", "perturbation"]).sort_index()
    made = ", ".join(f"{name} {version(name)}" for name in ("cell-eval", "pdex", "scipy", "numpy"))
    text = f"# {made}\n{table.to_csv(float_format='%.9g')}"
    (TESTS / "toy_scdfm_2025.csv").write_text(text)


if __name__ == "__main__":
    main()
