"Verdicts keep their word: intervals over queries, clusters and training runs; what could be shown; slices; choosing."
import numpy as np
import pandas as pd
import pytest

import nixietune as nt
from nixietune.comparison import cluster_sums, clusters_of, compare, detectable, holm, resampled, sign_flip_test
from nixietune.core import InputError
from nixietune.evaluation import Evaluation
from nixietune.groups import make_groups

METRIC = "ndcg@10"


def evaluation(values, **more):
    "An `Evaluation` of one metric that was never measured."
    values = {METRIC: np.asarray(values, float)} | more
    n = len(values[METRIC])
    rows = pd.DataFrame({"query_id": [f"q{i}" for i in range(n)], "query": [f"query number {i}" for i in range(n)], **values,
                         "positives": 1, "rank": pd.array([1] * n, dtype="Int64"), "top_id": "d", "top_text": "a document"})
    return Evaluation({k: float(np.mean(v)) for k, v in values.items()}, rows, None, {"corpus": "c", "relevance": "r", "documents": 10})


def gains(quality):
    "nDCG@10 of queries with one positive whose rank is drawn by how good the model is there."
    rank = np.ceil(quality)
    return np.where(rank <= 10, 1 / np.log2(1 + rank), 0)


def draw(rng, n=200, clusters=None, runs=1):
    "Two models, equally good: the same queries, hard and easy ones, and luck for each model, query, cluster and training run."
    hard = np.exp(rng.normal(1, 1.2, n))
    def model():
        of_cluster = 0 if clusters is None else rng.normal(0, 0.8, clusters.max() + 1)[clusters]
        return [evaluation(gains(hard * np.exp(rng.normal(0, 0.5, n) + of_cluster + rng.normal(0, 0.15) * (runs > 1)))) for _ in range(runs)]
    return model(), model()


def covered(times, samples, clustered=False, runs=1):
    "How often the interval holds zero, and how often a difference is shown, where there is none."
    inside = shown = 0
    for i in range(times):
        rng = np.random.default_rng(i)
        clusters = np.sort(rng.integers(0, 80, 300)) if clustered else None
        before, after = draw(rng, 300 if clustered else 200, clusters, runs)
        named = clusters if clusters is None else {f"q{q}": int(c) for q, c in enumerate(clusters)}
        found = compare(before, after, samples=samples, seed=i, clusters=named)
        inside += found.interval[0] <= 0 <= found.interval[1]
        shown += found.outcome != "no difference"
    return inside / times, shown / times


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"clustered": True}, {"runs": 3}], ids=["queries", "clusters", "runs"])
def test_a_thousand_comparisons_without_a_difference(more):
    inside, shown = covered(1000, 2000, **more)
    assert 0.93 <= inside <= 0.97, inside
    assert 0.03 <= shown <= 0.07, shown


def test_a_hundred_comparisons_without_a_difference():
    inside, shown = covered(100, 500)
    assert 0.89 <= inside <= 0.99 and shown <= 0.11


def test_queries_of_a_cluster_are_no_news():
    "Resampled by query, what clusters share looks like a difference far too often."
    wrong = 0
    for i in range(60):
        rng = np.random.default_rng(i)
        (before,), (after,) = draw(rng, 300, np.sort(rng.integers(0, 20, 300)))
        wrong += compare(before, after, samples=500).outcome != "no difference"
    assert wrong / 60 > 0.2


def test_clusters_by_hand():
    sums = cluster_sums(np.array([[0.1], [0.3], [-0.2]]), ["a", "b", "a"])
    assert np.allclose(sums, [[-0.1, 2], [0.3, 1]])
    assert {*np.round(resampled(sums, 200)[:, 0], 6)} == {-0.05, 0.3, round(0.2 / 3, 6)}  # a twice, b twice, one of each


def test_clusters_of_groups():
    groups = make_groups([{"query": f"question {i}", "pos": [{"doc": f"the answer {'abc'[i // 2] * 20}"}], "neg": []} for i in range(6)], "nixietune")
    found = clusters_of(groups)
    assert len({*found.values()}) == 3 and [*found] == groups["query_id"][:]
    with pytest.raises(InputError, match="expected 'positive'"): clusters_of(groups, "colour")


def test_metrics_looked_at_together():
    "Of twenty metrics of equal models Holm's p-values show nothing in about 95 of 100 tests."
    rng, false = np.random.default_rng(0), 0
    for _ in range(100): false += min(holm([sign_flip_test(rng.normal(0, 1, 30), 1000) for _ in range(20)])) <= 0.05
    assert false <= 12


