"Three heads: the numbers of FlagEmbedding's own training, resuming, short and long texts, heads that are off, and files."
import json
import shutil

import numpy as np
import pytest
import torch
from make_m3_fixture import COLBERT, CONFIG, FIXTURE, fill, PASSAGES, QUERIES, TEACHER, UNK
from sentence_transformers import SentenceTransformer
from transformers import TrainerCallback

from nixietune.batching import BatchKey, index_groups, Source
from nixietune.checkpoints import last_checkpoint
from nixietune.core import InputError
from nixietune.encoder import prepare
from nixietune.groups import make_groups
from nixietune.losses import InfoNCE, KL, M3KD
from nixietune.m3 import add_heads, DEAD, encode_m3, encode_tokens, evaluate_m3, FILES, heads_of, load_m3, M3, m3_scores, m3_search, save_m3
from nixietune.steps import Step
from nixietune.testing import tiny_model, toy_corpus, toy_groups
from nixietune.token_similarities import maxsim, TokenVectors
from nixietune.training import Trainer, TrainingArguments

torch.set_num_threads(1)
THEIRS = json.loads(FIXTURE.read_text())
NAMES = {"sparse_linear": "lexical", "colbert_linear": "multi"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch): monkeypatch.setenv("NIXIETUNE_CACHE", str(tmp_path / "cache"))


def weighty(model):
    "The weights that FlagEmbedding had, in our model."
    fill(model[0].auto_model, "model")
    for theirs, ours in NAMES.items(): fill(heads_of(model)[ours].linear, theirs)
    return model


def bare(): return tiny_model("xlm-roberta", "cls", length=48, **CONFIG)
def same_model(): return weighty(add_heads(bare(), multi=COLBERT))
def texts_of(model, rows): return [" ".join("@" if i == UNK else model.tokenizer.convert_ids_to_tokens(i) for i in row) for row in rows]


def groups_of(model):
    rows = [{"query": query, "pos": passages[:1], "neg": passages[1:], "pos_scores": scores[:1], "neg_scores": scores[1:]}
        for query, passages, scores in zip(texts_of(model, QUERIES), (texts_of(model, o) for o in PASSAGES), TEACHER)]
    return make_groups(rows, "bge")


def step(objective, model=None, groups=None, rows=(0, 1, 2, 3), forward="padded", budget=10_000, cached=False, times=1):
    "Losses of some steps with the same weights, the parts of the last one, and the model with its gradients."
    model = model or same_model()
    prepare(model, forward)
    batch, found = Source(model, index_groups(groups or groups_of(model), model=model), budget)[BatchKey(0, 0, rows, 0)], []
    taken = Step(model, objective.train(), cached)
    for _ in range(times):
        model.zero_grad()
        out = taken(batch["packs"], batch["label"])
        parts = out if isinstance(out, dict) else {"": out}
        sum(parts.values()).backward()
        found.append(sum(parts.values()).item())
    return found, {name: o.item() for name, o in parts.items()}, model


def gradient_norms(model):
    "Of the parameters that the fixture names."
    own = {"model": model[0].auto_model, **{theirs: heads_of(model)[ours].linear for theirs, ours in NAMES.items()}}
    named = {f"{prefix}.{name}": o for prefix, module in own.items() for name, o in module.named_parameters()}
    return [named[name].grad.norm().item() for name in THEIRS["watched"]]


LOSSES = {"contrast": lambda t: InfoNCE(t), "kl_div": lambda t: [InfoNCE(t), KL(t, 1.0, entropy=False)], "m3_kd_loss": lambda t: M3KD(t, 1.0)}
LAYOUTS = [("padded", 10_000, False), ("packed", 10_000, False), ("packed", 40, True), ("bucketed", 30, False)]


# ---- the numbers of FlagEmbedding

