"Learning curves: what twice the data gives, where that is known; and how the question is put."
import numpy as np
import pytest
import torch

from nixietune.comparison import interval_of
from nixietune.core import InputError
from nixietune.curves import curves_like, fit_power, learning_curve, power_at, run_noise, summed_up
from nixietune.losses import InfoNCE
from nixietune.testing import tiny_model, toy_corpus, toy_groups

torch.set_num_threads(1)
SIZES = np.array([100, 200, 400, 800, 1600])


def points(rng, noise, runs=1, a=0.9, b=0.4, queries=200):
    easy, own = rng.normal(0, 0.25, queries), rng.normal(0, 0.05, (5, runs, queries))
    return 0.7 - a * SIZES[:, None, None] ** -b + rng.normal(0, noise, (5, runs, 1)) + easy - easy.mean() + own


@pytest.mark.slow
@pytest.mark.parametrize("runs, noise", [(1, 0.002), (1, 0.01), (3, 0.01)])
def test_the_interval_holds_the_gain(runs, noise):
    "In at least 90 of 100; wider than need be is no harm."
    truth, inside = 0.9 * (1600**-0.4 - 3200**-0.4), 0
    for i in range(400):
        gain = np.diff(power_at(fit_power(SIZES, curves_like(SIZES, points(np.random.default_rng(i), noise, runs), 300, i)), [1600, 3200]))[:, 0]
        low, high = interval_of(gain)
        inside += low <= truth <= high
    assert inside / 400 >= 0.9, inside


def test_flat_and_falling_curves():
    rng = np.random.default_rng(0)
    flat, falling = (summed_up(SIZES / 1600, SIZES, points(rng, 0.002, 3, a), 0.5) for a in (0.0, -0.9))
    assert flat.gain[0] <= 0 <= flat.gain[1] and "cannot be told" in flat.verdict
    assert falling.gain[1] < 0 and "make it worse" in falling.verdict


def test_a_curve_of_another_shape_is_said():
    values = 1 / (1 + np.exp(-(np.log2(SIZES) - 9) * 3))[:, None, None] * np.ones((1, 1, 50))
    found = summed_up(SIZES / 1600, SIZES, values, 0.0)
    assert "Careful: the curve misses a point by" in found.verdict and np.ptp(found.interval) > 0.1
    spread = np.tile(values.mean(2), (1, 2)) + [[-1e-4, 1e-4]]
    assert run_noise(SIZES, spread)[0] > 0.05, "runs that agree do not make a wrong curve right"


def test_shares_are_nested_and_the_model_is_left_alone(tmp_path, monkeypatch):
    import nixietune.curves as module
    seen, groups, model = [], toy_groups(80), tiny_model()
    before = {k: o.clone() for k, o in model.state_dict().items()}
    class Listens(module.Trainer):
        def __init__(self, model, args, train, **more):
            seen.append([*train["query"][:]])
            super().__init__(model, args, train, **more)
    monkeypatch.setattr(module, "Trainer", Listens)
    found = learning_curve(groups.select(range(60)), model, toy_corpus(), groups.select(range(60, 80)), shares=(1, 0.25, 0.5), seeds=(0, 1), loss=InfoNCE(0.05),
                           output_dir=tmp_path / "curve", num_train_epochs=1, per_device_train_batch_size=16, precision="fp32")
    assert [o["groups"] for o in found.rows] == [15, 30, 60] and [len(o) for o in seen] == [15, 15, 30, 30, 60, 60]
    assert seen[0] == seen[2][:15] == seen[4][:15] and seen[0] != seen[1] and not {*seen[-1]} & {*groups["query"][60:80]}
    assert all(torch.equal(o, before[k]) for k, o in model.state_dict().items())


def test_bad_input():
    with pytest.raises(InputError, match="no seeds"): learning_curve(toy_groups(20), None, None, None, seeds=())
    with pytest.raises(InputError, match="a share of True"): learning_curve(toy_groups(20), None, None, None, shares=(True, 0.5, 0.1))
    with pytest.raises(InputError, match="2 amounts"): fit_power([1, 2, 2], [0.1, 0.2, 0.2])
