import anndata
import numpy as np
import pytest
import scipy.sparse as sp

from knockon.evaluate.pairs import Pairs
from knockon.evaluate.prediction import Reading, read
from knockon.evaluate.suites import generation
from knockon.evaluate.truth import Truth
from knockon.types import Label, UserError


def test_spellings_and_order_of_a_prediction_do_not_matter(screen, split, prediction):
    pairs = Pairs.of(prediction, screen, split)
    assert [str(label) for label in pairs.truth.labels] == ["A+B", "B+C", "C+D"]
    rows = np.flatnonzero(prediction.obs["perturbation"] == "B+A")
    np.testing.assert_allclose(pairs.cells[0].toarray(), prediction.X.toarray()[rows])
    assert pairs.notes == ("the prediction holds log1p (or --pred-units)",)


def test_genes_are_aligned_by_name_and_that_is_noted(screen, split, prediction):
    other = prediction[:, ::-1].copy()
    wider = anndata.concat([other, _extra_gene(other)], axis=1, merge="first")
    pairs, plain = Pairs.of(wider, screen, split), Pairs.of(prediction, screen, split)
    assert all((x != y).nnz == 0 for x, y in zip(pairs.cells, plain.cells, strict=True))
    assert "1 predicted genes" in pairs.notes[1]
    assert "order" in pairs.notes[2]


def _extra_gene(adata):
    extra = adata[:, :1].copy()
    extra.var_names = ["another"]
    return extra


def test_predicted_controls_and_training_conditions_are_not_looked_at(make, screen, split, prediction):
    plain = Pairs.of(prediction, screen, split)
    more = anndata.concat([make.cells(["control", "A"], seed=3), prediction], index_unique="-")
    pairs = Pairs.of(more, screen, split)
    assert all((x != y).nnz == 0 for x, y in zip(pairs.cells, plain.cells, strict=True))
    assert pairs.notes[1:] == ("1 predicted conditions outside the test part are ignored",)
    assert not plain.controls
    assert (pairs.controls[()] != more.X[:30]).nnz == 0  # but kept, to be looked at for drift


def test_a_file_is_as_good_as_an_object(tmp_path, screen, split, prediction):
    prediction.write_h5ad(tmp_path / "pred.h5ad")
    from_file = Pairs.of(tmp_path / "pred.h5ad", screen, split)
    assert (from_file.cells[0] != Pairs.of(prediction, screen, split).cells[0]).nnz == 0


def means_of(screen):
    return {label: screen.cells_of(label).mean(0, dtype=np.float64) for label in screen.labels}


def test_the_truth_refers_to_the_real_control_and_to_what_was_not_held_out(screen, split):
    truth, means = Truth.of(screen, split), means_of(screen)
    control = means[Label()]
    np.testing.assert_allclose(truth.control, np.tile(control, (3, 1)))
    np.testing.assert_allclose(truth.centroid[0], np.mean([means[label] for label in split.train], axis=0))
    np.testing.assert_allclose(truth.candidates[truth.own[1]], means[Label.of(["B", "C"])])
    assert truth.rivals.sum(axis=1).tolist() == [6, 6, 6]
    assert not truth.rivals[np.arange(3), truth.own].any()


@pytest.fixture
def contexts(make):
    cells = make.cells(["control", "A", "B", "A+B"], contexts=["T", "B"])
    return make.screen(cells, ("cell_type",))


def test_references_and_candidates_are_of_the_same_context(make, contexts):
    truth = Truth.of(contexts, make.split(contexts, lambda label: label.perturbation == "A+B"))
    means = means_of(contexts)
    for row, label in enumerate(truth.labels):
        context = label.covariates
        np.testing.assert_allclose(truth.control[row], means[Label(covariates=context)])
        singles = [means[Label.of([name], covariates=context)] for name in "AB"]
        np.testing.assert_allclose(truth.centroid[row], np.mean(singles, axis=0))
    assert truth.rivals.sum(axis=1).tolist() == [2, 2]


