"Mining while training: other negatives every epoch or every few steps, and a resumed run sees the ones that it would have seen."
import pytest
import torch
from transformers import TrainerCallback

import nixietune as nt
from nixietune.core import InputError
from nixietune.remining import exchange, kept

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch): monkeypatch.setenv("NIXIETUNE_CACHE", str(tmp_path / "cache"))


class StopAt(TrainerCallback):
    def __init__(self, step): self.step = step
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step: control.should_training_stop = control.should_save = True


def trainer_in(folder, stop=None, accumulate=1, **options):
    "Three epochs of three steps, with dropout; negatives are drawn, two of four."
    args = nt.TrainingArguments(str(folder), num_train_epochs=3, per_device_train_batch_size=8//accumulate, gradient_accumulation_steps=accumulate, learning_rate=5e-3, precision="fp32", save_strategy="steps", save_steps=1, train_group_size=3, seed=1)
    trainer = nt.Trainer(nt.tiny_model(hidden_dropout_prob=0.1), args, nt.toy_groups(24, negatives=1))
    trainer.add_callback(nt.Remine(trainer, nt.toy_corpus(), number=4, relative=None, **options))
    if stop: trainer.add_callback(StopAt(stop))
    return trainer


def weights(trainer): return torch.cat([o.detach().flatten() for o in trainer.model.parameters()])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "A run that nothing interrupted, by its options; each is made once."
    made = {}
    def run(**options):
        if (key := str(options)) not in made:
            made[key] = trainer_in(tmp_path_factory.mktemp("whole"), **options)
            made[key].train()
        return made[key]
    return run


@pytest.mark.parametrize("stop", [3, 4, 6, 7])
def test_a_resumed_run_ends_the_same(tmp_path, whole, stop):
    "Stopped at the end of an epoch or within one; the weights are equal, bit by bit."
    with nt.quiet():
        whole = whole()
        trainer_in(tmp_path / "two", stop).train()
        rest = trainer_in(tmp_path / "two")
        rest.train(resume=True)
    assert rest.state.global_step == whole.state.global_step == 9
    assert torch.equal(weights(whole), weights(rest))


@pytest.mark.parametrize("stop, accumulate", [(2, 1), (3, 2), (4, 2), (5, 1), (6, 1)])
def test_within_an_epoch_too(tmp_path, whole, stop, accumulate):
    "Mined every two steps: after a step of mining, the one behind it, and at the end of an epoch."
    with nt.quiet():
        whole = whole(accumulate=accumulate, every_steps=2)
        trainer_in(tmp_path / "two", stop, accumulate, every_steps=2).train()
        rest = trainer_in(tmp_path / "two", accumulate=accumulate, every_steps=2)
        rest.train(resume=True)
    assert {o.name for o in (tmp_path / "two/mined").iterdir()} == {f"step-{o}.arrow" for o in (2, 4, 6, 8)}
    assert torch.equal(weights(whole), weights(rest))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_which_batch_reads_which_negatives(tmp_path, accumulate):
    "What is mined after step 2 is read from step 4 on, by every micro-batch of it; errors name texts of the right source."
    seen = []
    with nt.quiet(): trainer = trainer_in(tmp_path, accumulate=accumulate, every_steps=2)
    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs): seen.append((state.global_step, read[-accumulate:]))
    read, inner = [], trainer.compute_loss
    def compute_loss(model, inputs, *args, **kwargs):
        read.append(trainer.source.of(inputs["key"]).arrays.doc.max())
        trainer._without_numbers(inputs)
        return inner(model, inputs, *args, **kwargs)
    trainer.compute_loss = compute_loss
    trainer.add_callback(Look())
    with nt.quiet(): trainer.train()
    first = seen[0][1][0]
    assert [set(o) == {first} for _, o in seen[:5]] == [True, True, True, False, False]


def test_negatives_change_and_old_ones_go(tmp_path):
    "Given negatives stay; a new run in the folder leaves nothing of the old one."
    kept(tmp_path, "epoch", 7).parent.mkdir(parents=True)
    kept(tmp_path, "epoch", 7).write_text("of an earlier run")
    with nt.quiet():
        trainer = trainer_in(tmp_path, every_epochs=2)
        trainer.train()
    assert [o.name for o in sorted((tmp_path / "mined").iterdir())] == ["epoch-2.arrow"]
    from nixietune.tables import read_arrow
    groups, mined = nt.toy_groups(24, negatives=1), read_arrow(kept(tmp_path, "epoch", 2))
    assert [neg[0] for neg in mined["neg"][:]] == [neg[0] for neg in groups["neg"][:]] and all(len(neg) == 5 for neg in mined["neg"][:])
    assert len(trainer.texts[1]) > len({o["doc"] for side in ("pos", "neg") for items in groups[side][:] for o in items})


def test_what_is_lost_is_said(tmp_path, capsys):
    with nt.quiet(): trainer_in(tmp_path, 4).train()
    kept(tmp_path, "epoch", 1).unlink()
    trainer_in(tmp_path).train(resume=True)
    assert "epoch-1.arrow is not there" in capsys.readouterr().out


def test_what_is_refused(tmp_path):
    with nt.quiet(): trainer = trainer_in(tmp_path)
    with pytest.raises(InputError, match="every_epochs"): nt.Remine(trainer, every_epochs=0)
    with pytest.raises(InputError, match="every_steps=-1"): nt.Remine(trainer, every_steps=-1)
    with pytest.raises(InputError, match="one of them"): nt.Remine(trainer, every_steps=1, every_epochs=1)
    trainer.args.dataloader_num_workers = 2
    with pytest.raises(InputError, match="workers"): nt.Remine(trainer, every_steps=1)
    with pytest.raises(InputError, match="the same groups"): exchange(trainer, nt.toy_groups(5))
    trainer.args.dataloader_persistent_workers = True
    with pytest.raises(InputError, match="persistent"): nt.Remine(trainer)
