"LoRA and freezing through the whole line: packs, cached gradients, checkpoints, two processes, and a plain model at the end."
import json
import os
import signal
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import TrainerCallback

from nixietune.adapters import add_head, add_lora, freeze, has_adapter, load_adapter, merge_adapter, save_adapter, save_merged
from nixietune.arguments import TrainingArguments
from nixietune.checkpoints import last_checkpoint
from nixietune.core import InputError
from nixietune.display import hushed
from nixietune.encoder import check_layout, encode, layout_of, prepare
from nixietune.evaluation import evaluate
from nixietune.losses import CoSENT, InfoNCE
from nixietune.objectives import Objective
from nixietune.planning import plan
from nixietune.recipes import recipe
from nixietune.testing import tiny_model, toy_corpus, toy_groups
from nixietune.training import Trainer

torch.set_num_threads(1)
TEXTS = ["a red bird", "a small blue fish that lives near the town", "crimson winged one"]
BOTH = pytest.mark.parametrize("kind", ["bert", "qwen3"])


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch): monkeypatch.setenv("NIXIETUNE_CACHE", str(tmp_path / "cache"))


def vectors(model): return encode(model, TEXTS, progress=False)
def trained(model): return torch.cat([o.detach().flatten() for o in model.parameters() if o.requires_grad])
def moved(model):
    "The model, as if it had learned something."
    rng = torch.Generator().manual_seed(0)
    for o in model.parameters():
        if o.requires_grad: o.data += 0.2 * torch.randn(o.shape, generator=rng).to(o.dtype)
    return model


def trainer_for(model, folder, groups=None, callbacks=(), loss=None, **more):
    options = dict(precision="fp32", learning_rate=1e-2, per_device_train_batch_size=8, num_train_epochs=2, seed=1, logging_steps=1)
    dev = {name: more.pop(name) for name in ("dev", "corpus") if name in more}
    groups = toy_groups(24, negatives=1) if groups is None else groups
    return Trainer(model, TrainingArguments(str(folder), **{**options, **more}), groups, loss=loss or InfoNCE(0.05), callbacks=list(callbacks), **dev)


@pytest.mark.parametrize("kind, rate, epochs", [("bert", 1e-2, 20), ("qwen3", 5e-3, 10), ("gemma2", 5e-3, 12)])
def test_learns(tmp_path, kind, rate, epochs):
    "From chance to above 0.9 on queries it has not seen; the base is as it was, and merged it is as good."
    groups = toy_groups(180, negatives=1)
    train, test = groups.select(range(140)), groups.select(range(140, 180))
    model = add_lora(tiny_model(kind), rank=16, alpha=32, dropout=0.0)
    def measured(model): return evaluate(model, test, toy_corpus(), progress=False).metrics["ndcg@10"]
    assert measured(model) < 0.2
    trainer_for(model, tmp_path / "run", train, learning_rate=rate, per_device_train_batch_size=32, num_train_epochs=epochs).train()
    assert measured(model) > 0.9
    base = dict(tiny_model(kind).named_parameters())
    for name, o in model.named_parameters(): assert "lora_" in name or torch.equal(o, base[name.replace(".base_layer", "")]), name
    plain = SentenceTransformer(str(save_merged(model, tmp_path / "plain")), device="cpu")
    assert np.abs(plain.encode(TEXTS) - vectors(model)).max() < 1e-5
    assert np.abs(vectors(load_adapter(tiny_model(kind), save_adapter(model, tmp_path / "adapter"))) - vectors(model)).max() == 0
    assert measured(plain) > 0.9


@pytest.mark.parametrize("kind", ["bert", "electra", "distilbert", "roberta", "mpnet", "deberta-v2", "modernbert", "qwen3", "qwen2", "gemma2", "mistral", "llama"])
def test_every_architecture(tmp_path, kind):
    "LoRA on all its layers: packed is padded, merged is unmerged, and back from disk it is the same."
    model = moved(add_lora(tiny_model(kind), rank=3))
    expected = vectors(model)
    assert np.abs(expected - vectors(tiny_model(kind))).max() > 0.01
    assert check_layout(model) < 1e-5 and layout_of(model).name == layout_of(tiny_model(kind)).name
    assert np.abs(vectors(load_adapter(tiny_model(kind), save_adapter(model, tmp_path / "adapter"))) - expected).max() == 0
    assert np.abs(vectors(merge_adapter(model)) - expected).max() < 1e-5