def test_their_scores():
    "All four matrices; texts come to the very ids that FlagEmbedding had."
    model = same_model()
    queries, passages = texts_of(model, QUERIES), texts_of(model, sum(PASSAGES, []))
    for texts, rows in ((queries, QUERIES), (passages, sum(PASSAGES, []))): assert [o[1:-1] for o in model.tokenizer(texts)["input_ids"]] == rows
    for forward in ("padded", "packed"):
        prepare(model, forward)
        found = m3_scores(model, queries, passages, (1, 0.3, 1), progress=False)
        for ours, theirs in {"dense": "dense", "lexical": "sparse", "multi": "colbert"}.items(): assert np.abs(found[ours] - THEIRS[theirs]).max() < 1e-5, (forward, ours)
        assert np.abs(2.3 * found["mix"] - THEIRS["ensemble"]).max() < 1e-5  # a mean here, a sum there


@pytest.mark.parametrize("taught", [False, True], ids=["plain", "self-distilled"])
@pytest.mark.parametrize("temperature", [0.02, 0.1])
@pytest.mark.parametrize("kind", LOSSES)
def test_their_losses(kind, temperature, taught):
    "The unified loss, and the gradients of the encoder and both heads."
    theirs = THEIRS["runs"][f"{kind} {temperature}{' self-distilled' if taught else ''}"]
    for forward, budget, cached in LAYOUTS[:4 if kind == "contrast" and temperature == 0.1 else 1]:
        found, _, model = step(M3(LOSSES[kind](temperature), self_distill=taught), forward=forward, budget=budget, cached=cached)
        assert found == pytest.approx(theirs["losses"], rel=1e-5), (forward, cached)
        assert gradient_norms(model) == pytest.approx(theirs["gradients"], rel=1e-4, abs=1e-5), (forward, cached)


def test_kl_with_its_entropy():
    "KL reaches 0 here, and the entropy of the teacher there: a constant, without a gradient."
    teacher = torch.tensor(TEACHER).softmax(1)
    entropy = -(teacher * teacher.log()).sum(1).mean().item()
    found, _, model = step(M3([InfoNCE(0.1), KL(0.1, 1.0)]))
    theirs = THEIRS["runs"]["kl_div 0.1"]
    assert found[0] + (1 + 0.1 + 1 + 1) / 4 * entropy == pytest.approx(theirs["losses"][0], rel=1e-5)
    assert gradient_norms(model) == pytest.approx(theirs["gradients"], rel=1e-4, abs=1e-5)


def test_self_distillation_from_the_second_step():
    "FlagEmbedding's `self_distill_start_step=0` is the second forward, counted from 0; ours counts steps from 1, as the trainer does."
    found, _, _ = step(M3(InfoNCE(0.1), self_distill=True, self_distill_start=2), times=2)
    assert found == pytest.approx(THEIRS["runs"]["from the second step on"]["losses"], rel=1e-5)


def test_without_in_batch_negatives():
    """FlagEmbedding leaves the mix out here: it takes one column of it, whose softmax is 1 and whose loss is 0 (and which ends in an
    IndexError where there are more queries than passages to each). Ours is the loss of the mix over each query's own documents."""
    found, parts, _ = step(M3(InfoNCE(0.1, in_batch=False)), rows=(0, 1, 2))
    assert found[0] - parts["mix.InfoNCE"] == pytest.approx(THEIRS["runs"]["own passages only"]["losses"][0], rel=1e-5)
    mix = torch.tensor([THEIRS["ensemble"][i][3 * i:3 * i + 3] for i in range(3)])
    assert 4 * parts["mix.InfoNCE"] == pytest.approx(-(mix / 0.1).log_softmax(1)[:, 0].mean().item(), rel=1e-5)


def test_padding_is_no_token():
    "Where FlagEmbedding differs: a document whose every token is far from the query's is far, however long its neighbours are."
    q, near = TokenVectors(None, None, torch.tensor([[1.0, 0.0]]), None, torch.tensor([1])), torch.tensor([[-1.0, 0.0], [-0.6, 0.8], [1.0, 0.0], [0.0, 1.0]])
    assert maxsim(q, TokenVectors(None, None, near, None, torch.tensor([1, 3]))).tolist() == [[-1.0, 1.0]]


