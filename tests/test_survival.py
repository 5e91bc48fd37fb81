"A run survives what a notebook does to it: killed, interrupted, out of disk, its folder gone; and it ends as one that nothing happened to."
import json
import multiprocessing
import os
import random
import re
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
from nixietune.core import InputError
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


def last_step(run):
    "The newest step in the log, whose last line may be half written."
    log = run / "log.jsonl"
    steps = re.findall(r'"step": ?(\d+)', log.read_text()) if log.exists() else []
    return int(steps[-1]) if steps else 0


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    "The weights of a run that nothing happens to."
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NIXIETUNE_CACHE", str(folder / "cache"))
        return finish(folder / "run")


def test_killed_at_any_moment(tmp_path):
    "kill -9, twenty times, while it computes or writes: whatever bears the name of a checkpoint is whole, and the end is the same bit for bit."
    epochs, rng, run, reached = 10, random.Random(0), tmp_path / "run", [0]
    expected = finish(tmp_path / "whole", epochs)
    for _ in range(20):
        child = forked(quiet_run, run, epochs)
        begun, some = time.monotonic(), reached[-1] + rng.randint(1, 4)  # steps, on however busy a machine
        while child.is_alive() and time.monotonic() - begun < 60 and last_step(run) < some: time.sleep(0.01)
        child.join(rng.uniform(0.0, 0.2))
        child.kill()
        child.join()
        newest = last_checkpoint(run)
        if newest: reached.append(int(newest.rsplit("-", 1)[1]))
        assert all(map(is_whole, run.glob("checkpoint-*")))
    assert reached == sorted(reached) and len({*reached}) > 3
    assert torch.equal(finish(run, epochs), expected)
    assert len(checkpoints_in(run)) <= 2 and not [o for o in run.iterdir() if o.name.startswith(".")]


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, None)])
def test_asked_to_stop(tmp_path, uninterrupted, capsys, number, code):
    "The step is finished and its checkpoint written, though none was due; the rest of the way leads to the same end."
    run, before = tmp_path / "run", signal.getsignal(number)
    with pytest.raises(SystemExit if code else KeyboardInterrupt) as left: trainer_in(run, [At(5, lambda: os.kill(os.getpid(), number))]).train()
    if code: assert left.value.code == code
    assert Path(last_checkpoint(run)).name == "checkpoint-5"
    assert "train(resume=True) goes on" in capsys.readouterr().out
    assert signal.getsignal(number) == before
    assert torch.equal(finish(run), uninterrupted)


def test_stopped_within_an_epoch(tmp_path, uninterrupted):
    "Where checkpoints are for ends of epochs: one is written all the same, once, and the break is not taken for an end."
    run, more = tmp_path / "run", dict(save_strategy="epoch", save_total_limit=None)
    with pytest.raises(KeyboardInterrupt): trainer_in(run, [At(5, lambda: os.kill(os.getpid(), signal.SIGINT))], **more).train()
    assert [o.name for o in checkpoints_in(run)] == ["checkpoint-5"]
    assert torch.equal(finish(run), uninterrupted)


def test_a_second_signal(tmp_path):
    "SIGTERM may come twice, as from a cluster and from torchrun; a second Ctrl-C stops at once."
    def both(): os.kill(os.getpid(), signal.SIGTERM); os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(SystemExit): trainer_in(tmp_path / "one", [At(5, both)]).train()
    assert Path(last_checkpoint(tmp_path / "one")).name == "checkpoint-5"
    def twice(): os.kill(os.getpid(), signal.SIGINT); os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt): trainer_in(tmp_path / "two", [At(5, twice)]).train()
    assert Path(last_checkpoint(tmp_path / "two")).name == "checkpoint-4"


def test_a_new_run_in_an_old_folder(tmp_path, capsys):
    "Its checkpoints are its own; the old ones are kept elsewhere. A checkpoint may be named; one that is not whole is not taken."
    run = tmp_path / "run"
    trainer_in(run, num_train_epochs=2).train()
    trainer_in(run, num_train_epochs=1).train()
    assert [o.name for o in checkpoints_in(run)] == ["checkpoint-6", "checkpoint-8"] and [o.name for o in checkpoints_in(run / "earlier-1")] == ["checkpoint-14", "checkpoint-16"]
    assert "earlier-1" in capsys.readouterr().out
    more = trainer_in(run, num_train_epochs=2)
    more.train(str(run / "checkpoint-6"))
    assert next(iter(more.history.column("loss")))[0] == 1 and more.state.global_step == 16
    (run / "checkpoint-16" / "model.safetensors").unlink()
    with pytest.raises(InputError, match="not a whole checkpoint"): trainer_in(run).train(str(run / "checkpoint-16"))


def test_a_full_disk(tmp_path, uninterrupted, capsys):
    "Files that may not grow: the checkpoint is given up and said so, the one before stays, training goes on."
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").write_text("{}\n" * 10_000)  # so that its next line does not fit either
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    fill, free = (lambda most=most: resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard)) for most in (20_000, soft))
    trainer = trainer_in(tmp_path / "run", [At(5, fill), At(13, free)], save_total_limit=None)
    try: trainer.train()
    finally: free()
    said = capsys.readouterr().out
    assert said.count("the checkpoint of step") == 4 and "step 6" in said and "step 12" in said  # 6, 8, 10 and 12
    assert [int(o.name[11:]) for o in checkpoints_in(tmp_path / "run")] == [2, 4, 14, 16, 18, 20, 22, 24]
    assert len([*(tmp_path / "run").glob("checkpoint-*")]) == 8 and "a line of log.jsonl could not be written" in said
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
