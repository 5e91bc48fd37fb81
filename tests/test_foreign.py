"What was written for sentence-transformers: its losses give the numbers that they give there, or are refused with the reason."
import copy
import warnings

import pandas
import pytest
import torch
from datasets import Dataset, DatasetDict
from sentence_transformers import SentenceTransformer, SparseEncoder
from sentence_transformers.base.losses.gradcache import CachedLossMixin
from sentence_transformers.sentence_transformer import evaluation, losses
from torch import nn
from transformers import TrainerCallback

import nixietune as nt
from nixietune.batching import BatchKey, index_groups, Source
from nixietune.core import InputError
from nixietune.display import quiet
from nixietune.encoder import prepare
from nixietune.foreign import Evaluators, REFUSED, SentenceTransformersLoss, StandIn, TAKEN, taken_evaluators, taken_loss
from nixietune.groups import make_groups
from nixietune.objectives import Matryoshka, Objective, PerDataset
from nixietune.steps import Step, union
from nixietune.testing import tiny_model, toy_corpus, toy_groups

torch.set_num_threads(1)  # tiny tensors: a second thread only waits


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch): monkeypatch.setenv("NIXIETUNE_CACHE", str(tmp_path / "cache"))


def rows_of(n=6, negatives=2):
    "Groups in which no document stands twice, with grades and a teacher's scores."
    def document(*words): return " ".join(words)
    numbers = torch.Generator().manual_seed(3)
    def number(): return round(float(torch.rand(1, generator=numbers)), 3)
    return [{"query": f"q{i} " + "word " * i, "pos": [{"doc": document("a", f"p{i}"), "score": float(i % 2), "teacher": 5 + number()}],
             "neg": [{"doc": document("a", "longer", f"n{i}{j}", "text " * j), "score": 0.0, "teacher": number()} for j in range(negatives)]} for i in range(n)]


def batch_of(rows, model, budget=30):
    "Packs and labels of one batch."
    groups = make_groups(rows, "nixietune")
    prepare(model)
    index = index_groups(groups)
    batch = Source(model, index, budget)[BatchKey(0, 0, tuple(range(len(rows))), 0)]
    assert len(batch["packs"]) > 1 and "cu_seq_lens_q" in batch["packs"][0]
    texts = [text for _, text in index.queries], index.documents
    torch.manual_seed(5)
    batch["label"]["vectors"] = {"teacher": torch.randn(len(batch["label"]["q_id"]) + len(batch["label"]["d_id"]), 32)}
    return batch, texts


def ours(loss, rows, model, cached=False):
    "The loss and the gradients by our step, packed."
    objective = Objective(loss)
    batch, _ = batch_of(rows, model)
    model.zero_grad()
    step = Step(model, objective, cached)
    value = step(batch["packs"], batch["label"])
    value.backward()
    return value.item(), gradient(model), objective


def gradient(model): return torch.cat([torch.zeros_like(o).flatten() if o.grad is None else o.grad.flatten().clone() for o in model.parameters()])


def columns(rows, negatives=True):
    "The table that a user of sentence-transformers would write by hand."
    many = range(len(rows[0]["neg"])) if negatives else ()
    return [[o["query"] for o in rows], [o["pos"][0]["doc"] for o in rows], *([o["neg"][j]["doc"] for o in rows] for j in many)]


def pairs(rows, number=lambda o: o["score"]):
    made = [(o["query"], item["doc"], number(item)) for o in rows for item in o["pos"] + o["neg"]]
    return [[a for a, _, _ in made], [b for _, b, _ in made]], torch.tensor([c for _, _, c in made])


def triplets(rows):
    made = [(o["query"], p["doc"], n["doc"], p["teacher"] - n["teacher"]) for o in rows for p in o["pos"] for n in o["neg"]]
    return [[o[i] for o in made] for i in range(3)], torch.tensor([o[3] for o in made])


def scored(rows): return columns(rows), torch.tensor([[i["teacher"] for i in o["pos"] + o["neg"]] for o in rows])