@BOTH
def test_every_way_to_compute(tmp_path, kind):
    "Packed, bucketed, cached and checkpointed forwards lead to the same weights; the head behind is trained, too."
    ways = {"packed": {}, "bucketed": {"forward": "bucketed"}, "cached and checkpointed": {"cache_gradients": True, "tokens_per_forward": 60, "gradient_checkpointing": True}}
    if kind == "bert": ways |= {"cached": {"cache_gradients": True}, "checkpointed": {"gradient_checkpointing": True}}
    found = {}
    for name, options in ways.items():
        model = add_lora(add_head(tiny_model(kind), 16), rank=4, dropout=0.0, modules_to_save=["norm" if kind == "qwen3" else "embeddings.LayerNorm"])
        before, trainer = trained(model), trainer_for(model, tmp_path / name, num_train_epochs=1, learning_rate=1e-3, **options)
        trainer.train()
        assert trainer.source.layout.name == options.get("forward", "packed") and trainer.loss.cached == options.get("cache_gradients", False)
        found[name] = trained(model)
        assert (found[name] != before).float().mean() > 0.9
        plain = merge_adapter(deepcopy(model))
        assert np.abs(vectors(plain) - vectors(model)).max() < 1e-5 and not has_adapter(plain)
    for name, o in found.items(): assert (o - found["packed"]).abs().max() < 2e-5, name


class Interrupted(TrainerCallback):
    "Ctrl-C in a step."
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5: os.kill(os.getpid(), signal.SIGINT)


@BOTH
def test_resumed(tmp_path, kind):
    "Interrupted and resumed is not interrupted, bit for bit: adapter, modules beside it, head and temperature; with dropout."
    def run(name, callbacks=(), **more):
        model = add_lora(add_head(tiny_model(kind), 16), rank=4, modules_to_save=["norm"] if kind == "qwen3" else ["embeddings.LayerNorm"])
        loss = Objective([InfoNCE(0.1), CoSENT()], learn_temperature=True)
        return trainer_for(model, tmp_path / name, callbacks=callbacks, loss=loss, num_train_epochs=3, save_strategy="steps", save_steps=4, **more)
    whole = run("whole")
    whole.train()
    with pytest.raises(KeyboardInterrupt): run("broken", [Interrupted()]).train()
    place = Path(last_checkpoint(tmp_path / "broken"))
    assert place.name == "checkpoint-5" and not list(place.glob("model*.safetensors")), "a checkpoint holds the base, too"
    again = run("broken")
    again.train(resume=True)
    assert again.state.global_step == whole.state.global_step == 9
    for (name, one), (_, two) in zip(again.loss.named_parameters(), whole.loss.named_parameters(), strict=True): assert torch.equal(one, two), name
    other = add_lora(add_head(tiny_model(kind, seed=7), 16), rank=4, modules_to_save=["norm"] if kind == "qwen3" else ["embeddings.LayerNorm"])
    with pytest.raises(InputError, match="another base"): trainer_for(other, tmp_path / "broken", num_train_epochs=3).train(resume=True)
    with pytest.raises(InputError, match="no adapter"): trainer_for(add_head(tiny_model(kind), 16), tmp_path / "broken", num_train_epochs=3).train(resume=True)
    continued = load_adapter(add_head(tiny_model(kind), 16), last_checkpoint(tmp_path / "broken"))  # a checkpoint is an adapter's folder, too
    assert torch.equal(trained(continued), trained(again.model))


