"Training learns, resumes exactly, stops before it breaks, takes any model, and saves what plain sentence-transformers loads."
import importlib.util
import json
import logging
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import BoW, Dense, Normalize, Pooling, Router, StaticEmbedding, WordEmbeddings
from sentence_transformers.sentence_transformer.modules.tokenizer import WhitespaceTokenizer
from transformers import TrainerCallback

from nixietune.checkpoints import last_checkpoint
from nixietune.batching import BatchKey, index_groups, KeySampler, Source
from nixietune.core import InputError
from nixietune.encoder import encode, layout_of, prepare, set_max_length
from nixietune.evaluation import evaluate
from nixietune.experiments import finetune
from nixietune.groups import make_groups
from nixietune.losses import Contrastive, CoSENT, InfoNCE, KL, Terms
from nixietune.objectives import Objective
from nixietune.pool import dev_pool
from nixietune.relation import relate
from nixietune.similarities import cos
from nixietune.testing import tiny_model, toy_corpus, toy_groups
from nixietune.training import Trainer, TrainingArguments

torch.set_num_threads(1)  # tiny tensors: a second thread only waits
PROMPTS = {"query": "a b c d: ", "document": "e f: "}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch): monkeypatch.setenv("NIXIETUNE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def make(tmp_path):
    "Makes a trainer that is about to learn the toy problem."
    def make(model=None, groups=None, folder="run", loss=None, dev=None, corpus=None, callbacks=None, **args):
        options = dict(learning_rate=5e-3, per_device_train_batch_size=16, num_train_epochs=1, precision="fp32", seed=1, logging_steps=1)
        args = TrainingArguments(str(tmp_path / folder), **{**options, **args})
        return Trainer(model or tiny_model(), args, groups or toy_groups(64), dev=dev, corpus=corpus, loss=loss or InfoNCE(0.1), callbacks=callbacks)
    return make


def weights(model): return {name: o.detach().clone() for name, o in model.named_parameters()}
def losses(trainer): return [o["loss"] for o in trainer.state.log_history if "loss" in o]
def moved(before, after): return {name for name, o in before.items() if not torch.equal(o, after[name])}


def vocabulary(): return sorted({word for o in toy_groups(180) for text in (o["query"], o["pos"][0]["doc"]) for word in text.split()})


class Watch(TrainerCallback):
    "Counts steps, and dies at one of them, as a machine does."
    def __init__(self, die_at=None): self.steps, self.die_at = 0, die_at
    def on_step_end(self, args, state, control, **kwargs):
        self.steps += 1
        if state.global_step == self.die_at: raise MemoryError("the machine is gone")


def test_learns(make):
    "Every weight that the vectors depend on moves, the loss falls, the log is the trainer's own, callbacks are called."
    watch, model = Watch(), tiny_model()
    trainer = make(model, num_train_epochs=4, callbacks=[watch], dev=toy_groups(20, seed=1), corpus=toy_corpus(),
                   eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True, metric_for_best_model="ndcg@10")
    before = weights(model)
    assert trainer.train().global_step == watch.steps == 16
    untouched = before.keys() - moved(before, weights(model))
    assert {name.split(".")[2] for name in untouched} == {"pooler"}  # mean pooling does not read it
    assert np.mean(losses(trainer)[-4:]) < np.mean(losses(trainer)[:4]) - 0.3
    assert {"loss", "grad_norm", "learning_rate", "epoch", "step"} <= next(o for o in trainer.history if "loss" in o).keys()
    at, scores = zip(*trainer.history.column("eval_ndcg@10"))
    assert at == (0, 4, 8, 12, 16) and max(scores) == trainer.state.best_metric > scores[0]  # the first is the baseline
    assert trainer.facts["pairs"] == 4 * 64 and trainer.facts["real"] == trainer.facts["computed"] < trainer.facts["padded"]


def test_dev_is_a_fixed_pool(make, capsys):
    "The baseline is measured on the same queries and documents as what follows, whatever the seed, and what was left out is said."
    dev, corpus = toy_groups(20, seed=1), toy_corpus()
    model = tiny_model()
    pool, documents, note = dev_pool(dev, corpus, 8, 60)
    before = evaluate(model, pool, documents, progress=False).metrics["ndcg@10"]
    trainer = make(model, dev=dev, corpus=corpus, eval_strategy="epoch", dev_queries=8, dev_documents=60, seed=3)
    said = capsys.readouterr()
    assert note in said.out + said.err and "8 of 20 queries and 60 of 180 documents" in note
    trainer.train()
    found = trainer.history.column("eval_ndcg@10")
    assert len(found) == 2 and trainer.bar.baseline == found[0][1] == pytest.approx(before, abs=1e-6)
    assert found[1][1] == pytest.approx(evaluate(model, pool, documents, progress=False).metrics["ndcg@10"], abs=1e-6)
    trainer = make(dev=dev, corpus=corpus, eval_strategy="epoch")  # small enough as it is
    assert trainer.evaluator.groups is dev and trainer.evaluator.corpus is corpus and not trainer.evaluator.note


class Scaled(Objective):
    "InfoNCE whose temperature is learned."
    def __init__(self):
        super().__init__(InfoNCE(1.0))
        self.scale = torch.nn.Parameter(torch.tensor(2.0))

    def forward(self, q, d, batch): return {"InfoNCE": InfoNCE(1.0)(cos(q, d) * self.scale.exp(), relate(batch))}


def test_an_objective_may_learn(make):
    "A parameter of the objective is registered, gets a gradient and moves."
    objective = Scaled()
    trainer = make(loss=objective)
    seen = []
    objective.scale.register_hook(lambda grad: seen.append(grad.item()))
    trainer.train()
    assert len(seen) == 4 and all(seen) and objective.scale.item() != 2.0


@pytest.mark.parametrize("save_steps, die_at, more", [
    (3, 5, {}),  # in the first epoch
    (3, 7, {"dataloader_num_workers": 2}),  # in the second, with batches made by workers
    (4, 5, {"forward": "bucketed"}),  # between two epochs
    (2, 3, {"gradient_accumulation_steps": 2, "dataloader_num_workers": 2, "dataloader_persistent_workers": True}),  # accumulated, with workers that stay
])
def test_resumed_equals_uninterrupted(make, save_steps, die_at, more):
    "Bit for bit, with dropout, with positives and negatives drawn anew each epoch, after a death between two checkpoints."
    def run(folder, resume=False, **args):
        model = tiny_model(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
        trainer = make(model, toy_groups(64, negatives=3), folder, num_train_epochs=2, train_group_size=2, **more, **args)
        trainer.train(resume=resume)
        return trainer

    whole = run("whole")
    with pytest.raises(MemoryError): run("cut", save_strategy="steps", save_steps=save_steps, callbacks=[Watch(die_at)])
    found = last_checkpoint(whole.args.output_dir.replace("whole", "cut"))
    assert Path(found).name == f"checkpoint-{die_at - die_at % save_steps}"
    Path(found).with_name("checkpoint-9").mkdir()  # a checkpoint that was never finished
    resumed = run("cut", resume=True, save_strategy="steps", save_steps=save_steps)
    assert resumed.state.global_step == whole.state.global_step
    assert losses(resumed) == losses(whole)
    assert not moved(weights(whole.model), weights(resumed.model))
    assert moved(weights(whole.model), weights(run("other", seed=2).model))  # draws do matter


def test_checkpoints_are_models(make, tmp_path):
    "A checkpoint loads in sentence-transformers; the last one is the trained model."
    trainer = make(save_strategy="steps", save_steps=2)
    trainer.train()
    assert last_checkpoint(tmp_path / "run").endswith("checkpoint-4")
    texts = toy_corpus()["text"][:8]
    vectors = [SentenceTransformer(str(tmp_path / "run" / f"checkpoint-{n}"), device="cpu").encode_document(texts) for n in (2, 4)]
    expected = encode(trainer.model, texts, progress=False)
    assert np.abs(vectors[1] - expected).max() < 1e-5 < np.abs(vectors[0] - expected).max()


@pytest.mark.parametrize("batch, accumulate", [(16, 3), (8, 5)])
def test_accumulation_weighs_by_queries(make, capsys, batch, accumulate):
    "With own negatives only, 16 + 16 + 8 queries make the step of 40 at once; the pool of in-batch negatives is said to stay small."
    def one_step(size, times):
        trainer = make(tiny_model(), toy_groups(40, negatives=2), f"run{size}", InfoNCE(0.1, in_batch=False), learning_rate=0.5, optim="sgd",
                       warmup_steps=0, max_grad_norm=0.0, per_device_train_batch_size=size, gradient_accumulation_steps=times)
        before = weights(trainer.model)
        assert trainer.train().global_step == 1
        return losses(trainer), before, weights(trainer.model)

    (at_once,), before, expected = one_step(40, 1)
    assert "accumulated" not in capsys.readouterr().out
    (added_up,), _, found = one_step(batch, accumulate)
    assert "do not enlarge the pool of in-batch negatives" in capsys.readouterr().out
    assert added_up == pytest.approx(at_once, abs=1e-4)
    far = torch.cat([(expected[o] - before[o]).flatten() for o in before]).norm()
    off = torch.cat([(expected[o] - found[o]).flatten() for o in before]).norm()
    assert far > 0.01 and off < 1e-4 * far


def test_what_is_left_of_a_run(make, tmp_path):
    "A history that shows itself, and the same lines on disk."
    trainer = make(tiny_model(), num_train_epochs=2, dev=toy_groups(20, seed=1), corpus=toy_corpus(), eval_strategy="epoch", gradient_accumulation_steps=2)
    trainer.train()
    lines = [json.loads(o) for o in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert lines == json.loads(json.dumps(list(trainer.history))) and {"loss", "padding", "tokens_per_second", "step"} <= lines[2].keys()
    assert all(o["padding"] == 0 for o in lines if "padding" in o)
    assert len(trainer.history.column("loss")) == 4 and "eval_ndcg@10" in repr(trainer.history) and "<table" in trainer.history._repr_html_()
    assert trainer.history.plot().get_ylabel() == "loss"
    with pytest.raises(InputError, match="nothing was logged as 'los'; expected .*loss"): trainer.history.plot("los")


@pytest.mark.parametrize("loss, problem", [(InfoNCE, "is no loss of ours"), ("InfoNCE", "is no loss of ours"), ([KL()], "KL finds nothing to learn from: none of 64 groups has two scores of a teacher"),
    ([InfoNCE(), {}], "is no loss of ours"), ({"loss": InfoNCE()}, "another name")])
def test_losses_that_cannot_be(make, loss, problem):
    with pytest.raises(InputError, match=problem): make(tiny_model(), loss=loss)


def test_what_a_loss_will_not_read_is_said(make, capsys):
    rows = [{"query": o["query"], "pos": [{"doc": i["doc"], "score": 3.0} for i in o["pos"]], "neg": [{"doc": i["doc"], "score": 0.0} for i in o["neg"]]} for o in toy_groups(24)]
    make(tiny_model(), make_groups(rows, "nixietune"), loss={"a": Contrastive(online=True), "b": InfoNCE(weighted=True)})
    said = capsys.readouterr().out
    assert "a wants grades between 0 and 1; they are between 0 and 3" in said and "24 others are not read" in said and "positives_per_query=1 leaves one" in said


def test_parts_are_logged_as_their_sum_is(make):
    "With accumulation, too."
    for accumulate in (1, 3):
        trainer = make(tiny_model(), loss=[InfoNCE(0.1), CoSENT(), InfoNCE(0.2, in_batch="negatives")], gradient_accumulation_steps=accumulate, num_train_epochs=2)
        trainer.train()
        for o in trainer.state.log_history[:-1]: assert o["loss"] == pytest.approx(o["InfoNCE"] + o["CoSENT"] + o["InfoNCE 2"], abs=1e-3)


class Breaks:
    "A loss that is not a number in some of its calls."
    view, similarity = "all", "cos"
    def __init__(self, what, calls): self.what, self.calls, self.n = what, calls, 0
    def __call__(self, similarities, relation):
        self.n += 1
        return self.broken(similarities, InfoNCE(0.1)(similarities, relation)) if self.n in self.calls else InfoNCE(0.1)(similarities, relation)
    def broken(self, similarities, terms): return Terms(terms.value * float(self.what), terms.weight)


class Steep(Breaks):
    "A loss that stays finite while its gradient does not: the root of zero."
    def broken(self, similarities, terms): return Terms(terms.value + (0 * similarities).sum(1).abs().sqrt(), terms.weight)


@pytest.mark.parametrize("what", ["nan", "inf"])
@pytest.mark.parametrize("more", [{}, {"gradient_accumulation_steps": 3}], ids=["", "accumulated"])
def test_a_loss_that_is_never_a_number_stops(make, what, more):
    "The third time in a row; the weights are whole."
    trainer = make(tiny_model(), loss=Breaks(what, range(1, 999)), num_train_epochs=4, **more)
    before = weights(trainer.model)
    with pytest.raises(FloatingPointError, match=f"step 3: the loss is {what}, all vectors are numbers; the batch begins with '.*third time in a row.*learning rate"): trainer.train()
    assert all(torch.equal(o, before[name]) for name, o in weights(trainer.model).items())


@pytest.mark.parametrize("loss, said", [(Breaks, "the loss is nan"), (Steep, "a gradient is not a number")])
def test_a_step_that_is_not_a_number_is_left_out(make, capsys, loss, said):
    "And nothing else: its weights are those of the step before."
    seen = []
    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs): seen.append(torch.cat([o.detach().flatten() for o in model.parameters()]))
    trainer = make(tiny_model(), loss=loss("nan", [2]), num_train_epochs=4, logging_steps=1, callbacks=[Look()])
    trainer.train()
    assert torch.equal(seen[0], seen[1]) and all(not torch.equal(a, b) for a, b in zip(seen[1:], seen[2:]))
    assert f"step 2 is left out, nothing was updated by it: {said}" in capsys.readouterr().out
    assert trainer.skipping.total == 1 and all(torch.isfinite(o).all() for o in trainer.model.parameters())
    logged = losses(trainer)
    assert all(0 < o < 10 for o in logged) and (loss is Steep or logged[1] == logged[0])


def test_texts_whose_vectors_are_no_numbers_are_named(make, capsys):
    trainer = make(tiny_model(), num_train_epochs=4)
    word = next(iter(trainer.model.tokenizer("winged", add_special_tokens=False)["input_ids"]))
    with torch.no_grad(): trainer.model[0].auto_model.embeddings.word_embeddings.weight[word] = float("nan")
    with pytest.raises(FloatingPointError, match="texts are no numbers, among them '.*winged"): trainer.train()


@pytest.mark.parametrize("limit, more", [(60, {}), (60, {"gradient_accumulation_steps": 2}), (1_000, {})], ids=["", "accumulated", "backward"])
def test_out_of_memory(make, capsys, monkeypatch, limit, more):
    "The same batches in smaller pieces: the run ends with the same weights."
    whole = make(tiny_model(), num_train_epochs=2, tokens_per_forward=400, **more)
    whole.train()
    trainer = make(tiny_model(), num_train_epochs=2, tokens_per_forward=400, **more)
    encoder, forward, calls = trainer.model[0].auto_model, trainer.model[0].auto_model.forward, []

    def narrow(*args, input_ids=None, **kwargs):
        calls.append(input_ids.numel())
        if input_ids.numel() > limit and len(calls) > 4: raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(*args, input_ids=input_ids, **kwargs)
    monkeypatch.setattr(encoder, "forward", narrow)
    if limit == 1_000:  # in the middle of the backward pass of the third step
        def fails_once(gradient):
            calls.append("backward")
            if calls.count("backward") == 3: raise torch.OutOfMemoryError("CUDA out of memory")
        encoder.embeddings.word_embeddings.weight.register_hook(fails_once)
    trainer.train()
    said = capsys.readouterr().out
    assert "gradients are cached: each forward runs twice" in said and ("forwards of at most 50 tokens" in said) == (limit == 60)
    assert trainer.args.train_batch_size == whole.args.train_batch_size and trainer.facts["pairs"] == whole.facts["pairs"]
    for name, o in weights(whole.model).items(): assert torch.allclose(o, weights(trainer.model)[name], atol=1e-4), name


def test_out_of_memory_with_nothing_left_to_divide(make, monkeypatch):
    trainer = make(tiny_model(), num_train_epochs=1, tokens_per_forward=100)
    def never(*args, **kwargs): raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(trainer.model[0].auto_model, "forward", never)
    monkeypatch.setattr("nixietune.training.check_layout", lambda model, precision: None)
    with pytest.raises(InputError, match="a smaller batch, shorter texts, or a smaller model"): trainer.train()


def test_a_teacher_is_heard_without_being_asked(make, capsys):
    "Scores in the groups, no loss: InfoNCE and KL, at a temperature that fits the scores."
    rows = [{"query": o["query"], "pos": [i["doc"] for i in o["pos"]], "neg": [i["doc"] for i in o["neg"]], "pos_scores": [0.9], "neg_scores": [0.2]} for o in toy_groups(24)]
    trainer = Trainer(tiny_model(), make(tiny_model()).args, make_groups(rows, "bge"))
    trainer.train()
    assert list(trainer.loss.objective.losses) == ["InfoNCE", "KL"] and "loss: KL(temperature=0.05, teacher_temperature=0.05" in capsys.readouterr().out
    make(tiny_model(), make_groups(rows, "bge"), loss=KL(), num_train_epochs=1)
    assert "lie only 0.7 apart: at teacher_temperature=1, KL takes them all for nearly the same" in capsys.readouterr().out


def wordllama():
    "A static model from the weights that the package wordllama carries."
    pytest.importorskip("wordllama")
    from safetensors.torch import load_file
    from tokenizers import Tokenizer
    folder = Path(importlib.util.find_spec("wordllama").origin).parent
    (table,) = load_file(next(folder.glob("weights/*.safetensors"))).values()
    module = StaticEmbedding(Tokenizer.from_file(str(next(folder.glob("tokenizers/*.json")))), embedding_weights=table.float())
    return SentenceTransformer(modules=[module], device="cpu")


def word_embeddings():
    words, torch_seed = vocabulary(), torch.manual_seed(0)
    module = WordEmbeddings(WhitespaceTokenizer(words, stop_words=()), torch.randn(len(words), 16, generator=torch_seed), update_embeddings=True)
    return SentenceTransformer(modules=[module, Pooling(16), Normalize()], device="cpu")


def bag_of_words():
    torch.manual_seed(0)
    words = vocabulary()
    return SentenceTransformer(modules=[BoW(words), Dense(len(words), 16)], device="cpu")


def router():
    torch.manual_seed(0)
    parts = [[StaticEmbedding(tiny_model()[0].tokenizer, embedding_dim=16)] for _ in "qd"]
    return SentenceTransformer(modules=[Router.for_query_document(*parts), Normalize()], device="cpu")


@pytest.mark.parametrize("build, layout, said, rate", [
    (wordllama, "bag", "", 0.01),
    (lambda: tiny_model("static"), "bag", "", 0.1),
    (lambda: tiny_model("mpnet"), "bucketed", "padded batches: mpnet", 5e-3),
    (word_embeddings, "text", "WordEmbeddings has no transformer", 0.05),
    (bag_of_words, "text", "BoW has no transformer", 0.05),
    (router, "text", "Router has no transformer", 0.1),
], ids=["wordllama", "static", "mpnet", "WordEmbeddings", "BoW", "Router"])
def test_any_model(make, capsys, tmp_path, build, layout, said, rate):
    "Whatever sentence-transformers encodes goes through the same trainer, gets better, and is the same after saving."
    model = build()
    queries, documents = toy_groups(64)["query"], [o[0]["doc"] for o in toy_groups(64)["pos"]]
    assert np.abs(encode(model, queries, "query", progress=False) - model.encode_query(queries)).max() < 1e-5
    before = weights(model)
    trainer = make(model, num_train_epochs=3, learning_rate=rate)
    trainer.train()
    assert trainer.source.layout.name == layout and said in capsys.readouterr().out
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.1
    assert len(moved(before, weights(model))) >= (2 if build is router else 1)
    model.save_pretrained(str(tmp_path / "saved"))
    saved = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    for role, texts in (("query", queries), ("document", documents)):
        assert np.abs(encode(model, texts, role, progress=False) - getattr(saved, f"encode_{role}")(texts)).max() < 1e-5


@pytest.mark.parametrize("include_prompt", [True, False])
def test_layouts_train_alike(make, include_prompt):
    "Packed, bucketed and padded take the same steps, with prompts inside and outside the pooling."
    found = {}
    for forward in ("packed", "bucketed", "padded"):
        trainer = make(tiny_model(prompts=PROMPTS, include_prompt=include_prompt), folder=forward, forward=forward)
        trainer.train()
        found[forward] = losses(trainer)
        assert trainer.source.layout.name == forward
    assert len(found["padded"]) == 4 and found["padded"][-1] < found["padded"][0]
    for forward in ("packed", "bucketed"): assert found[forward] == pytest.approx(found["padded"], abs=1e-3)


def test_other_data_is_refused(make, capsys):
    "A run goes on only with the groups that it began with; another batch size is said."
    more = dict(save_strategy="steps", save_steps=2)
    with pytest.raises(MemoryError): make(callbacks=[Watch(die_at=3)], **more).train()
    with pytest.raises(InputError, match="other training data"): make(groups=toy_groups(64, seed=3), **more).train(resume=True)
    make(per_device_train_batch_size=8, **more).train(resume=True)
    assert "run with 16 queries x 1 x 1 process, this one has 8 queries" in capsys.readouterr().out


def test_another_number_of_steps(make, capsys):
    "A run that goes on for longer says that its learning rate takes another curve; one that would have ended already is refused."
    more = dict(save_strategy="steps", save_steps=2)
    with pytest.raises(MemoryError): make(callbacks=[Watch(die_at=3)], **more).train()
    with pytest.raises(InputError, match="2 of them done.*this run has 2"): make(max_steps=2, **more).train(resume=True)
    make(max_steps=6, **more).train(resume=True)
    assert "checkpoint-2 is of a run of 4 steps, this one has 6" in capsys.readouterr().out


def test_a_run_that_goes_on_is_not_warned_about(make, caplog):
    "logging_steps as a share is the same number of steps, whatever transformers thinks."
    more = dict(save_strategy="steps", save_steps=2, logging_steps=0.3)
    with pytest.raises(MemoryError): make(callbacks=[Watch(die_at=3)], **more).train()
    logging.getLogger("transformers").propagate = True
    try: make(**more).train(resume=True)
    finally: logging.getLogger("transformers").propagate = False
    assert "do not match" not in caplog.text


def test_baseline_and_plan_travel(make, tmp_path):
    "What was measured before the first step, and the layout, are taken from the checkpoint by a run that goes on."
    more = dict(dev=toy_groups(20, seed=1), corpus=toy_corpus(), eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2, num_train_epochs=2)
    first = make(callbacks=[Watch(die_at=4)], **more)
    prepare(first.model, "bucketed")  # as if it had been measured as the faster way
    first.source.layout = layout_of(first.model)
    with pytest.raises(MemoryError): first.train()
    assert json.loads((tmp_path / "run" / "checkpoint-2" / "plan.json").read_text())["forward"] == "bucketed"
    second = make(**more)
    assert second.source.layout.name == "packed"
    second.train(resume=True)
    assert second.source.layout.name == layout_of(second.model).name == "bucketed"
    steps, scores = zip(*second.history.column("eval_ndcg@10"))
    assert steps == (0, 2, 4, 6, 8) and second.bar.baseline == scores[0] and not second.args.eval_on_start
    assert second.bar.shown["dev nDCG@10"] == f"{scores[0]:.3f} -> {scores[-1]:.3f}"
    assert all(0.1 < o["memory_gb"] < 30 for o in second.history if "loss" in o)


def test_the_optimizer_is_fused(make):
    trainer = make()
    trainer.train()
    assert trainer.args.optim == "adamw_torch_fused" and trainer.optimizer.optimizer.defaults["fused"]


def test_finetune_without_a_corpus(tmp_path):
    "It searches the documents of all three sets."
    sets = [toy_groups(180).select(range(a, b)) for a, b in ((0, 60), (60, 70), (70, 80))]
    result = finetune(sets[0], tiny_model(), dev=sets[1], test=sets[2], output_dir=tmp_path / "run", precision="fp32", eval_strategy="epoch")
    documents = {o["doc"] for groups in sets for row in groups for o in row["pos"] + row["neg"]}
    assert result.before.info["documents"] == len(documents) and result.before.info["missing"] == 0


def test_missing_positives_are_for_dev_too(tmp_path):
    "What `missing` says of test holds for the measurements while training."
    result = finetune(toy_groups(60), tiny_model(), toy_corpus().select(range(90)), missing="add", output_dir=tmp_path / "run",
                      precision="fp32", eval_strategy="epoch", per_device_train_batch_size=16)
    assert result.before.info["missing"] > 0 and any("eval_ndcg@10" in o for o in result.history)


SECRETS = [text for o in toy_groups(64) for text in (o["query"], o["pos"][0]["doc"], o["neg"][0]["doc"])]


def test_the_model_card_keeps_secrets(make, tmp_path):
    "The card of a saved model, and of a checkpoint, says how it was trained and shows no text that it was trained on."
    trainer = make(dev=toy_groups(20, seed=1), corpus=toy_corpus(), eval_strategy="epoch", save_strategy="epoch")
    trainer.train()
    trainer.model.save_pretrained(str(tmp_path / "model"))
    for folder in (tmp_path / "model", tmp_path / "run/checkpoint-4"):
        files = [o for o in folder.rglob("*") if o.is_file() and o.name != "tokenizer.json" and o.suffix in (".md", ".json", ".txt")]
        for file in files: assert not [o for o in SECRETS if o in file.read_text()], file
        card = (folder / "README.md").read_text()
        assert "loss:InfoNCE" in card and "loss:Step" not in card
        assert "nixietune" in card and "sentence-transformers" in card and "learning_rate" in card


ALONE = """
import json, sys
class Without:
    def find_spec(self, name, *rest):
        if name.split(".")[0] == "nixietune": raise ModuleNotFoundError("nixietune is not here")
sys.meta_path.insert(0, Without())
try: import nixietune
except ModuleNotFoundError: pass
else: raise SystemExit("the guard does not work")
import numpy as np, torch
torch.set_num_threads(1)
from sentence_transformers import SentenceTransformer
folder, queries, documents = json.load(sys.stdin)
found = {}
for kind in %s:
    model = SentenceTransformer(f"{folder}/{kind}", device="cpu")
    network = getattr(model[0], "auto_model", None)
    found[kind] = dict(prompts=model.prompts, length=str(model.max_seq_length), attention=network and network.config._attn_implementation)
    np.savez(f"{folder}/{kind}.npz", query=model.encode_query(queries), document=model.encode_document(documents))
assert not [o for o in sys.modules if o.startswith("nixietune")]
print(json.dumps(found))
"""


def test_saved_models_need_no_nixietune(make, tmp_path):
    "A fresh process in which nixietune cannot be imported: the same vectors, prompts and lengths, and no attention of ours."
    kinds, models = ("bert", "modernbert", "xlm-roberta", "qwen3", "mpnet", "static"), {}
    queries, documents = SECRETS[0::3], [" ".join([o] * 3) for o in SECRETS[1::3]]  # some longer than the maximum length
    for kind in kinds:
        model = tiny_model(kind, prompts=PROMPTS)
        if kind != "static": set_max_length(model, {"query": 12, "document": 20})
        make(model, toy_groups(32), kind, learning_rate=0.01).train()
        models[kind] = model
        model.save_pretrained(str(tmp_path / kind))
        for file in tmp_path.glob(f"{kind}/**/*.json"): assert "nixietune" not in file.read_text(), file
    done = subprocess.run([sys.executable, "-I", "-c", ALONE % repr(kinds)], input=json.dumps([str(tmp_path), queries, documents]),
                          capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for kind, model in models.items():
        assert found[kind]["prompts"] == PROMPTS
        assert found[kind]["length"] == ("inf" if kind == "static" else "20") and "nixietune" not in str(found[kind]["attention"])
        vectors = np.load(tmp_path / f"{kind}.npz")
        for role, texts in (("query", queries), ("document", documents)):
            ours = encode(model, texts, role, progress=False)
            assert np.abs(ours - vectors[role]).max() < 1e-5 * np.abs(ours).max(), (kind, role)


def test_the_source_travels_light():
    "A worker gets paths, not texts or tokens, and makes the same batches from them."
    groups, model = toy_groups(180, negatives=3), tiny_model(prompts=PROMPTS)
    source = Source(model, index_groups(groups, model=model), budget=1024, negatives=2)
    sent = pickle.dumps(source)
    assert len(sent) < 2_000
    (key,) = next(iter(KeySampler(len(source), 32, seed=3)))
    one, other = source[key], pickle.loads(sent)[key]
    for a, b in zip(one["packs"], other["packs"], strict=True):
        assert all(torch.equal(a[name], b[name]) if torch.is_tensor(a[name]) else a[name] == b[name] for name in a)
    assert torch.equal(one["label"]["order"], other["label"]["order"]) and torch.equal(one["label"]["edges"], other["label"]["edges"])


def test_what_is_said_before_the_first_step(make, capsys):
    make(prepared := tiny_model(), learning_rate=None, per_device_train_batch_size=None).train()
    said = capsys.readouterr().out
    assert layout_of(prepared).name == "packed"
    assert "training on 64 groups: 1 epoch, batch 16, learning rate 5e-05 (neutral recipe)\ntexts packed, fp32 on cpu\n" in said
    assert "batch 16 instead of the recipe's 64: there are only 64 groups" in said and "only 4 steps: expect a small change" in said
    assert "loss: InfoNCE(temperature=0.1" in said


@pytest.mark.parametrize("options, message", [
    ({"forward": "packed"}, "mpnet adds its own position bias"), ({"forward": "paked"}, "forward='paked'"), ({"precision": "int8"}, "precision='int8'"),
])
def test_refused_before_it_starts(make, options, message):
    with pytest.raises(InputError, match=message): make(tiny_model("mpnet"), **options)