def tables(rows, texts, vectors): # class -> (columns, labels), written without a relation
    return {"MegaBatchMarginLoss": (columns(rows, False), None), "TripletLoss": (triplets(rows)[0], None), "MarginMSELoss": triplets(rows),
        **({"DistillKLDivLoss": scored(rows)} if len({len(o["neg"]) for o in rows}) == 1 else {}),
        **{name: pairs(rows) for name in ("CosineSimilarityLoss", "CoSENTLoss", "AnglELoss", "ContrastiveLoss", "OnlineContrastiveLoss")},
        "SoftmaxLoss": pairs(rows, lambda o: int(o["score"])), **{name: ([[*texts[0], *texts[1]]], vectors) for name in ("MSELoss", "EmbedDistillLoss")}}


MAKE = {"SoftmaxLoss": lambda model: losses.SoftmaxLoss(model, 32, 2), "MatryoshkaLoss": lambda model: losses.MatryoshkaLoss(model, losses.MultipleNegativesRankingLoss(model), [32, 8]),
    "EmbedDistillLoss": lambda model: losses.EmbedDistillLoss(model, projection_dim=32), "MegaBatchMarginLoss": lambda model: losses.MegaBatchMarginLoss(model, mini_batch_size=4),
    "CachedMultipleNegativesRankingLoss": lambda model: losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=4)}
MORE = {"all directions": lambda model: losses.MultipleNegativesRankingLoss(model, directions=("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"), hardness_mode="hard_negatives", hardness_strength=3.0),
    "Matryoshka of CoSENT": lambda model: losses.MatryoshkaLoss(model, losses.CoSENTLoss(model), [32, 16], [1, 2]),
    "Matryoshka of vectors": lambda model: losses.MatryoshkaLoss(model, losses.MSELoss(model), [32, 16]),
    "without caching": lambda model: losses.MegaBatchMarginLoss(model, use_mini_batched_version=False)}


def made(name, model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated ones
        torch.manual_seed(2)
        return (MAKE | MORE).get(name, getattr(losses, name, None))(model)


def by_hand(loss, name, rows, model):
    "The same by sentence-transformers: padded, column by column."
    batch, texts = batch_of(rows, model)
    inner = getattr(loss, "loss", loss) if name.startswith("Matryoshka") else loss
    given, labels = tables(rows, texts, batch["label"]["vectors"]["teacher"]).get(type(inner).__name__) or (columns(rows), None)
    def features(texts): return {k: o for k, o in model.preprocess(texts).items()}
    model.zero_grad()
    value = loss([features(o) for o in given], labels)
    value = sum(value.values()) if isinstance(value, dict) else value
    value.backward()
    return value.item(), gradient(model)


ALL = [name for name in losses.__all__ if issubclass(getattr(losses, name), nn.Module)]


def test_every_loss_is_known():
    "Each of sentence-transformers' losses is taken or refused; a new one has to be looked at."
    assert {*TAKEN} | {*REFUSED} == {*ALL} and not {*TAKEN} & {*REFUSED}


@pytest.mark.parametrize("name", [*TAKEN, *MORE])
def test_the_numbers_of_sentence_transformers(name):
    "Packed and through the relation: the value and every gradient of the loss on padded columns."
    rows, model = rows_of(), tiny_model().train()
    loss = made(name, model)
    value, expected = by_hand(loss, name, rows, model)
    own = {k: o.grad.clone() for k, o in loss.named_parameters() if o.grad is not None and not k.startswith(("model.", "loss.model."))}
    loss.zero_grad()
    found, got, objective = ours(loss if isinstance(loss, SentenceTransformersLoss) else taken_loss(loss, model), rows, model)
    assert expected.abs().max() > 1e-3 or name == "GlobalOrthogonalRegularizationLoss"
    assert found == pytest.approx(value, abs=1e-5, rel=1e-5)
    assert (got - expected).abs().max() <= 1e-5 * max(1, expected.abs().max())
    inner = next(iter(objective.losses.values()))
    for k, o in own.items(): assert torch.allclose(dict(inner.loss.named_parameters())[k].grad, o, atol=1e-5), k
    assert inner.left_out() == ("MegaBatchMarginLoss: 0 of 6 queries and 12 of 18 of their documents were in no row of their batch, counted in every batch" if "out caching" in name or "Mega" in name else "")
    assert not any("attention" in k or "embeddings" in k for k in objective.state_dict())
    assert name in ("SoftmaxLoss", "EmbedDistillLoss") or not list(objective.parameters())


@pytest.mark.parametrize("name", ["MultipleNegativesRankingLoss", "CoSENTLoss", "MatryoshkaLoss"])
def test_with_cached_gradients(name):
    rows, model = rows_of(), tiny_model().train()
    loss = made(name, model)
    value, expected = by_hand(loss, name, rows, model)
    found, got, _ = ours(taken_loss(loss, model), rows, model, cached=True)
    assert found == pytest.approx(value, abs=1e-5) and (got - expected).abs().max() <= 1e-5 * max(1, expected.abs().max())


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name):
    "With the reason and what to use; the class alone is enough to know."
    loss = object.__new__(getattr(losses, name))
    with pytest.raises(InputError) as error: SentenceTransformersLoss(loss)
    assert name in str(error.value) and all(words in str(error.value) for words in REFUSED[name])