# ---- batches and texts that are not as usual

def test_short_and_long_texts(capsys):
    "A document without a word, one of one word; a query longer than the longest."
    model = same_model()
    found = encode_m3(model, ["", "red", "@"], progress=False)
    assert [len(o) for o in found["multi"]] == [1, 2, 2] and not found["lexical"][0] and not found["lexical"][2]
    long, documents = "red bird near the sea " * 20, ["red", "a red bird that lives near the sea"]
    capsys.readouterr()
    cut = m3_scores(model, [long], documents, progress=False)
    assert "48" in "".join(capsys.readouterr()), "a text is cut, and that is said"
    whole = m3_scores(model, [" ".join(long.split()[:46])], documents, progress=False)
    for name, o in cut.items(): assert np.allclose(o, whole[name], atol=1e-6), name


@pytest.mark.parametrize("forward, budget, cached", LAYOUTS)
def test_without_negatives(forward, budget, cached):
    "Others' positives are enough; a query alone with its positive has nothing to learn from, and breaks nothing."
    groups = toy_groups(8, negatives=0)
    found, parts, model = step(M3(InfoNCE(0.1), self_distill=True), None, groups, tuple(range(8)), forward, budget, cached)
    assert min(parts.values()) > 0 and gradient_norms(model)[0] > 0
    found, parts, model = step(M3(InfoNCE(0.1), self_distill=True), None, groups, (3,), forward, budget, cached)
    assert found == [pytest.approx(0, abs=1e-6)] and gradient_norms(model) == pytest.approx([0] * 6, abs=1e-6)


def test_documents_of_one_token():
    "Beside long ones, in training."
    rows = [{"query": "red bird", "pos": ["bird"], "neg": ["a blue fish that lives near the sea", "a"]}, {"query": "sea", "pos": ["the sea"], "neg": ["wood"]}]
    runs = [step(M3(InfoNCE(0.1)), None, make_groups(rows, "bge"), (0, 1), *o) for o in LAYOUTS]
    for found, _, model in runs:
        assert found == pytest.approx(runs[0][0], rel=1e-5)
        assert gradient_norms(model) == pytest.approx(gradient_norms(runs[0][2]), rel=1e-4, abs=1e-6)


def test_a_head_is_off():
    "It is not in the loss, and gets no gradient; a model without it does the same."
    theirs, whole = THEIRS["runs"]["contrast 0.1"], step(M3(InfoNCE(0.1)))[1]
    found, parts, model = step(M3(InfoNCE(0.1), heads=("dense", "multi")))
    assert {*parts} == {"dense.InfoNCE", "multi.InfoNCE", "mix.InfoNCE"} and sum(whole.values()) == pytest.approx(theirs["losses"][0], rel=1e-5)
    for name in ("dense.InfoNCE", "multi.InfoNCE"): assert 3 * parts[name] == pytest.approx(4 * whole[name], rel=1e-5)  # three terms instead of four
    mix = torch.tensor(THEIRS["dense"]) + torch.tensor(THEIRS["colbert"])
    assert 3 * parts["mix.InfoNCE"] == pytest.approx(torch.nn.functional.cross_entropy(mix / 0.1, torch.arange(4) * 3).item(), rel=1e-5)
    assert all(o.grad is None for o in heads_of(model)["lexical"].parameters())
    smaller = add_heads(bare(), lexical=False, multi=COLBERT)
    fill(smaller[0].auto_model, "model"), fill(heads_of(smaller)["multi"].linear, "colbert_linear")
    assert step(M3(InfoNCE(0.1), heads=("dense", "multi")), smaller)[0] == pytest.approx(found, rel=1e-6)
    assert {*m3_scores(smaller, ["red"], ["bird"], progress=False)} == {"dense", "multi", "mix"}
    with pytest.raises(InputError, match="no lexical head"): Step(smaller, M3())


