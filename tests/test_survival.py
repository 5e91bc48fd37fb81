"A run survives what a notebook does to it: killed, interrupted, out of disk, its folder gone; and it ends as one that nothing happened to."
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest
import torch
from transformers import TrainerCallback

from nixietune.checkpoints import checkpoints_in, is_whole, last_checkpoint
from nixietune.losses import CoSENT, InfoNCE
from nixietune.objectives import Objective
from nixietune.testing import tiny_model, toy_groups
from nixietune.training import Trainer, TrainingArguments

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch): monkeypatch.setenv("NIXIETUNE_CACHE", str(tmp_path / "cache"))


class At(TrainerCallback):
    "Does something at the end of a step."
    def __init__(self, step, what): self.step, self.what = step, what
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step: self.what()


def trainer_in(folder, callbacks=(), **more):
    "A run of three epochs of eight steps: dropout, draws of positives and negatives, two losses that learn their temperatures."
    options = dict(learning_rate=5e-3, per_device_train_batch_size=8, num_train_epochs=3, precision="fp32", seed=1, logging_steps=1,
        save_strategy="steps", save_steps=2, save_total_limit=2, train_group_size=2)
    model = tiny_model(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    return Trainer(model, TrainingArguments(str(folder), **{**options, **more}), toy_groups(64, negatives=3),
        loss=Objective([InfoNCE(0.1), CoSENT()], learn_temperature=True), callbacks=list(callbacks))


def weights(trainer): return torch.cat([o.detach().flatten() for o in trainer.loss.parameters()])


def finish(folder, epochs=3):
    "Go on in `folder` until the end."
    trainer = trainer_in(folder, num_train_epochs=epochs)
    trainer.train(resume=True)
    assert trainer.state.global_step == 8 * epochs
    return weights(trainer)


def forked(target, *args):
    "A copy of this process that does something."
    child = multiprocessing.get_context("fork").Process(target=target, args=args)
    child.start()
    return child


def quiet_run(folder, epochs):
    "In a child: nothing of its output is mixed with the tests'."
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    trainer_in(folder, num_train_epochs=epochs).train(resume=True)
    os._exit(0)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    "The weights of a run that nothing happens to."
    folder = tmp_path_factory.mktemp("whole")
    os.environ["NIXIETUNE_CACHE"] = str(folder / "cache")
    return finish(folder / "run")


def test_killed_at_any_moment(tmp_path):
    "kill -9, twenty times, while it computes or writes: whatever bears the name of a checkpoint is whole, and the end is the same bit for bit."
    start, epochs = time.monotonic(), 10
    expected = finish(tmp_path / "whole", epochs)
    seconds = time.monotonic() - start
    rng, run, reached = random.Random(0), tmp_path / "run", [0]
    for _ in range(20):
        child = forked(quiet_run, run, epochs)
        child.join(rng.uniform(0.05, 0.25) * seconds)
        child.kill()
        child.join()
        newest = last_checkpoint(run)
        if newest: reached.append(int(newest.rsplit("-", 1)[1]))
        broken = [o for o in run.glob("checkpoint-*") if not is_whole(o)]
        assert not [o for o in broken if int(o.name[11:]) > reached[-1]]  # older ones may have been on their way out
    assert reached == sorted(reached) and len({*reached}) > 3
    assert torch.equal(finish(run, epochs), expected)
    assert len(checkpoints_in(run)) <= 2 and not [o for o in run.iterdir() if o.name.startswith(".")]


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, None)])
def test_asked_to_stop(tmp_path, uninterrupted, capsys, number, code):
    "The step is finished and its checkpoint written, though none was due; the rest of the way leads to the same end."
    run = tmp_path / "run"
    with pytest.raises(SystemExit if code else KeyboardInterrupt) as left: trainer_in(run, [At(5, lambda: os.kill(os.getpid(), number))]).train()
    if code: assert left.value.code == code
    assert "train(resume=True) goes on" in capsys.readouterr().out
    assert Path(last_checkpoint(run)).name in ("checkpoint-5", "checkpoint-6") and signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL)
    assert torch.equal(finish(run), uninterrupted)


def test_a_full_disk(tmp_path, uninterrupted, capsys):
    "Files that may not grow: the checkpoint is given up and said so, the one before stays, training goes on."
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    fill, free = (lambda most=most: resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard)) for most in (20_000, soft))
    trainer = trainer_in(tmp_path / "run", [At(5, fill), At(13, free)], save_total_limit=None)
    try: trainer.train()
    finally: free()
    said = capsys.readouterr().out
    assert said.count("could not be written") == 4 and "step 6" in said and "step 12" in said  # 6, 8, 10 and 12
    assert [int(o.name[11:]) for o in checkpoints_in(tmp_path / "run")] == [2, 4, 14, 16, 18, 20, 22, 24]
    assert len([*(tmp_path / "run").glob("checkpoint-*")]) == 8
    assert torch.equal(weights(trainer), uninterrupted)


def test_a_folder_that_goes(tmp_path, uninterrupted):
    "The run makes it anew, and goes on."
    run = tmp_path / "run"
    trainer = trainer_in(run, [At(7, lambda: shutil.rmtree(run))])
    trainer.train()
    assert [o.name for o in checkpoints_in(run)] == ["checkpoint-22", "checkpoint-24"]
    assert [json.loads(o)["step"] for o in (run / "log.jsonl").read_text().splitlines()][-1] == 24
    assert torch.equal(weights(trainer), uninterrupted)


def test_the_best_stays(tmp_path):
    "By dev nDCG; its place is known after all the moving, also to a run that goes on."
    from nixietune.testing import toy_corpus
    groups = toy_groups(64)
    def trainer(epochs):
        args = TrainingArguments(str(tmp_path / "run"), learning_rate=5e-3, per_device_train_batch_size=16, num_train_epochs=epochs, precision="fp32", seed=1, logging_steps=1,
            save_strategy="epoch", eval_strategy="epoch", save_total_limit=2, load_best_model_at_end=True, metric_for_best_model="ndcg@10")
        return Trainer(tiny_model(), args, groups, dev=toy_groups(20, seed=1), corpus=toy_corpus(), loss=InfoNCE(0.1))
    one = trainer(3)
    one.train()
    best = Path(one.state.best_model_checkpoint)
    assert best.is_dir() and best.parent == tmp_path / "run" and int(best.name[11:]) == one.state.best_global_step
    state = json.loads((Path(last_checkpoint(tmp_path / "run")) / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(best)
    two = trainer(5)
    two.train(resume=True)
    assert two.state.best_metric >= one.state.best_metric and Path(two.state.best_model_checkpoint).is_dir()


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    "Going on reads weights and numbers only."
    run = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt): trainer_in(run, [At(4, lambda: os.kill(os.getpid(), signal.SIGINT))]).train()
    real, calls = torch.load, []
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: (calls.append(kwargs.get("weights_only")), real(*args, **kwargs))[1])
    finish(run)
    assert calls and all(o is True for o in calls)


@pytest.mark.slow
def test_memory_does_not_grow(tmp_path):
    "Over 2,000 steps."
    seen = {}
    def look(step): return At(step, lambda: seen.__setitem__(step, psutil.Process().memory_info().rss))
    trainer_in(tmp_path / "run", [look(400), look(2_000)], num_train_epochs=250, save_steps=500, logging_steps=50).train()
    assert seen[2_000] - seen[400] < 30 * 2**20, {k: v / 2**20 for k, v in seen.items()}