class Own(nn.Module):
    "Somebody's loss; `reads` one thing."
    def __init__(self, model, read): super().__init__(); self.model, self.read = model, read
    def forward(self, sentence_features, labels=None): return self.read(self.model, list(sentence_features), labels)


def run_own(read, rows="pairs", labels=None, model=None, **more):
    model = model or tiny_model()
    return ours(SentenceTransformersLoss(Own(model, read), rows, labels, **more), rows_of(), model)


def test_a_loss_of_ones_own():
    "Labels of every kind, weights of the model, and questions to the model reach it."
    seen = []
    def read(model, features, labels):
        seen.append((len(features), labels, model.get_embedding_dimension(), model.training))
        return model(features[0])["sentence_embedding"].sum() + sum(o.sum() for o in model.parameters())
    for rows, labels, n in (("pairs", "teacher", 2), ("triplets", "grades", 3), ("tuples", "grades", 4), ("tuples", None, 4), ("pairs", None, 2)):
        _, got, _ = run_own(read, rows, labels)
        assert seen[-1][0] == n and seen[-1][2:] == (32, True) and (seen[-1][1] is None) == (labels is None)
        assert (got - run_own(lambda model, features, labels: model(features[0])["sentence_embedding"].sum(), rows, labels)[1] - 1).abs().max() < 1e-3
    assert seen[0][1].tolist() == pytest.approx([i["teacher"] for o in rows_of() for i in o["pos"] + o["neg"]], abs=1e-6)
    assert seen[1][1].tolist() == [i["score"] - n["score"] for o in rows_of() for i in o["pos"] for n in o["neg"]]


@pytest.mark.parametrize("read, problem", [
    (lambda model, features, labels: features[0]["input_ids"].sum(), "the loss reads 'input_ids'"),
    (lambda model, features, labels: model(features[0])["token_embeddings"].sum(), "the loss reads 'token_embeddings'"),
    (lambda model, features, labels: model[0](features[0])["x"], "modules of its model"),
    (lambda model, features, labels: model(features[0])["sentence_embedding"].sum(1), "instead of one number"),
    (lambda model, features, labels: None, "instead of one number")])
def test_what_cannot_be_read(read, problem):
    with pytest.raises(InputError, match=problem): run_own(read)


@pytest.mark.parametrize("make, problem", [
    (lambda m: SentenceTransformersLoss(Own(m, None)), "nothing is known of the rows"),
    (lambda m: SentenceTransformersLoss(Own(m, None), rows="lists"), "rows='lists'"),
    (lambda m: SentenceTransformersLoss(Own(m, None), rows="pairs", labels="stars"), "labels='stars'"),
    (lambda m: SentenceTransformersLoss(Own(m, None), rows="texts"), "labels=None for rows='texts'"),
    (lambda m: SentenceTransformersLoss(Own(m, None), rows="pairs", negatives=1), "negatives=1"),
    (lambda m: SentenceTransformersLoss(Own(None, None), rows="pairs"), "no model in a loss"),
    (lambda m: SentenceTransformersLoss(nn.ModuleList([Own(m, None), tiny_model()]), rows="pairs"), "2 models in a loss"),
    (lambda m: SentenceTransformersLoss(losses.MatryoshkaLoss(m, losses.CachedMultipleNegativesRankingLoss(m), [32, 8])), "caches gradients, in another"),
    (lambda m: Matryoshka(SentenceTransformersLoss(losses.CoSENTLoss(m)), (32, 8)), "is an objective"),
    (lambda m: taken_loss(losses.CoSENTLoss(tiny_model()), m), "made with another model"),
    (lambda m: taken_loss(Objective(SentenceTransformersLoss(losses.CoSENTLoss(tiny_model()))), m), "made with another model"),
    (lambda m: Objective(losses.CoSENTLoss(m)), "SentenceTransformersLoss"),
    (lambda m: taken_loss({"a": losses.CoSENTLoss(m)}, m, ["a"]), "PerDataset")])