def test_the_best_at_the_end(tmp_path):
    "`load_best_model_at_end` puts the best checkpoint's adapter back."
    groups = toy_groups(32, negatives=1)
    class Spoil(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 7: moved(model)
    model = add_lora(tiny_model(), rank=8, dropout=0.0)
    trainer = trainer_for(model, tmp_path / "run", groups, [Spoil()], dev=groups, corpus=toy_corpus(), eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2,
        load_best_model_at_end=True, metric_for_best_model="ndcg@10")
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert int(best.name.split("-")[1]) <= 6
    assert torch.equal(trained(trainer.model), trained(load_adapter(tiny_model(), best)))
    scores = dict(trainer.history.column("eval_ndcg@10"))
    assert evaluate(model, groups, toy_corpus(), progress=False).metrics["ndcg@10"] == pytest.approx(scores[int(best.name.split("-")[1])])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_in_half_precision(tmp_path, dtype, capsys):
    "The base stays in it and the adapter is in float32; where something else is trained, everything is."
    model = add_lora(tiny_model("qwen3").to(dtype), rank=4)
    trainer_for(model, tmp_path / "run", num_train_epochs=1).train()
    assert {o.dtype for o in model.parameters() if o.requires_grad} == {torch.float32} and {o.dtype for o in model.parameters() if not o.requires_grad} == {dtype}
    merged = SentenceTransformer(str(save_merged(model, tmp_path / "merged")), device="cpu")
    assert {o.dtype for o in merged.parameters()} == {dtype}
    assert np.abs(merged.encode(TEXTS).astype(np.float32) - vectors(model)).max() < 3e-2
    assert np.abs(vectors(merge_adapter(deepcopy(model).float())) - vectors(deepcopy(model).float())).max() < 1e-5
    headed = add_lora(add_head(tiny_model().to(dtype), 16), rank=4)
    capsys.readouterr()
    trainer_for(headed, tmp_path / "headed", num_train_epochs=1).train()
    assert {o.dtype for o in headed.parameters()} == {torch.float32} and "are in float32 while they are trained" in capsys.readouterr().out


def test_what_others_read(tmp_path):
    "peft reads our adapters and we read those it wrote; a checkpoint loads in sentence-transformers where its base can be found."
    from peft import get_peft_model, LoraConfig, PeftModel
    with hushed():
        tiny_model().save_pretrained(str(tmp_path / "base"))
        base = lambda: SentenceTransformer(str(tmp_path / "base"), device="cpu")
        model = moved(add_lora(base(), rank=4, targets=["query", "word_embeddings"], modules_to_save=["embeddings.LayerNorm"]))
        expected, ids = vectors(model), {"input_ids": torch.tensor([[3, 7, 9]])}
        save_adapter(model, tmp_path / "adapter")
        theirs = PeftModel.from_pretrained(base()[0].auto_model, str(tmp_path / "adapter")).eval()
        assert torch.allclose(theirs(**ids).last_hidden_state, model[0].auto_model.eval()(**ids).last_hidden_state, atol=1e-6)
        model.save_pretrained(str(tmp_path / "st"))  # sentence-transformers' own way: the adapter, and where the base is
        assert np.abs(SentenceTransformer(str(tmp_path / "st"), device="cpu").encode(TEXTS) - expected).max() < 1e-5
        assert np.abs(vectors(load_adapter(base(), tmp_path / "st")) - expected).max() < 1e-5
        wrapped = get_peft_model(base()[0].auto_model, LoraConfig(r=3, target_modules=["query", "value"], init_lora_weights=False)).eval()
        wrapped.save_pretrained(str(tmp_path / "peft"))
        ours = load_adapter(base(), tmp_path / "peft")
    by_peft = base()
    by_peft[0].model = wrapped
    assert prepare(by_peft).name == "packed" and check_layout(by_peft) < 1e-5 and np.abs(vectors(by_peft) - vectors(ours)).max() < 1e-5
    for refused in (add_lora, merge_adapter):
        with pytest.raises(InputError, match="wrapped by peft"): refused(by_peft)
    assert torch.allclose(wrapped(**ids).last_hidden_state, ours[0].auto_model.eval()(**ids).last_hidden_state, atol=1e-6)


@pytest.mark.parametrize("spoil, said", [
    (lambda o: (o / "adapter_config.json").write_text("{"), "cannot be read"),
    (lambda o: (o / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3", "target_modules": ["key"], "feedforward_modules": []})), "of type IA3"),
    (lambda o: (o / "adapter_config.json").unlink(), "no adapter_config.json"),
    (lambda o: (o / "adapter_model.safetensors").rename(o / "adapter_model.bin"), "pickle"),
    (lambda o: (o / "adapter_config.json").write_text((o / "adapter_config.json").read_text().replace('"r": 4', '"r": 5')), "size mismatch"),
    (lambda o: (o / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "target_modules": ["query"]})), "only in the folder"),
    (lambda o: (o / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "target_modules": ["nothing"]})), "does not fit"),
])
def test_bad_folders(tmp_path, spoil, said):
    "One clear error each, and the model is as it was."
    folder, model = save_adapter(add_lora(tiny_model(), rank=4), tmp_path / "adapter"), tiny_model()
    spoil(folder)
    with pytest.raises(InputError, match=said): load_adapter(model, folder)
    assert not has_adapter(model) and all(o.requires_grad for o in model.parameters()) and [*dict(model.named_parameters())] == [*dict(tiny_model().named_parameters())]
    add_lora(model, rank=2)


