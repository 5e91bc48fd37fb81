"Forgetting: what other data say, whether they say it, and in which words."
import numpy as np
import pytest
from scipy.stats import spearmanr

from nixietune.core import InputError
from nixietune.probes import as_probes, compare_correlations, forgetting, pairs_of, probe_says
from nixietune.testing import tiny_model, toy_corpus, toy_groups


def words(texts, role, damage=0.0):
    "Each word is a random vector; of a damaged model some are others than for queries."
    table = np.random.default_rng(0).normal(size=(1000, 64))
    known = {}
    def vector(word):
        number = sum(map(ord, word)) * 7 % 1000
        lost = role == "document" and number % 10 < 10 * damage
        return known.setdefault(word, table[-1 - number] if lost else table[number])
    return np.array([np.mean([vector(o) for o in text.split()], axis=0) for text in texts])


def plain(groups):
    "Queries that use the words of their documents."
    return [{"query_id": f"q{i}", "query": " ".join(o["pos"][0]["doc"].split()[1:4]) + f" {i}", "pos": o["pos"], "neg": [], "source": "test"} for i, o in enumerate(groups)]


def test_a_loss_is_shown_and_none_is_made_up():
    groups, corpus = plain(toy_groups(150)), toy_corpus()
    worse = forgetting(words, lambda texts, role: words(texts, role, 0.5), {"toy": (groups, corpus)})
    assert worse.outcome == "forgotten" and worse.verdict.startswith("FORGOTTEN: on toy, nDCG@10 fell from") and worse.rows[0]["difference"] < -0.1
    same = forgetting(words, words, {"toy": (groups, corpus)})
    assert same.outcome == "kept" and "No loss of more than 0.01 on toy." == same.verdict


def test_a_small_probe_leaves_it_open():
    groups = plain(toy_groups(8))
    found = forgetting(words, lambda texts, role: words(texts, role, 0.2), {"toy": (groups, toy_corpus())})
    assert found.outcome == "open" and "is not excluded" in found.verdict and found.rows[0]["difference"] < 0
    nothing = forgetting(tiny_model(seed=0), tiny_model(seed=1), {"toy": (toy_groups(12), toy_corpus())}, progress=False)
    assert nothing.outcome == "open" and "nothing to lose" in nothing.verdict
    assert probe_says((-0.1, 0.1), 0.6) == "open" and probe_says((-0.1, 0.1), 0.6, floor=0.2) == "kept"


def test_models_from_folders_and_the_worst_of_several(tmp_path):
    tiny_model().save_pretrained(str(tmp_path / "model"))
    found = forgetting(tmp_path / "model", tiny_model(), {"one": toy_groups(10), "two": toy_groups(20)}, progress=False)
    assert [o["probe"] for o in found.rows] == ["one", "two"] and found.outcome == "kept" and found.plot().get_ylim()


def test_sts_by_hand():
    rng = np.random.default_rng(1)
    gold = rng.uniform(0, 5, 200)
    a, b = gold + rng.normal(0, 2, 200), gold + rng.normal(0, 1, 200)
    found = compare_correlations(a, b, gold)
    assert found["difference"] == pytest.approx(spearmanr(b, gold).statistic - spearmanr(a, gold).statistic)
    assert found["interval"][0] > 0 and found["p"] < 0.01


def test_sts_without_a_difference():
    "Two models that are equally good: the interval holds zero in about 95 of 100, a difference is shown in about 5."
    inside = shown = 0
    for i in range(60):
        rng = np.random.default_rng(i)
        gold = rng.uniform(0, 5, 150)
        found = compare_correlations(gold + rng.normal(0, 2, 150), gold + rng.normal(0, 2, 150), gold, samples=400, seed=i)
        inside += found["interval"][0] <= 0 <= found["interval"][1]
        shown += found["p"] <= 0.05
    assert inside >= 52 and shown <= 8


def test_sts_rows():
    rows = [{"sentence1": "a", "sentence2": "b", "score": 1, "split": "test"}] * 3
    assert pairs_of(rows)[0] == ["a"] * 3 and forgetting(words, words, {}, sts={"pairs": rows[:2] + [("a", "a", 2)]}).outcome == "kept"
    for bad, what in (([("a", "b")] * 3, "sentence1, sentence2, score"), ([("a", "b", float("nan"))] * 3, "no number"), (rows[:1], "1 pairs")):
        with pytest.raises(InputError, match=what): pairs_of(bad)


def test_bad_probes():
    for bad, what in (({"a": 3}, "a is a int"), ([1], "a list"), ({"a": (1, 2, 3)}, "a is a tuple")):
        with pytest.raises(InputError, match=what): as_probes(bad)
