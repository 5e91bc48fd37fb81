"Settings chosen on dev: within a budget, over seeds, whatever breaks."
import pytest
import torch

from nixietune.core import InputError
from nixietune.testing import tiny_model, toy_corpus, toy_groups
from nixietune.tuning import affordable, best_of, small_corpus, Trial, tune

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch): monkeypatch.setenv("NIXIETUNE_CACHE", str(tmp_path / "cache"))


def run(tmp_path, **more):
    options = dict(minutes=30, learning_rates=(1e-3, 1e-2), temperatures=(0.1, 0.5), num_train_epochs=1, per_device_train_batch_size=16, precision="fp32")
    groups = toy_groups(110)
    return tune(groups.select(range(90)), tiny_model(), toy_corpus(), groups.select(range(90, 110)), output_dir=tmp_path / "tune", **(options | more))


def test_seeds_and_repetition(tmp_path):
    "Every setting with every seed; the same call gives the same result."
    one, two = (run(tmp_path, seeds=(0, 1), temperatures=(0.1,)) for _ in range(2))
    assert one.best == two.best and [o.score for o in one.trials] == [o.score for o in two.trials]
    assert len(one.trials) == 2 * (2 + 1 + 1) and {o.seed for o in one.trials} == {0, 1} and one.best in [o.settings for o in one.trials if o.share == 1]


def test_no_time(tmp_path, capsys):
    "The recipe's own setting is tried in any case, and what was left out is said."
    found = run(tmp_path, minutes=1e-6)
    assert len(found.trials) == 1 and found.skipped == 3 and "1 of 4 settings are tried" in capsys.readouterr().out
    assert "no time for 3 more settings" in repr(found) and found.best["temperature"] == 0.1


def test_a_setting_that_breaks_is_the_worst(tmp_path, monkeypatch, capsys):
    import nixietune.tuning as module
    class Breaks(module.InfoNCE):
        def __call__(self, similarities, relation):
            terms = super().__call__(similarities, relation)
            return terms._replace(value=terms.value * (float("nan") if self.temperature == 0.1 else 1))
    monkeypatch.setattr(module, "InfoNCE", Breaks)
    found = run(tmp_path, num_train_epochs=3)
    assert found.best["temperature"] == 0.5 and {o.score for o in found.trials if o.settings["temperature"] == 0.1} == {0.0} and "third time in a row" in capsys.readouterr().out


def test_best_of():
    "By the mean over seeds, on the largest share only."
    trials = [Trial({"a": a}, share, seed, score) for a, share, seed, score in [(1, 0.1, 0, 0.9), (2, 1, 0, 0.5), (2, 1, 1, 0.7), (3, 1, 0, 0.65), (3, 1, 1, 0.45)]]
    assert best_of(trials) == [{"a": 2}, {"a": 3}]
    enough = 9 * (1 / 9 + 1) + 3 * (3 / 9 + 1) + 2
    assert affordable(9, enough, 1, 1) == (9, 3) and affordable(9, enough - 0.1, 1, 1) == (9, 2) and affordable(9, 6, 1, 1) == (3, 2) and affordable(9, 3, 1, 1) == (2, 1)
    assert affordable(10, 0, 1, 1) == affordable(1, 100, 1, 1) == (1, 1)


def test_the_corpus_of_dev():
    dev, corpus = toy_groups(30), toy_corpus()
    known = {o["doc"] for group in dev for o in group["pos"] + group["neg"]}
    assert {*small_corpus(corpus, dev, 10)["text"]} == known and len(small_corpus(corpus, dev, 10_000)) == 180
    assert small_corpus(corpus, dev, 150)["text"][:] == small_corpus(corpus, dev, 150)["text"][:] != small_corpus(corpus, dev, 150, seed=1)["text"][:]


@pytest.mark.parametrize("more, problem", [({"seeds": ()}, "no seeds"), ({"minutes": 0}, "minutes is 0"), ({"temperatures": (-1.0,)}, "temperature=-1.0")])
def test_bad_input(tmp_path, more, problem):
    with pytest.raises((InputError, ValueError), match=problem): run(tmp_path, **more)