def test_the_centroid_of_a_new_context_is_its_control_with_the_mean_effect(make, contexts):
    truth = Truth.of(contexts, make.split(contexts, lambda label: label.covariates == ("T",)))
    means = means_of(contexts)
    control = {c: means[Label(covariates=(c,))] for c in "BT"}
    seen = [means[label] - control["B"] for label in contexts.conditions if label.covariates == ("B",)]
    np.testing.assert_allclose(truth.centroid[0], control["T"] + np.mean(seen, axis=0))
    assert "new context" in truth.notes[0]


def test_a_context_must_be_told(make, contexts):
    split = make.split(contexts, lambda label: label.perturbation == "A+B")
    with pytest.raises(UserError, match="obs of the prediction lacks: cell_type"):
        Pairs.of(make.cells(["A+B"]), contexts, split)
    complete = make.cells(["A+B"], contexts=["T", "B"])
    assert len(Pairs.of(complete, contexts, split).cells) == 2
    partial = Pairs.of(make.cells(["A+B"], contexts=["T"]), contexts, split)
    assert len(partial.cells) == len(partial.truth.labels) == 1
    assert any("lacks 1 test conditions: A+B | B" in note for note in partial.notes)


def test_a_condition_with_one_cell_is_named(make):
    lonely = make.cells(["control", "A", "B", "A+B"])[:91].copy()
    screen = make.screen(lonely)
    truth = Truth.of(screen, make.split(screen, lambda label: label.perturbation == "A+B"))
    assert truth.notes == ("one real cell, so no variance and no distance between populations: A+B",)


# ---- counts ----------------------------------------------------------------------------------------


def as_counts(adata):
    found = adata.copy()
    found.X = sp.csr_matrix(np.rint(np.expm1(adata.X.toarray())))
    return found


@pytest.fixture
def counted(make):
    screen = make.screen(as_counts(make.cells(["control", "A", "B", "A+B"])))
    return screen, make.split(screen, lambda label: label.perturbation == "A+B")


def test_counts_are_compared_as_log1p_on_both_sides(make, counted):
    screen, split = counted
    assert screen.units == "counts"
    predicted = as_counts(make.cells(["A+B"], seed=1))
    pairs = Pairs.of(predicted, screen, split)
    totals = np.concatenate([screen.cells_of(label).sum(1) for label in (*split.train, Label())])
    total = np.median(totals)
    counts = predicted.X.toarray()
    expected = np.log1p(counts / counts.sum(1, keepdims=True) * total)
    np.testing.assert_allclose(pairs.cells[0].toarray(), expected, rtol=1e-5)
    assert f"counts per {total:g}" in pairs.notes[0]


def test_a_prediction_of_another_total_is_brought_to_that_of_the_truth(make, counted):
    screen, split = counted
    counts = as_counts(make.cells(["A+B"], seed=1))
    scaled = counts.copy()
    values = counts.X.toarray()
    scaled.X = sp.csr_matrix(np.log1p(values / values.sum(1, keepdims=True) * 5000))
    scaled.uns["knockon"] = {"units": "log1p", "total": 5000.0}
    pairs, plain = Pairs.of(scaled, screen, split), Pairs.of(counts, screen, split)
    np.testing.assert_allclose(pairs.cells[0].toarray(), plain.cells[0].toarray(), rtol=1e-4)
    assert "per 5000" in pairs.notes[-1]
    assert "sum to that" not in pairs.notes[-1]
    scaled.uns.clear()  # then all cells sum to it plainly
    pairs = Pairs.of(scaled, screen, split)
    np.testing.assert_allclose(pairs.cells[0].toarray(), plain.cells[0].toarray(), rtol=1e-4)
    assert "sum to that" in pairs.notes[-1]