def test_a_dead_head_is_said(capsys):
    "After some batches without any lexical weight, once; and not where there was one in between."
    def texts(weight): return TokenVectors(torch.eye(2), torch.tensor([weight, 0.0]), None, torch.tensor([5, 6]), torch.tensor([1, 1]))
    batch = {"q_id": torch.tensor([0, 1]), "d_id": torch.tensor([0, 1]), "edges": torch.tensor([[0, 1], [0, 1]]), "kind": torch.tensor([2, 2], dtype=torch.int8),
        "score": torch.full((2,), torch.nan), "teacher": torch.full((2,), torch.nan), "known": torch.zeros(2, 0, dtype=torch.int64)}
    objective = M3(InfoNCE(0.1), heads=("dense", "lexical")).train()
    for weight in [0.0] * (DEAD - 1) + [1.0] + [0.0] * (DEAD - 1): objective(texts(weight), texts(weight), batch)
    assert "died" not in "".join(capsys.readouterr())
    for _ in range(3): objective(texts(0.0), texts(0.0), batch)
    assert "".join(capsys.readouterr()).count("has died") == 1
    model = same_model()
    with torch.no_grad(): heads_of(model)["lexical"].linear.bias.fill_(-100)
    _, parts, _ = step(M3(InfoNCE(0.1)), model)
    assert parts["lexical.InfoNCE"] == pytest.approx(0.1 / 4 * np.log(12), rel=1e-5)  # all documents alike
    assert gradient_norms(model)[2:4] == [0, 0]


# ---- files

def test_saved_and_loaded(tmp_path):
    "With our files, with bge-m3's beside a plain model, and by sentence-transformers."
    model, queries, documents = same_model(), ["red bird", "sea @"], toy_corpus()["text"][:7]
    expected = m3_scores(model, queries, documents, progress=False)
    save_m3(model, tmp_path / "ours")
    plain = bare()
    fill(plain[0].auto_model, "model")
    for name in ("plain", "theirs"): plain.save_pretrained(str(tmp_path / name))  # BAAI/bge-m3 is such a model, with two files beside it
    for file in FILES.values(): shutil.copy(tmp_path / "ours" / file, tmp_path / "theirs" / file)
    assert {k: tuple(v.shape) for k, v in torch.load(tmp_path / "ours/sparse_linear.pt", weights_only=True).items()} == {"weight": (1, 32), "bias": (1,)}
    for name in ("ours", "theirs"):
        again = load_m3(tmp_path / name)
        for head, o in m3_scores(again, queries, documents, progress=False).items(): assert np.allclose(o, expected[head], atol=1e-6), (name, head)
        vectors = SentenceTransformer(str(tmp_path / name), device="cpu").encode(documents)
        assert np.allclose(vectors, encode_m3(model, documents, heads=("dense",), progress=False)["dense"], atol=1e-5)
    with pytest.raises(InputError, match="no lexical head"): load_m3(tmp_path / "plain")
    (tmp_path / "theirs/colbert_linear.pt").unlink()
    with pytest.raises(InputError, match="no multi head"): load_m3(tmp_path / "theirs")
    assert {*heads_of(load_m3(tmp_path / "theirs", multi=False))} == {"lexical"}
    torch.save({"weight": torch.zeros(1, 32)}, tmp_path / "theirs/sparse_linear.pt")
    with pytest.raises(InputError, match="weight and bias"): load_m3(tmp_path / "theirs", multi=False)


def test_searches_find_what_scores_say():
    "Every way of searching, with fewer documents than asked for, and queries that share no token with any."
    model, corpus = same_model(), toy_corpus().select(range(30))
    q, d = encode_tokens(model, ["red bird", "@", "old cat near the sea"], "query", progress=False), encode_tokens(model, corpus["text"][:], progress=False)
    for by, expected in m3_scores(model, ["red bird", "@", "old cat near the sea"], corpus["text"][:], (1, 2, 0.5), progress=False).items():
        found, rows = m3_search(q, d, 50, by, (1, 2, 0.5), pool=30)
        assert (rows[:, 30:] == -1).all() and all({*row} == {*range(30)} for row in rows[:, :30].tolist())
        assert np.allclose(found[:, :30], -np.sort(-expected, 1), atol=1e-5) and np.allclose(np.take_along_axis(expected, rows[:, :30], 1), found[:, :30], atol=1e-5), by