def test_what_cannot_be_made(make, problem):
    with pytest.raises(InputError, match=problem): make(tiny_model())


def test_what_a_table_cannot_hold_is_left_out_and_counted():
    "Fewer negatives than the others, an answer of two queries, a query that is asked twice, a query that stands alone."
    rows, model = rows_of(8, 2), tiny_model()
    rows[0]["neg"] = rows[0]["neg"][:1]                                    # one negative of two
    rows[2]["neg"][0] = rows[1]["pos"][0]                                  # the first row's answer among the second's negatives
    rows[4]["query"] = rows[3]["query"]                                    # asked twice
    rows[5]["type"] = "no_in_batch_neg"
    loss = SentenceTransformersLoss(losses.MultipleNegativesRankingLoss(model))
    value, got, _ = ours(loss, rows, model)
    assert (loss.seen["queries"], loss.seen["read"]) == (8, 4)
    assert loss.left_out().startswith("MultipleNegativesRankingLoss: 4 of 8 queries and 11 of 23 of their documents were in no row")
    kept = [rows[i] for i in (1, 3, 6, 7)]
    plain, expected = by_hand(losses.MultipleNegativesRankingLoss(model), "MultipleNegativesRankingLoss", kept, model)
    assert value == pytest.approx(plain * 4 / 8, abs=1e-5)  # four of eight queries have a term
    assert (got - expected / 2).abs().max() <= 1e-5 * max(1, expected.abs().max())
    assert ours(SentenceTransformersLoss(losses.MultipleNegativesRankingLoss(model), negatives=1), rows, model)[2].losses["MultipleNegativesRankingLoss"].seen["read"] == 5
    assert loss.loss.model.of[0] is model and isinstance(loss.loss.model, StandIn)


def test_nothing_to_say_of_a_batch():
    "Without a row the loss is 0, and has a gradient of 0."
    rows, model = [o | {"neg": []} for o in rows_of()], tiny_model()
    value, got, objective = ours(SentenceTransformersLoss(losses.TripletLoss(model)), rows, model)
    assert value == 0 and not got.any() and objective.losses["TripletLoss"].seen["read"] == 0


def test_ragged_groups_without_tables():
    "Pairs and triplets need no equal numbers; classes have to be whole."
    rows, model = rows_of(), tiny_model()
    for i, o in enumerate(rows): o["neg"] = o["neg"][:i % 3]
    for name in ("CoSENTLoss", "MarginMSELoss"):
        loss = SentenceTransformersLoss(made(name, model))
        value, got, _ = ours(loss, rows, model)
        plain, expected = by_hand(made(name, model), name, rows, model)
        share = loss.seen["read"] / len(rows)
        assert value == pytest.approx(plain * share, abs=1e-5) and (got - expected * share).abs().max() <= 1e-5 * max(1, expected.abs().max()), name
    rows[0]["pos"][0]["score"] = 0.5
    with pytest.raises(InputError, match="a grade of 0.5"): ours(SentenceTransformersLoss(made("SoftmaxLoss", model)), rows, model)