def test_a_total_that_is_not_plain_is_asked_for(make, counted):
    """Cells that lack a gene have no common sum, and copies of one cell have one that says nothing."""
    screen, split = counted
    values = as_counts(make.cells(["A+B"], seed=1)).X.toarray()
    predicted = make.cells(["A+B"], seed=1)
    predicted.X = sp.csr_matrix(np.log1p(values / values.sum(1, keepdims=True) * 5000))
    fewer = predicted[:, 1:].copy()
    copies = predicted.copy()
    copies.X = sp.csr_matrix(np.tile(predicted.X.toarray().mean(0), (predicted.n_obs, 1)))
    for unclear in (fewer, copies):
        with pytest.raises(UserError, match=r"in log1p and the screen in counts.*--pred-total 10000"):
            Pairs.of(unclear, screen, split)
    told = Pairs.of(read(fewer, screen, Reading(total=5000)), screen, split)
    plain = Pairs.of(predicted, screen, split)
    np.testing.assert_allclose(told.cells[0].toarray()[:, 1:], plain.cells[0].toarray()[:, 1:], rtol=1e-4)
    with pytest.raises(UserError, match="prediction in counts"):
        read(as_counts(fewer), screen, Reading(total=5000))


# ---- genes that are missing -------------------------------------------------------------------------


def test_missing_genes_are_named_and_filled_with_what_is_worse(screen, split, prediction):
    kept = [gene for gene in prediction.var_names if gene not in ("G3", "G38", "G39", "G7")]
    pairs, plain = Pairs.of(prediction[:, kept].copy(), screen, split), Pairs.of(prediction, screen, split)
    assert "lacks 4 of the screen's 40 genes" in pairs.notes[1]
    assert pairs.notes[1].endswith("G3, G7, G38 and 1 more")
    assert np.flatnonzero(~pairs.present).tolist() == [3, 7, 38, 39]
    assert plain.present is None
    truth = plain.truth
    errors, whole = (np.abs(p.moments.mean - truth.moments.mean) for p in (pairs, plain))
    np.testing.assert_allclose(errors[:, pairs.present], whole[:, pairs.present])
    silent, unchanged = truth.moments.mean, np.abs(truth.control - truth.moments.mean)
    worst = np.maximum(silent, unchanged)[:, ~pairs.present]
    # real control cells are drawn for it, so that the mean is that of control but for sampling
    assert (errors[:, ~pairs.present] > 0.7 * worst).all()
    zero = silent >= unchanged
    np.testing.assert_allclose(errors[zero & ~pairs.present], silent[zero & ~pairs.present])


def test_no_gene_can_be_left_out_for_a_better_score(make, screen, split):
    """A perfect prediction is never better for a missing gene, whichever it is."""
    replicate = make.cells(["A+B", "B+C", "C+D"], cells=200, seed=5)
    pairs = Pairs.of(replicate, screen, split)
    error = np.square(pairs.moments.mean - pairs.truth.moments.mean).mean()
    for gene in replicate.var_names:
        fewer = Pairs.of(replicate[:, replicate.var_names != gene].copy(), screen, split)
        assert np.square(fewer.moments.mean - pairs.truth.moments.mean).mean() > error, gene


def test_counts_are_filled_like_their_logarithms(make, counted):
    screen, split = counted
    fewer = as_counts(make.cells(["A+B"], seed=1))[:, 5:].copy()
    pairs = Pairs.of(fewer, screen, split)
    assert pairs.counts is not None
    filled = (pairs.counts[0][:, :5] > 0) != (pairs.cells[0][:, :5] > 0)
    assert filled.nnz == 0
    assert set(np.unique(pairs.counts[0].data % 1)) == {0.0}


def test_names_of_another_kind_are_shown(screen, split, prediction):
    prediction.var_names = [f"ENSG{i:011d}" for i in range(40)]
    with pytest.raises(UserError, match=r"0 of the screen's 40 genes.*G0, G1, G2; found ENSG00000000000"):
        Pairs.of(prediction, screen, split)


# ---- bad input -------------------------------------------------------------------------------------


def test_genes_must_be_unique(screen, split, prediction):
    wider = anndata.concat([prediction, _extra_gene(prediction)], axis=1, merge="first")
    wider.var_names = [*prediction.var_names, "G0"]
    with pytest.raises(UserError, match="Duplicate genes: G0"):
        Pairs.of(wider, screen, split)


