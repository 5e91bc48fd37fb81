"Mining while training: other negatives every epoch, and a resumed run sees the ones that it would have seen."
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


def trainer_in(folder, stop=None, **options):
    "Three epochs of three steps, with dropout; negatives are drawn, two of four."
    args = nt.TrainingArguments(str(folder), num_train_epochs=3, per_device_train_batch_size=8, learning_rate=5e-3, precision="fp32", save_strategy="steps", save_steps=1, train_group_size=3, seed=1)
    trainer = nt.Trainer(nt.tiny_model(hidden_dropout_prob=0.1), args, nt.toy_groups(24, negatives=1))
    trainer.add_callback(nt.Remine(trainer, nt.toy_corpus(), number=4, relative=None, **options))
    if stop: trainer.add_callback(StopAt(stop))
    return trainer


def weights(trainer): return torch.cat([o.detach().flatten() for o in trainer.model.parameters()])


@pytest.mark.parametrize("stop", [3, 4, 6, 7])
def test_a_resumed_run_ends_the_same(tmp_path, stop):
    "Stopped at the end of an epoch or within one; the weights are equal, bit by bit."
    with nt.quiet():
        whole = trainer_in(tmp_path / "whole")
        whole.train()
        trainer_in(tmp_path / "two", stop).train()
        rest = trainer_in(tmp_path / "two")
        rest.train(resume=True)
    assert rest.state.global_step == whole.state.global_step == 9
    assert torch.equal(weights(whole), weights(rest))


def test_negatives_change_and_old_ones_go(tmp_path):
    "Given negatives stay; a new run in the folder leaves nothing of the old one."
    kept(tmp_path, 7).parent.mkdir(parents=True)
    kept(tmp_path, 7).write_text("of an earlier run")
    with nt.quiet():
        trainer = trainer_in(tmp_path, every_epochs=2)
        trainer.train()
    assert [o.name for o in sorted((tmp_path / "mined").iterdir())] == ["epoch-2.arrow"]
    from nixietune.tables import read_arrow
    groups, mined = nt.toy_groups(24, negatives=1), read_arrow(kept(tmp_path, 2))
    assert [neg[0] for neg in mined["neg"][:]] == [neg[0] for neg in groups["neg"][:]] and all(len(neg) == 5 for neg in mined["neg"][:])
    assert len(trainer.texts[1]) > len({o["doc"] for side in ("pos", "neg") for items in groups[side][:] for o in items})


def test_what_is_lost_is_said(tmp_path, capsys):
    with nt.quiet(): trainer_in(tmp_path, 4).train()
    kept(tmp_path, 1).unlink()
    trainer_in(tmp_path).train(resume=True)
    assert "epoch-1.arrow is not there" in capsys.readouterr().out


def test_what_is_refused(tmp_path):
    with nt.quiet(): trainer = trainer_in(tmp_path)
    with pytest.raises(InputError, match="every_epochs"): nt.Remine(trainer, every_epochs=0)
    with pytest.raises(InputError, match="the same groups"): exchange(trainer, nt.toy_groups(5))
    trainer.args.dataloader_persistent_workers = True
    with pytest.raises(InputError, match="persistent"): nt.Remine(trainer)