def test_in_parts_and_gathered():
    "Labels that two readers put together give the loss of one, whatever its rows: a table of all processes."
    rows, model = rows_of(7), tiny_model()
    rows[5]["pos"].append(rows[1]["pos"][0])
    index = index_groups(make_groups(rows, "nixietune"))
    prepare(model)
    source = Source(model, index, 1000)
    parts = [source[BatchKey(0, 0, some, 0)]["label"] for some in ((0, 1, 2, 3), (4, 5, 6))]
    whole, first = union(parts)
    alone = source[BatchKey(0, 0, tuple(range(7)), 0)]["label"]
    torch.manual_seed(0)
    q, d = torch.randn(7, 32), torch.randn(len(alone["d_id"]), 32)
    assert torch.equal(whole["d_id"], alone["d_id"]) and len(first) == len(d)
    for name in ("MultipleNegativesRankingLoss", "CoSENTLoss", "MarginMSELoss", "DistillKLDivLoss"):
        objective = Objective(SentenceTransformersLoss(made(name, model)))
        (one,), (two,) = objective(q, d, whole).values(), objective(q, d, alone).values()
        assert torch.allclose(one.value, two.value) and one.weight == two.weight and one.value > 0


def test_gathered_already():
    "A loss that would gather does so no more; the user's own stays as it was."
    model = tiny_model()
    loss = losses.MultipleNegativesRankingLoss(model, gather_across_devices=True)
    assert not SentenceTransformersLoss(loss).loss.gather_across_devices
    assert loss.gather_across_devices and loss.model is model


def test_other_models():
    with pytest.raises(InputError, match="a loss for SparseEncoder"): SentenceTransformersLoss(sparse(), rows="pairs")


def sparse():
    "A loss that holds a SparseEncoder, without making one."
    model = SparseEncoder.__new__(SparseEncoder)
    nn.Module.__init__(model)
    return Own(model, None)


def trainer_of(tmp_path, loss, model=None, groups=None, name="run", **more):
    args = {"learning_rate": 5e-3, "per_device_train_batch_size": 8, "num_train_epochs": 2, "precision": "fp32", "seed": 1, "logging_steps": 2}
    evaluator, dev, corpus, known = (more.pop(o, None) for o in ("evaluator", "dev", "corpus", "known"))
    groups = make_groups(rows_of(24), "nixietune") if groups is None else groups
    return nt.Trainer(model or tiny_model(), nt.TrainingArguments(str(tmp_path / name), **args | more), groups, loss=loss, evaluator=evaluator, dev=dev, corpus=corpus)


def weights(trainer): return torch.cat([o.detach().flatten() for o in trainer.loss.parameters()])


def test_trained_saved_and_resumed(tmp_path, capsys):
    "The loss's own classifier is trained once, is beside the checkpoint, and comes back; the model's weights are there once."
    def run(name, **more):
        model = tiny_model()
        torch.manual_seed(4)
        return trainer_of(tmp_path, losses.SoftmaxLoss(model, 32, 2), model, name=name, **more)
    whole = run("whole")
    before = whole.loss.objective.losses["SoftmaxLoss"].loss.classifier.weight.clone()
    whole.train()
    assert "SoftmaxLoss(num_labels=2) of sentence-transformers, on rows of (query, document) with classes" in capsys.readouterr().out
    assert (whole.loss.objective.losses["SoftmaxLoss"].loss.classifier.weight - before).abs().max() > 1e-3
    assert [*whole.loss.objective.state_dict()] == [f"inner.0.loss.classifier.{o}" for o in ("weight", "bias")]
    in_optimizer = [id(o) for group in whole.optimizer.param_groups for o in group["params"]]
    assert len(in_optimizer) == len({*in_optimizer}) == len([o for o in whole.loss.parameters() if o.requires_grad])
    names = [k for k, _ in whole.loss.named_parameters(remove_duplicate=False)]
    assert len(names) == len({*names}) == len([*whole.model.parameters()]) + 2
    cut = run("cut", save_strategy="steps", save_steps=2, num_train_epochs=2)
    cut.add_callback(Stop(3))
    cut.train()
    again = run("cut", save_strategy="steps", save_steps=2)
    again.train(resume=True)
    assert torch.equal(weights(again), weights(whole))
    whole.model.save_pretrained(str(tmp_path / "model"))
    assert SentenceTransformer(str(tmp_path / "model"), device="cpu").encode(["a"]).shape == (1, 32)


class Stop(TrainerCallback):
    def __init__(self, at): self.at = at
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.at: control.should_training_stop = True


