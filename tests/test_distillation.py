"Distillation from vectors: the formulas, files that do not fit, training, and what a checkpoint keeps."
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import EmbedDistillLoss

from nixietune.adapters import add_head
from nixietune.core import InputError
from nixietune.distillation import close_calls, DistillVectors, order_error, some_pairs
from nixietune.encoder import encode
from nixietune.groups import load_groups
from nixietune.losses import InfoNCE
from nixietune.objectives import Matryoshka, Objective
from nixietune.relation import example_batch
from nixietune.teachers import Beside, load_vectors, teacher_vectors
from nixietune.testing import tiny_model, toy_corpus, toy_groups
from nixietune.checkpoints import seal
from nixietune.training import OBJECTIVE, Trainer, TrainingArguments

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch): monkeypatch.setenv("NIXIETUNE_CACHE", str(tmp_path / "cache"))


def in_the_seed(S, t, dims, margin=0.015):
    "RAG-Retrieval's three terms, written out in float64, with every pair of pairs."
    S, t = S.double(), torch.nn.functional.normalize(t.double(), dim=-1)
    n = len(S)
    i, j = torch.triu_indices(n, n, 1)
    a, b = torch.triu_indices(len(i), len(i), 1)
    cosine = (1 - torch.nn.functional.cosine_similarity(S, t)).mean() if S.shape == t.shape else None
    similar, order = [], []
    for d in dims:
        s = torch.nn.functional.normalize(S[:, :d], dim=-1)
        mine, theirs = s @ s.T, t @ t.T
        similar.append(((mine - theirs) ** 2).mean())
        x, y = mine[i, j], theirs[i, j]
        label = torch.where(y[b] - y[a] < 0, 1.0, -1.0)
        order.append(((x[b] - x[a]) * label + margin).clamp(min=0).mean())
    return cosine, torch.stack(similar).mean(), torch.stack(order).mean()


@pytest.mark.parametrize("dims", [(16,), (16, 8, 3)])
@pytest.mark.parametrize("seed", range(3))
def test_formulas(dims, seed):
    torch.manual_seed(seed)
    q, d, t = torch.randn(2, 16, requires_grad=True), torch.randn(7, 16, requires_grad=True), torch.randn(9, 16)
    found = DistillVectors(dims=dims)(q, d, example_batch() | {"vectors": {"teacher": t}})
    wanted = in_the_seed(torch.cat([q, d]), t, dims)
    for (name, terms), value in zip(found.items(), wanted):
        assert terms.value.item() == pytest.approx(value.item(), abs=1e-6), name
        for mine, theirs in zip(torch.autograd.grad(terms.value.sum(), (q, d), retain_graph=True), torch.autograd.grad(value, (q, d), retain_graph=True)):
            assert torch.allclose(mine, theirs.float(), atol=1e-5), name


@pytest.mark.parametrize("n", [0, 1, 2, 3, 31, 64, 65])
@pytest.mark.parametrize("ties", [False, True])
def test_close_calls(n, ties):
    "Against every pair, with ties among the student's numbers and a margin of 0."
    s = torch.randn(n, dtype=torch.float64)
    s = s.round() if ties else s
    for margin in (0.0, 0.3):
        near = torch.tensor([[i < j and s[i].item() > s[j].item() - margin for j in range(n)] for i in range(n)]).view(n, n)
        below, above = close_calls(s, margin)
        assert below.tolist() == near.sum(1).tolist() and above.tolist() == near.sum(0).tolist()


def test_a_large_batch_stays_small():
    "512 texts: 130,816 similarities, whose pairs would be 34 GB; and a draw from them is near the exact value."
    s, t = torch.randn(130_816, requires_grad=True), torch.randn(130_816)
    with torch.profiler.profile(profile_memory=True) as seen: order_error(s, t).backward()
    held = most = 0
    for o in sorted((o for o in seen.profiler.kineto_results.events() if o.name() == "[memory]"), key=lambda o: o.start_ns()):
        held += o.nbytes()
        most = max(most, held)
    assert most < 40 * 2**20
    mine, theirs = (torch.nn.functional.normalize(torch.randn(200, 8), dim=-1) for _ in range(2))
    batch = {"q_id": torch.arange(5), "d_id": torch.arange(9)}
    exact, drawn = (order_error((mine @ mine.T)[i, j], (theirs @ theirs.T)[i, j]) for i, j in (some_pairs(200, o, batch) for o in (None, 10_000)))
    assert drawn.item() == pytest.approx(exact.item(), rel=0.03) and drawn != exact
    i, j = some_pairs(100, 300, batch)
    assert len(i) == 300 and (i != j).all() and torch.equal(i, some_pairs(100, 300, batch)[0]) and len(some_pairs(100, None, batch)[0]) == 4950