def test_plain_needs_no_peft(tmp_path):
    "A merged model loads and encodes where peft is not installed."
    folder = save_merged(moved(add_lora(add_head(tiny_model("qwen3"), 16), rank=4)), tmp_path / "plain")
    blocked = "class No:\n    def find_spec(self, name, *_):\n        if name.split('.')[0] in ('peft', 'nixietune'): raise ModuleNotFoundError(name)\nimport sys; sys.meta_path.insert(0, No())\n"
    code = blocked + "import importlib.util as u; u.find_spec = (lambda f: lambda n, *a: None if n.startswith('peft') else f(n, *a))(u.find_spec)\n" + \
        f"from sentence_transformers import SentenceTransformer\nprint(SentenceTransformer({str(folder)!r}, device='cpu').encode(['a']).shape)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "(1, 16)" in done.stdout, done.stderr[-2000:]
    assert not any(o.name.startswith("adapter") for o in folder.rglob("*"))


def test_without_peft(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"nixietune\[lora\]"): add_lora(tiny_model())


def test_the_plan_counts_what_is_trained(tmp_path):
    args, groups, model = TrainingArguments(str(tmp_path)), toy_groups(16), add_lora(tiny_model(), rank=2)
    whole, small = (plan(o, groups, args, timed=False).memory for o in (tiny_model(), model))
    assert small["fixed"] == 16 * len(trained(model)) < whole["fixed"] / 5


def test_the_recipe():
    assert recipe(add_lora(tiny_model("modernbert"), rank=2)).learning_rate == 1e-4
    assert recipe(merge_adapter(add_lora(tiny_model(), rank=2))).learning_rate == recipe(tiny_model()).learning_rate


def test_frozen(tmp_path):
    "What is frozen stays as it is, the rest moves, also where layers below have no gradients and activations are computed again."
    for checkpointing in (False, True):
        model, base = tiny_model(), dict(tiny_model().named_parameters())
        freeze(model, "embeddings", r"layer\.0\.")
        trainer_for(model, tmp_path / str(checkpointing), num_train_epochs=1, gradient_checkpointing=checkpointing).train()
        for name, o in model.named_parameters():
            if "pooler" not in name: assert torch.equal(o, base[name]) == ("embeddings" in name or "layer.0." in name), name
    with pytest.raises(InputError, match="nothing is trained"): trainer_for(tiny_model().requires_grad_(False), tmp_path / "none")
    model = add_lora(tiny_model(), rank=2)
    model[0].auto_model.embeddings.requires_grad_(True)
    with pytest.raises(InputError, match="would not be saved"): trainer_for(model, tmp_path / "lost")


def test_merged_after_gradient_checkpointing(tmp_path):
    "What checkpointing hooked into the model for its adapter is gone after merging, from a copy, too; then it is trained whole."
    model = add_lora(tiny_model(), rank=4, dropout=0.0)
    trainer_for(model, tmp_path / "first", num_train_epochs=1, gradient_checkpointing=True).train()
    plain = merge_adapter(deepcopy(model))
    assert has_adapter(model) and np.abs(vectors(plain) - vectors(model)).max() < 1e-5
    with torch.no_grad(): assert not plain[0].auto_model.get_input_embeddings()(torch.tensor([1])).requires_grad
    before = vectors(plain)
    trainer_for(plain, tmp_path / "second", num_train_epochs=1, learning_rate=1e-3).train()
    assert np.abs(vectors(plain) - before).max() > 1e-3


def asking():
    "A model with a head, LoRA, and a special token before each query."
    return add_lora(add_head(tiny_model("qwen3", prompts={"query": "<query>"}), 16), rank=4, dropout=0.0, tokens=["<query>"])


def ddp_run(folder, name, batch_size):
    model = asking()
    trainer = trainer_for(model, f"{folder}/{name}", per_device_train_batch_size=batch_size, num_train_epochs=1, tokens_per_forward=60, gradient_checkpointing=True)
    trainer.train()
    return trained(model)


def test_two_processes(tmp_path, monkeypatch):
    "Under torchrun, with DDP: the weights of one process with batches of both."
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    alone = ddp_run(tmp_path, "alone", 8)
    assert torch.equal(one, two) and (one - alone).abs().max() < 1e-4
    assert (alone - trained(asking())).abs().max() > 1e-2


if __name__ == "__main__":
    torch.save(ddp_run(sys.argv[1], "two", 4), f"{sys.argv[1]}/{os.environ['RANK']}.pt")