def test_unknown_and_missing_conditions_are_named(make, screen, split):
    more = Pairs.of(make.cells(["A+B", "B+C", "C+D", "A+D"]), screen, split)
    assert any("that the screen has not are ignored: A+D" in note for note in more.notes)
    partial = Pairs.of(make.cells(["B+C"]), screen, split)
    assert [str(label) for label in partial.truth.labels] == ["B+C"]
    assert any("lacks 2 test conditions: A+B, C+D" in note for note in partial.notes)
    with pytest.raises(UserError, match=r"lacks all test conditions: A\+B, B\+C, C\+D.*found A"):
        Pairs.of(make.cells(["A"]), screen, split)


@pytest.mark.parametrize(("value", "message"), [(-1.0, "Negative"), (np.nan, "finite"), (np.inf, "finite")])
def test_impossible_values_are_refused(screen, split, prediction, value, message):
    prediction.X.data[7] = value
    with pytest.raises(UserError, match=message):
        Pairs.of(prediction, screen, split)


def test_another_scale_is_refused(screen, split, prediction):
    with pytest.raises(UserError, match="in counts and the screen in log1p"):
        Pairs.of(as_counts(prediction), screen, split)
    prediction.X = prediction.X * 100
    with pytest.raises(UserError, match="neither"):
        Pairs.of(prediction, screen, split)


def test_a_contradiction_to_the_declared_scale_is_refused(screen, split, prediction):
    prediction.uns["knockon"] = {"units": "counts"}
    with pytest.raises(UserError, match="log1p"):
        Pairs.of(prediction, screen, split)


def test_values_must_be_there(screen, split, prediction):
    prediction.X = None
    with pytest.raises(UserError, match="no X"):
        Pairs.of(prediction, screen, split)


def test_a_missing_and_a_truncated_file_are_refused(tmp_path, screen, split, prediction):
    with pytest.raises(UserError, match="No such file"):
        Pairs.of(tmp_path / "none.h5ad", screen, split)
    prediction.write_h5ad(tmp_path / "pred.h5ad")
    whole = (tmp_path / "pred.h5ad").read_bytes()
    (tmp_path / "cut.h5ad").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="Cannot read"):
        Pairs.of(tmp_path / "cut.h5ad", screen, split)


def test_a_split_of_another_screen_is_refused(make, screen, split, prediction):
    smaller = make.screen(make.cells(["control", "A", "B", "C", "D"]))
    with pytest.raises(UserError, match=r"test part of the split names conditions.*A\+B"):
        Pairs.of(prediction, smaller, split)


def test_an_empty_part_is_refused(make, screen, prediction):
    with pytest.raises(UserError, match="test part of the split is empty"):
        Pairs.of(prediction, screen, make.split(screen, lambda _: False))


def test_counts_without_a_gene_leave_the_other_genes_as_they_are(make):
    """Even if that gene has half of all counts: what is there has its real share of the total."""
    cells = make.cells(["control", "A", "B", "A+B"], cells=40)
    cells.X = np.rint(np.expm1(cells.X.toarray()))
    cells.X[:, 0] += np.rint(cells.X[:, 1:].sum(axis=1).mean())
    screen = make.screen(cells)
    split = make.split(screen, lambda label: label.perturbation == "A+B")
    found = cells[cells.obs["perturbation"] == "A+B", 1:].copy()
    pairs = Pairs.of(found, screen, split)
    whole = Pairs.of(cells[cells.obs["perturbation"] == "A+B"].copy(), screen, split)
    off = pairs.moments.mean[0, 1:] - whole.moments.mean[0, 1:]
    assert np.abs(off).mean() < 0.05


def test_one_predicted_cell_is_compared_with_as_many_real_cells_as_a_population(make, screen, split):
    truth = Truth.of(screen, split)
    pairs = Pairs.align(make.cells([str(label) for label in truth.labels], cells=1, seed=3), truth)
    real = generation.drawn(pairs, 256)
    assert {len(y.indptr) - 1 for _, y in real} == {15}


def test_a_prediction_tells_what_was_done_to_it(make, screen, split, prediction):
    pairs = Pairs.of(prediction[:, 1:].copy(), screen, split)
    assert any("lacks 1 of" in note for note in pairs.remarks)
    assert not set(pairs.remarks) & set(pairs.truth.notes)