def test_direction_is_theirs():
    torch.manual_seed(0)
    q, d, t = torch.randn(4, 8), torch.randn(4, 8), torch.randn(8, 8)
    theirs = EmbedDistillLoss(tiny_model(), distance_metric="cosine").compute_loss_from_embeddings([torch.cat([q, d])], [t])
    found = DistillVectors(similarity=0, order=0)(q, d, example_batch() | {"vectors": {"teacher": t}})
    assert found.keys() == {"direction"} and found["direction"].value.item() == pytest.approx(theirs.item(), abs=1e-6)


# ---- files

def test_files_that_do_not_fit(tmp_path):
    groups, path = toy_groups(6), tmp_path / "teacher"
    vectors = teacher_vectors(groups, tiny_model(seed=3), path, dtype="float16")
    assert vectors[[0]].dtype == np.float32 and len(pickle.dumps(vectors)) < 600
    again = pickle.loads(pickle.dumps(vectors))
    assert np.array_equal(again[again.rows_of(groups["query"][:], "query")], vectors[vectors.rows_of(groups["query"][:], "query")])
    with pytest.raises(InputError, match="54 of 60 queries have no vector"): teacher_vectors(toy_groups(60), tiny_model(seed=3), path, dtype="float16")
    with pytest.raises(InputError, match="holds float16 numbers"): teacher_vectors(groups, tiny_model(seed=3), path)

    np.save(path / "keys.npy", np.load(path / "keys.npy")[::-1])  # rows in another order
    with pytest.raises(InputError, match="texts is .*about.json says"): load_vectors(path)
    (path / "about.json").unlink()
    with pytest.raises(InputError, match="that teacher_vectors wrote"): load_vectors(path)
    with pytest.raises(InputError, match="no such file"): load_vectors(tmp_path / "nothing.npy", ["a"])

    rows = [{"query": "a"}, {"query": "b"}]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(o) + "\n" for o in rows))
    np.zeros((2, 3), np.float32).tofile(tmp_path / "raw")
    assert load_vectors(tmp_path / "raw", tmp_path / "texts.jsonl", dim=3).shape == (2, 3)
    with pytest.raises(InputError, match="texts stand twice"): load_vectors(tmp_path / "raw", ["a", "a"], dim=3)
    with pytest.raises(InputError, match="24 bytes; expected 16"): load_vectors(tmp_path / "raw", ["a", "b"], dim=2)
    with pytest.raises(InputError, match="no texts"): load_vectors(tmp_path / "raw")
    (tmp_path / "texts.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(InputError, match="texts.jsonl:1: no `query`"): load_vectors(tmp_path / "raw", tmp_path / "texts.jsonl", dim=3)
    np.save(tmp_path / "whole.npy", np.zeros((2, 3), np.int64))
    with pytest.raises(InputError, match="floating-point"): load_vectors(tmp_path / "whole.npy", ["a", "b"])


def test_interrupted_writing_leaves_nothing(tmp_path, monkeypatch):
    import nixietune.teachers as module
    calls = []
    def broken(*args, **kwargs):
        calls.append(1)
        if len(calls) > 1: raise KeyboardInterrupt
        return encode(*args, **kwargs)
    monkeypatch.setattr(module, "encode", broken)
    with pytest.raises(KeyboardInterrupt): teacher_vectors(toy_groups(6), tiny_model(), tmp_path / "teacher", piece=3)
    assert list(tmp_path.glob("teacher*")) == []


# ---- training

def test_several_teachers_of_different_width():
    groups = toy_groups(4)
    wide = add_head(tiny_model(seed=1), 48)
    import tempfile
    with tempfile.TemporaryDirectory() as folder:
        both = [teacher_vectors(groups, o, f"{folder}/{i}") for i, o in enumerate((tiny_model(seed=2), wide))]
        documents = [o[0]["doc"] for o in groups["pos"]]
        found = Beside(both, groups["query"][:], documents)([0, 2], [1])
    assert found.shape == (3, 80)
    assert np.allclose((found[:, :32] ** 2).sum(1), 1, atol=1e-5) and np.allclose((found[:, 32:] ** 2).sum(1), 1, atol=1e-5)


def run(folder, model, loss, groups, vectors=None, resume=False, **more):
    args = TrainingArguments(str(folder), precision="fp32", learning_rate=5e-3, per_device_train_batch_size=16, num_train_epochs=3, logging_steps=1, seed=1, **more)
    trainer = Trainer(model, args, groups, loss=loss, teachers=vectors)
    trainer.train(resume)
    return trainer


@pytest.mark.parametrize("how", ["head", "project", "neither"])
def test_a_student_learns_its_teacher(tmp_path, how):
    "Its vectors come near the teacher's; texts alone are enough, without a positive."
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"query": o}) + "\n" for o in toy_corpus()["text"]))
    groups = load_groups(tmp_path / "texts.jsonl")
    vectors = teacher_vectors(groups, add_head(tiny_model(seed=5), 40), tmp_path / "teacher")
    student = tiny_model("static")
    loss = {"head": DistillVectors(dims=(40, 20)), "project": DistillVectors(project=(32, 40)), "neither": DistillVectors(direction=0, dims=(32, 8))}[how]
    if how == "head": add_head(student, 40)
    trainer = run(tmp_path / "run", student, loss, groups, vectors)
    logged = [o for o in trainer.state.log_history if "loss" in o]
    assert logged[-1]["loss"] < 0.5 * logged[0]["loss"]
    assert {f"DistillVectors.{name}" for name in loss.weights} <= logged[0].keys()
    student.save_pretrained(str(tmp_path / "model"))
    assert SentenceTransformer(str(tmp_path / "model"), device="cpu").encode(["a"]).shape == (1, 40 if how == "head" else 32)