def test_beside_ours_and_for_each_data_set(tmp_path):
    "A list, a class, a function, and one loss a data set."
    model = tiny_model()
    trainer = trainer_of(tmp_path, [nt.InfoNCE(0.1), losses.CoSENTLoss, lambda model: losses.TripletLoss(model)], model)
    assert [*trainer.loss.objective.losses] == ["InfoNCE", "CoSENTLoss", "TripletLoss"]
    with quiet(): trainer.train()
    logged = next(o for o in trainer.state.log_history if "loss" in o)
    assert logged["loss"] == pytest.approx(logged["InfoNCE"] + logged["CoSENTLoss.loss"] + logged["TripletLoss.loss"], abs=1e-3)
    per = PerDataset({"rows": SentenceTransformersLoss(losses.MultipleNegativesRankingLoss(model))})
    trainer = trainer_of(tmp_path, per, model, same_dataset_within_batch=True)
    with quiet(): trainer.train()
    assert trainer.history.column("loss")[-1][1] < trainer.history.column("loss")[0][1]


def test_nothing_to_learn_from(tmp_path):
    rows = [{"query": o["query"], "pos": [{"doc": o["pos"][0]["doc"]}]} for o in rows_of()]
    for loss, problem in ((losses.TripletLoss, "a positive and a negative"), (losses.DistillKLDivLoss, "two scores of a teacher"), (losses.MSELoss, "vectors of a teacher")):
        with pytest.raises(InputError, match=problem): trainer_of(tmp_path, loss, groups=make_groups(rows, "nixietune"))


def test_left_out_is_said_after_the_run(tmp_path, capsys):
    rows = rows_of(16)
    rows[0]["neg"] = []
    trainer_of(tmp_path, losses.MultipleNegativesRankingLoss, groups=make_groups(rows, "nixietune"), num_train_epochs=1).train()
    assert "1 of 16 queries and 1 of 46 of their documents were in no row of their batch" in capsys.readouterr().out


def pairs_evaluator(name=""):
    return evaluation.EmbeddingSimilarityEvaluator(["red bird", "blue fish", "a horse"], ["a cardinal", "a shark", "a town"], [0.9, 0.7, 0.1], name=name, write_csv=False)


def retrieval():
    corpus = toy_corpus()
    dev = toy_groups(12, seed=2)
    ids = {text: i for i, text in zip(corpus["doc_id"], corpus["text"])}
    return evaluation.InformationRetrievalEvaluator({str(i): o["query"] for i, o in enumerate(dev)}, dict(zip(corpus["doc_id"], corpus["text"])),
        {str(i): {ids[o["pos"][0]["doc"]]} for i, o in enumerate(dev)}, write_csv=False)


def test_evaluators_choose_the_best(tmp_path, capsys):
    "Alone and packed: measured before step 1, shown, and the best checkpoint is theirs."
    trainer = trainer_of(tmp_path, nt.InfoNCE(0.1), groups=toy_groups(96), evaluator=retrieval(), eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True,
        metric_for_best_model="cosine_ndcg@10", num_train_epochs=3, per_device_train_batch_size=16)
    assert trainer.source.layout.name == "packed"
    trainer.train()
    course = trainer.history.column("eval_cosine_ndcg@10")
    assert [step for step, _ in course] == [0, 6, 12, 18] and course[-1][1] > course[0][1] + 0.1
    assert trainer.state.best_metric == max(value for _, value in course[1:])
    assert trainer.bar.baseline == course[0][1] and "eval_cosine_ndcg@10" in repr(trainer.history)
    assert retrieval()(trainer.model)["cosine_ndcg@10"] == pytest.approx(trainer.state.best_metric, abs=1e-6)
    plain = SentenceTransformer(str(trainer.state.best_model_checkpoint), device="cpu")
    assert retrieval()(plain)["cosine_ndcg@10"] == pytest.approx(trainer.state.best_metric, abs=1e-6)


