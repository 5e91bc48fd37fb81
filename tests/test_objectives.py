"Matryoshka equals sentence-transformers'; cached gradients are those of the whole batch, dropout and precision included."
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses as theirs

from nixietune.batching import BatchKey, index_groups, Source
from nixietune.encoder import encode, layout_of, prepare
from nixietune.losses import Contrastive, CoSENT, InfoNCE, KL, Triplet
from nixietune.objectives import Matryoshka, Objective
from nixietune.steps import Step
from nixietune.testing import tiny_model, toy_corpus, toy_groups
from nixietune.training import Trainer, TrainingArguments

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch): monkeypatch.setenv("NIXIETUNE_CACHE", str(tmp_path / "cache"))


def gradients(model): return {name: o.grad.clone() for name, o in model.named_parameters() if o.grad is not None}


@pytest.mark.parametrize("dims, weights", [((16, 8), None), ((8, 16, 4), (1, 2, 0.5))])
def test_matryoshka(dims, weights):
    groups = toy_groups(12, negatives=0)
    columns = [groups["query"][:], [o[0]["doc"] for o in groups["pos"]]]

    def other(model):
        loss = theirs.MatryoshkaLoss(model, theirs.MultipleNegativesRankingLoss(model, scale=10), [*dims], [*weights] if weights else None)
        return loss([model.preprocess(o) for o in columns], None) / (1 if weights else len(dims))

    def ours(model):
        batch = Source(model, index_groups(groups, model=model), 10_000)[BatchKey(0, 0, tuple(range(12)), 0)]
        return sum(Step(model, Matryoshka(InfoNCE(0.1), dims, weights))(batch["packs"], batch["label"]).values())

    found = []
    for one in (ours, other):
        loss = one(model := tiny_model(hidden_size=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
        loss.backward()
        found.append((loss.item(), gradients(model)))
    (value, mine), (expected, wanted) = found
    assert value == pytest.approx(expected, abs=1e-5) and mine.keys() == wanted.keys()
    for name in mine: assert torch.allclose(mine[name], wanted[name], atol=1e-5), name


def test_matryoshka_trains_and_is_cut(tmp_path, capsys):
    "Through the trainer; the saved model is cut by plain sentence-transformers."
    model = tiny_model()
    args = TrainingArguments(str(tmp_path / "run"), precision="fp32", learning_rate=5e-3, per_device_train_batch_size=16, num_train_epochs=2, logging_steps=1)
    trainer = Trainer(model, args, toy_groups(64), loss=Matryoshka([InfoNCE(0.1), Triplet(0.2, True, "cos")], (32, 8), weights={"Triplet": 0.5}))
    trainer.train()
    said = capsys.readouterr().out
    assert "loss: 0.5 x Triplet" in said and "loss: on the first 32, 8 numbers of each vector" in said
    assert {"InfoNCE@32", "InfoNCE@8", "Triplet@32", "Triplet@8"} <= {k for o in trainer.state.log_history for k in o}
    model.save_pretrained(str(tmp_path / "model"))
    texts = toy_corpus()["text"][:5]
    whole, cut = encode(model, texts, progress=False), SentenceTransformer(str(tmp_path / "model"), device="cpu", truncate_dim=8).encode_document(texts)
    assert cut.shape == (5, 8) and abs(cut - whole[:, :8]).max() < 1e-5


@pytest.mark.parametrize("objective", [Objective(InfoNCE(0.1)), Objective([InfoNCE(0.1, in_batch=False), KL()]), Objective(Contrastive(online=True)), Objective(CoSENT()),
    Matryoshka(InfoNCE(0.1, directions=("query_to_doc", "doc_to_query")), (32, 8))], ids=lambda o: "+".join(o.weights))
@pytest.mark.parametrize("kind, forward", [("bert", "packed"), ("bert", "bucketed"), ("static", "auto"), ("mpnet", "auto")])
def test_cached_gradients(objective, kind, forward):
    "Loss and gradients of the whole batch, with dropout, in many forwards; nothing is left of the graph but the vectors."
    found = []
    for cached in (False, True):
        model = tiny_model(kind, **({} if kind == "static" else dict(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2))).train()
        if forward != "auto": prepare(model, forward)
        groups = toy_groups(16, negatives=2)
        batch = Source(model, index_groups(groups, model=model), 60)[BatchKey(0, 0, tuple(range(16)), 0)]
        batch["label"]["teacher"] = torch.rand(len(batch["label"]["kind"]), generator=torch.Generator().manual_seed(0))
        assert len(batch["packs"]) > 3 or layout_of(model).name == "text"
        torch.manual_seed(5)
        out = Step(model, objective, cached)(batch["packs"], batch["label"])
        loss = sum(out.values()) if isinstance(out, dict) else out
        loss.backward()
        found.append((loss.item(), gradients(model), torch.rand(3)))
    (value, expected, after), (cached_value, mine, cached_after) = found
    assert cached_value == pytest.approx(value, abs=1e-5) and torch.equal(after, cached_after)
    assert mine.keys() == expected.keys()
    for name in mine: assert (mine[name] - expected[name]).norm() <= 1e-4 * expected[name].norm() + 1e-7, name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_with_cached_gradients(tmp_path, precision):
    "A run ends with the same weights; memory is not asked here, see benchmarks."
    def run(name, **more):
        model = tiny_model(hidden_dropout_prob=0.1)
        args = TrainingArguments(str(tmp_path / name), precision=precision, learning_rate=5e-3, per_device_train_batch_size=16, tokens_per_forward=80,
            gradient_accumulation_steps=2, seed=1, **more)
        Trainer(model, args, toy_groups(48), loss=InfoNCE(0.1)).train()
        return torch.cat([o.detach().flatten() for o in model.parameters()])
    before, after, cached = torch.cat([o.detach().flatten() for o in tiny_model(hidden_dropout_prob=0.1).parameters()]), run("plain"), run("cached", cache_gradients=True)
    assert (after - before).norm() > 0.1 and (after - cached).norm() < 1e-3 * (after - before).norm()