@pytest.mark.parametrize("loss", [lambda: Objective({"contrast": InfoNCE(0.1), "teacher": DistillVectors(project=(32, 40))}, {"teacher": 0.1}),
    lambda: Matryoshka(InfoNCE(0.1), (32, 8), learn_temperature=True)], ids=["projection", "temperature"])
def test_the_objective_is_resumed(tmp_path, loss):
    "A run that is killed and goes on ends with the same weights, the objective's own among them."
    groups = toy_groups(48)
    vectors = teacher_vectors(groups, add_head(tiny_model(seed=5), 40), tmp_path / "teacher") if loss().reads else None
    def weights(trainer): return torch.cat([o.detach().flatten() for o in trainer.loss.parameters()])
    torch.manual_seed(3)
    objective = loss()
    begin = {k: o.clone() for k, o in objective.state_dict().items()}
    whole = run(tmp_path / "whole", tiny_model(hidden_dropout_prob=0.1), objective, groups, vectors, save_strategy="steps", save_steps=2)
    moved = [not torch.equal(o, begin[k]) for k, o in objective.state_dict().items()]
    assert moved and all(moved)
    for checkpoint in (tmp_path / "whole").glob("checkpoint-*"):
        if int(checkpoint.name[11:]) > 4:
            import shutil
            shutil.rmtree(checkpoint)
    torch.manual_seed(99)  # a fresh process draws another projection
    again = run(tmp_path / "whole", tiny_model(hidden_dropout_prob=0.1), loss(), groups, vectors, resume=True, save_strategy="steps", save_steps=2)
    assert torch.equal(weights(whole), weights(again))
    (tmp_path / "whole" / "checkpoint-4" / OBJECTIVE).unlink()
    seal(tmp_path / "whole" / "checkpoint-4")
    for checkpoint in (tmp_path / "whole").glob("checkpoint-[5-9]"): shutil.rmtree(checkpoint)
    with pytest.raises(InputError, match="not the parameters of this objective"):
        run(tmp_path / "whole", tiny_model(hidden_dropout_prob=0.1), loss(), groups, vectors, resume=True, save_strategy="steps", save_steps=2)


def test_a_learned_temperature_is_logged_and_moves(tmp_path):
    trainer = run(tmp_path / "run", tiny_model(), Objective(InfoNCE(0.1), learn_temperature=True), toy_groups(48))
    found = [o["temperature/InfoNCE"] for o in trainer.state.log_history if "loss" in o]
    assert abs(found[-1] / 0.1 - 1) > 0.01 and found[-1] == pytest.approx(trainer.loss.objective.temperatures[0].exp().item(), rel=0.02)


def test_what_is_missing_is_said(tmp_path):
    with pytest.raises(InputError, match="reads vectors of a teacher"): run(tmp_path / "run", tiny_model(), DistillVectors(), toy_groups(12))
    with pytest.raises(InputError, match="reads vectors of a guide"): run(tmp_path / "run", tiny_model(), InfoNCE(guided=True), toy_groups(12))


def test_training_with_a_guide(tmp_path):
    "Another guide, another run; without one that speaks, the run of the plain loss."
    groups = toy_groups(48)
    def trained(name, guided, seed=5):
        guide = teacher_vectors(groups, tiny_model(seed=seed), tmp_path / f"guide{seed}") if guided else None
        args = TrainingArguments(str(tmp_path / name), precision="fp32", learning_rate=5e-3, per_device_train_batch_size=16, num_train_epochs=2, seed=1)
        trainer = Trainer(tiny_model(), args, groups, loss=InfoNCE(0.1, guided=guided, leave_out=0.0 if guided else None), guide=guide)
        trainer.train()
        return torch.cat([o.detach().flatten() for o in trainer.model.parameters()])
    plain, five, six = trained("plain", False), trained("five", True), trained("six", True, seed=6)
    assert (plain - five).norm() > 0.01 and (five - six).norm() > 0.01 and torch.equal(five, trained("again", True))
    with pytest.raises(InputError, match="vectors of a guide, and no loss that reads them"):
        Trainer(tiny_model(), TrainingArguments(str(tmp_path / "run")), groups, loss=InfoNCE(0.1), guide=teacher_vectors(groups, tiny_model(seed=5), tmp_path / "guide5"))