def test_evaluators_beside_dev(tmp_path, capsys):
    "Dev is the main one; a function is an evaluator, too."
    several = [pairs_evaluator("sts"), lambda model, output_path, epoch, steps: {"norm": float(model.encode("a").sum())}]
    trainer = trainer_of(tmp_path, nt.InfoNCE(0.1), groups=toy_groups(32), evaluator=several, dev=toy_groups(8, seed=3), corpus=toy_corpus(), eval_strategy="epoch", num_train_epochs=1)
    trainer.train()
    last = trainer.state.log_history[-2]
    assert {"eval_ndcg@10", "eval_sts_pearson_cosine", "eval_norm"} <= last.keys()
    assert trainer.evaluator.primary_metric == "ndcg@10" and "eval_ndcg@10" in repr(trainer.history)
    trainer_of(tmp_path, nt.InfoNCE(0.1), groups=toy_groups(8), evaluator=pairs_evaluator())
    assert "the evaluator is not asked: eval_strategy=" in capsys.readouterr().out


def test_evaluators_that_are_refused():
    class Reranking: # as sentence_transformers.cross_encoder.evaluation has it
        __module__ = "sentence_transformers.cross_encoder.evaluation.reranking"
        def __call__(self, model): ...
    for given, problem in ((Reranking(), "measures a cross encoder"), (pairs_evaluator, None), (evaluation.TripletEvaluator, "an evaluator of"), ("ndcg", "evaluator='ndcg'"), ([3], "evaluator=3")):
        if problem is None: assert isinstance(taken_evaluators(None, given), Evaluators); continue
        with pytest.raises(InputError, match=problem): taken_evaluators(None, given)
    with pytest.raises(InputError, match="two evaluators measure 'pearson_cosine'"): Evaluators([pairs_evaluator(), pairs_evaluator()])(tiny_model())


TABLE = {"anchor": [f"q{i}" for i in range(20)], "positive": [f"a p{i}" for i in range(20)], "negative_1": [f"a n{i}" for i in range(20)]}


@pytest.mark.parametrize("given", [Dataset.from_dict(TABLE), pandas.DataFrame({"query": TABLE["anchor"], "pos": [[o] for o in TABLE["positive"]], "neg": [[o] for o in TABLE["negative_1"]]}),
    [{"anchor": a, "positive": b} for a, b in zip(TABLE["anchor"], TABLE["positive"])]], ids=["Dataset", "frame", "rows"])
def test_data_of_other_shapes(given, tmp_path, capsys):
    trainer = trainer_of(tmp_path, None, groups=given, num_train_epochs=1, dev=given)
    trainer.train()
    said = capsys.readouterr().out
    assert trainer.facts["pairs"] == 20 and ("read as" in said or isinstance(given, list))


def test_finetune_takes_a_table(tmp_path):
    with quiet(): result = nt.finetune(Dataset.from_dict(TABLE), tiny_model(), output_dir=str(tmp_path), loss=losses.MultipleNegativesRankingLoss, num_train_epochs=1,
        per_device_train_batch_size=8, precision="fp32", evaluator=pairs_evaluator(), eval_strategy="epoch")
    assert result.facts["groups"]["train"] == 16 and any("eval_pearson_cosine" in o for o in result.history)
    assert result.facts["training"]["loss"][0].startswith("MultipleNegativesRankingLoss(scale=20.0")


@pytest.mark.parametrize("given, problem", [(DatasetDict(train=Dataset.from_dict(TABLE)), "groups=data\\['train'\\]"), ({"a": Dataset.from_dict(TABLE)}, "several splits"),
    (Dataset.from_dict(TABLE).to_iterable_dataset(), "a stream"), (Dataset.from_dict({"x": ["a"]}), "no known dialect"), (3, "groups|path|file")])
def test_data_that_cannot_be_taken(given, problem, tmp_path):
    with pytest.raises(InputError, match=problem): trainer_of(tmp_path, None, groups=given)
    with pytest.raises(InputError, match=problem): nt.finetune(given, tiny_model(), output_dir=str(tmp_path))


def test_what_is_leaned_on():
    "In sentence-transformers, and not promised: the names by which cached losses compute, and Matryoshka's replaced `forward`."
    assert {"calculate_loss", "uses_gradient_cache"} <= {*dir(CachedLossMixin)}
    model = tiny_model()
    for name in ("CachedMultipleNegativesRankingLoss", "MegaBatchMarginLoss"): assert made(name, model).uses_gradient_cache, name
    assert copy.deepcopy(SentenceTransformersLoss(losses.CoSENTLoss(model))).loss.model.of[0].get_embedding_dimension() == 32