def test_detectable_grows_with_the_noise_and_shrinks_with_the_queries():
    assert detectable(0.02, 99) == pytest.approx(2 * detectable(0.01, 99))
    assert detectable(0.01, 10_000) == pytest.approx(0.01 * (1.95996 + 0.84162), rel=1e-3)
    rng = np.random.default_rng(0)
    small, large = (compare(evaluation(np.full(n, 0.5)), evaluation(0.5 + rng.normal(0, 0.1, n))) for n in (50, 5000))
    assert small.detectable > 5 * large.detectable


def test_words():
    low, high = evaluation(np.linspace(0, 0.5, 100)), evaluation(np.linspace(0, 0.5, 100) + 0.1)
    assert compare(low, high).verdict.startswith("Better: ") and compare(high, low).verdict.startswith("WORSE: ")
    rng = np.random.default_rng(0)
    nothing = compare(low, evaluation(np.linspace(0, 0.5, 100) + rng.normal(0, 0.1, 100)))
    assert nothing.verdict.startswith("No difference shown: ") and "would have been shown here four times in five" in nothing.verdict
    assert "does not see the variance of training" in repr(nothing.table)


def test_runs_are_seen():
    "Three runs that differ much: the interval is wider than that over the queries, and the verdict names them."
    base, rng = np.linspace(0, 0.5, 100), np.random.default_rng(0)
    runs = [evaluation(base + o + rng.normal(0, 0.01, 100)) for o in (0.0, 0.1, 0.2)]
    one, three = compare(evaluation(base), runs[1]), compare(evaluation(base), runs)
    assert one.outcome == "better" and three.outcome == "no difference" and "Trained 3 times" in three.verdict
    assert np.ptp(three.interval) > 10 * np.ptp(one.interval)
    assert "does not see" not in repr(three.table) and len(three.runs) == 3 and three.difference == pytest.approx(0.1, abs=0.01)
    same = compare(evaluation(base), [runs[1]] * 3)
    assert np.ptp(same.interval) == pytest.approx(np.ptp(one.interval), rel=0.1)


def test_chosen_queries_are_said(capsys):
    low, high = evaluation(np.linspace(0, 0.5, 100)), evaluation(np.linspace(0, 0.5, 100) + 0.1)
    found = compare(low, high, chosen_on=["Query number 7!", "something else"])
    assert found.chosen == 1 and "1 of 100 test queries took part in choosing" in capsys.readouterr().out and "CAREFUL" in found.verdict
    assert not compare(low, high, chosen_on=[]).chosen and not capsys.readouterr().out


def test_slices_say_where():
    values = np.full(200, 0.5)
    after = values + np.where(np.arange(200) < 100, 0.1, -0.1) + np.random.default_rng(0).normal(0, 0.05, 200)
    found = compare(evaluation(values), evaluation(after))
    rows = found.slices({f"q{i}": "first" if i < 100 else "second" for i in range(200)}).rows
    assert [(o["slice"], o["queries"], o["shown"]) for o in rows] == [("first", 100, "better"), ("second", 100, "worse")]
    assert found.outcome == "no difference"


def test_a_model_remembers_on_what_it_was_chosen(tmp_path, capsys):
    "A mix, and the best checkpoint, that are tested on the queries that chose them; other queries are no matter."
    base, tuned, groups, corpus = nt.tiny_model(), nt.tiny_model(seed=1), nt.toy_groups(12), nt.toy_corpus()
    dev, test = groups.select(range(8)), groups.select(range(8, 12))
    with nt.quiet():
        mix = nt.merge_sweep(base, tuned, (0.5, 1), target=(dev, corpus)).model
        args = nt.TrainingArguments(str(tmp_path), num_train_epochs=1, per_device_train_batch_size=4, eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True, precision="fp32")
        best = nt.Trainer(nt.tiny_model(), args, test, dev=dev, corpus=corpus)
        best.train()
        before = {o: nt.evaluate(base, part, corpus) for o, part in (("dev", dev), ("test", test))}
        for model in (mix, best.model):
            assert nt.compare(before["dev"], nt.evaluate(model, dev, corpus)).chosen == 8
            assert nt.compare(before["test"], nt.evaluate(model, test, corpus)).chosen == 0
        further = nt.merge_sweep(base, mix, (0.5,), target=(test, corpus)).model
    found = nt.compare(before["dev"], nt.evaluate(further, dev, corpus))
    assert found.chosen == 8 and "CAREFUL" in found.verdict and "CAREFUL" in capsys.readouterr().out