# ---- the trainer

class Die(TrainerCallback):
    def __init__(self, at): self.at = at
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.at: raise MemoryError("the machine is gone")


def shared_words():
    "The toy problem, with queries in words of their documents: in its own there is nothing for the lexical head to learn."
    rows = [{"query": " ".join(np.array(o["pos"][0]["doc"].split())[[1, 3, 8]]), "pos": [o["pos"][0]["doc"]], "neg": [d["doc"] for d in o["neg"]]} for o in toy_groups(48, negatives=2)]
    return make_groups(rows, "bge")


def trainer_in(folder, loss, model=None, groups=None, callbacks=None, **more):
    options = dict(precision="fp32", learning_rate=5e-3, per_device_train_batch_size=16, num_train_epochs=2, logging_steps=1, seed=1, tokens_per_forward=200)
    model = model or add_heads(tiny_model(hidden_dropout_prob=0.1), multi=16)
    return Trainer(model, TrainingArguments(str(folder), **options | more), groups or shared_words(), loss=loss, callbacks=callbacks)


def weights(trainer): return torch.cat([o.detach().flatten() for o in trainer.loss.parameters()])
def logged(trainer): return [{k: v for k, v in o.items() if "." in k or k == "loss"} for o in trainer.state.log_history if "loss" in o]


@pytest.mark.parametrize("more", [{}, {"cache_gradients": True, "forward": "bucketed"}], ids=["packed", "cached"])
def test_resumed_equals_uninterrupted(tmp_path, more):
    "Bit for bit, heads and learned temperature with it; self-distillation begins at the step at which it would have, not anew."
    def loss(): return M3(InfoNCE(0.1), self_distill=True, self_distill_start=5, learn_temperature=True)
    whole = trainer_in(tmp_path / "whole", loss(), **more)
    before = {name: [o.clone() for o in head.parameters()] for name, head in heads_of(whole.model).items()}
    whole.train()
    for name, head in heads_of(whole.model).items(): assert all((o - old).abs().max() > 1e-3 for o, old in zip(head.parameters(), before[name])), name
    cut = dict(save_strategy="steps", save_steps=2, **more)
    with pytest.raises(MemoryError): trainer_in(tmp_path / "cut", loss(), callbacks=[Die(5)], **cut).train()
    assert last_checkpoint(tmp_path / "cut").endswith("checkpoint-4")
    again = trainer_in(tmp_path / "cut", loss(), **cut)
    again.train(resume=True)
    assert torch.equal(weights(again), weights(whole)) and logged(again) == logged(whole)
    assert ["dense.from_mix" in o for o in logged(whole)] == [False] * 4 + [True] * 2


def test_learns_and_is_measured(tmp_path):
    "The loss falls, the head that is off stays as it was, and every similarity finds more than before."
    model = add_heads(tiny_model(), multi=16)
    test, still = toy_groups(20, seed=2), [o.clone() for o in heads_of(model)["lexical"].parameters()]
    before = evaluate_m3(model, test, toy_corpus(), (1, 0, 1), progress=False)
    trainer = trainer_in(tmp_path, M3(InfoNCE(0.1), heads=("dense", "multi")), model, toy_groups(48, negatives=2), num_train_epochs=6)
    trainer.train()
    losses = [o["loss"] for o in logged(trainer)]
    assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.2
    assert all(torch.equal(o, old) for o, old in zip(heads_of(model)["lexical"].parameters(), still))
    after = evaluate_m3(model, test, toy_corpus(), (1, 0, 1), progress=False)
    for name in ("dense", "multi", "mix"): assert after[name].metrics["ndcg@10"] > before[name].metrics["ndcg@10"], name
    assert {*after} == {"dense", "lexical", "multi", "mix"}
