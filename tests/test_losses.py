"InfoNCE equals sentence-transformers' where both say the same thing, and knows what sentence-transformers does not: every positive there is."
import pytest
import torch
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from nixietune.batching import BatchKey, index_groups, Source
from nixietune.groups import load_groups, make_groups, write_groups
from nixietune.losses import InfoNCE
from nixietune.objectives import Objective
from nixietune.steps import Step
from nixietune.relation import relate
from nixietune.similarities import cos
from nixietune.testing import tiny_model, toy_corpus, toy_groups
from nixietune.training import Trainer, TrainingArguments

torch.set_num_threads(1)  # tiny tensors: a second thread only waits


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch): monkeypatch.setenv("NIXIETUNE_CACHE", str(tmp_path / "cache"))


def groups_of(*rows):
    "Groups from (query, positives, negatives), each a text with spaces between several."
    items = lambda docs: [{"doc": doc} for doc in docs.split()]
    return make_groups([{"query": q, "pos": items(p), "neg": items(n)} for q, p, n in rows], "nixietune", source="test")


def whole_batch(groups, model, known=(), rows=None):
    "One batch of all groups, in their order."
    source = Source(model, index_groups(groups, known, model), budget=10**6)
    return source[BatchKey(0, 0, tuple(rows or range(len(groups))), 0)]


def step_of(groups, loss, model):
    "The loss of all groups."
    batch = whole_batch(groups, model)
    return Step(model, Objective(loss))(batch["packs"], batch["label"]).item()


@pytest.mark.parametrize("negatives", [0, 2])
@pytest.mark.parametrize("kind, temperature", [("bert", 0.05), ("mpnet", 0.02)])
def test_equals_sentence_transformers(negatives, kind, temperature):
    "Value and gradients of all weights, through real batches: packed (bert), bucketed (mpnet); in double precision, to ten digits."
    things, asked = iter(toy_corpus()["text"]), toy_groups(24)["query"]
    rows = [{"query": q, "pos": [{"doc": next(things)}], "neg": [{"doc": next(things)} for _ in range(negatives)]} for q in asked]
    groups = make_groups(rows, "nixietune", source="test")
    columns = [[row["query"] for row in rows], [row["pos"][0]["doc"] for row in rows]]
    columns += [[row["neg"][i]["doc"] for row in rows] for i in range(negatives)]

    def theirs(model): return MultipleNegativesRankingLoss(model, scale=1 / temperature)([model.preprocess(o) for o in columns], None)
    def ours(model):
        batch = whole_batch(groups, model)
        return Step(model, Objective(InfoNCE(temperature)))(batch["packs"], batch["label"])
    def ours_in_double(model):
        batch = whole_batch(groups, model)
        vectors, n = Step(model, None).vectors(batch["packs"], batch["label"]["order"]), len(rows)
        return InfoNCE(temperature)(cos(vectors[:n], vectors[n:]), relate(batch["label"])).mean()

    for one, dtype, rounding in ((ours, torch.float32, 1e-6), (ours_in_double, torch.float64, 1e-10)):
        (value, gradient), (expected, expected_gradient) = (result_of(loss, tiny_model(kind).to(dtype)) for loss in (one, theirs))
        assert value > 1 and abs(value - expected) < rounding * max(1, expected)
        assert gradient.norm() > 1 and (gradient - expected_gradient).norm() < 10 * rounding * expected_gradient.norm()


def result_of(loss, model):
    "A loss's value and its gradient over all weights."
    value = loss(model)
    value.backward()
    return value.item(), torch.cat([(torch.zeros_like(o) if o.grad is None else o.grad).flatten() for o in model.parameters()])


def own_gradient(batch, loss, row=0):
    "The gradient of one query's loss with respect to the vector of every document of the batch."
    label = batch["label"]
    torch.manual_seed(0)
    q, d = torch.randn(len(label["q_id"]), 8), torch.randn(len(label["d_id"]), 8, requires_grad=True)
    (terms,) = Objective(loss)(q, d, label).values()
    terms.value[row].backward()
    return d.grad


def test_known_positives_are_never_negatives(tmp_path):
    "What answers a query in another file is not pushed away by it: its gradient is exactly zero, and without the look-up it is not."
    here = groups_of(("red", "apple", "stone"), ("blue", "sky", "cherry"), ("green", "cherry", "brick"))
    there = groups_of(("red", "cherry brick", "cloud"))
    for name, groups in (("here", here), ("there", there)): write_groups(groups, tmp_path / f"{name}.jsonl")
    here, there, both = (load_groups([tmp_path / f"{o}.jsonl" for o in names.split()]) for names in ("here", "there", "here there"))
    model = tiny_model()
    for documents, batch in ((index_groups(here).documents, whole_batch(here, model, known=[there])),
                             (index_groups(both).documents, whole_batch(both, model, rows=(0, 1, 2)))):
        at = {documents[i]: column for column, i in enumerate(batch["label"]["d_id"].tolist())}
        assert at.keys() == {"apple", "stone", "sky", "cherry", "brick"}
        for loss in (InfoNCE(0.5), InfoNCE(0.5, positives="together")):
            moved = own_gradient(batch, loss).abs().sum(1)
            assert {name for name, i in at.items() if moved[i] == 0} == {"cherry", "brick"}
        batch["label"]["known"] = batch["label"]["known"][:, :0]
        assert (own_gradient(batch, InfoNCE(0.5)).abs().sum(1) > 0).all()
    assert (own_gradient(whole_batch(here, model), InfoNCE(0.5)).abs().sum(1) > 0).all()  # nobody told of the other file


def test_a_known_positive_is_not_an_own_negative():
    "Two files disagree: a document that is positive in one and a hard negative in the other teaches nothing."
    here, there = groups_of(("red", "apple", "cherry stone"), ("blue", "sky", "")), groups_of(("red", "cherry", ""))
    for loss in (InfoNCE(0.5), InfoNCE(0.5, in_batch=False)):
        moved = own_gradient(whole_batch(here, tiny_model(), known=[there]), loss).abs().sum(1)
        assert moved[index_groups(here).documents.index("cherry")] == 0 and moved[index_groups(here).documents.index("stone")] > 0


def test_the_trainer_knows_dev_and_more(tmp_path):
    here, dev, more = groups_of(("red", "apple", "cherry plum")), groups_of(("red", "cherry", "")), groups_of(("red", "plum", ""))
    trainer = Trainer(tiny_model(), TrainingArguments(str(tmp_path)), here, dev=dev, known=[more])
    names = index_groups(here).documents
    assert {names[i] for i in trainer.source.arrays.known_doc} == {"apple", "cherry", "plum"}


def test_one_text_is_one_document():
    "The same text is encoded once, wherever it stands; a query that occurs twice knows both its answers."
    groups = groups_of(("red", "apple cherry", "stone"), ("blue", "sky", "stone apple"), ("red", "rose", "stone"))
    model = tiny_model()
    batch = whole_batch(groups, model)
    label = batch["label"]
    names = [index_groups(groups).documents[i] for i in label["d_id"]]
    assert sorted(names) == ["apple", "cherry", "rose", "sky", "stone"]
    assert sum(len(o["cu_seq_lens_q"]) - 1 for o in batch["packs"]) == 3 + 5
    assert label["q_id"][0] == label["q_id"][2] != label["q_id"][1]
    for row, answers, others in ((0, {"apple", "cherry"}, {"rose"}), (2, {"rose"}, {"apple", "cherry"})):
        moved = own_gradient(batch, InfoNCE(0.5), row).abs().sum(1)
        assert {name for name, o in zip(names, moved) if o == 0} == others  # left out, not opposed
        assert moved[[names.index(o) for o in answers]].min() > 0


def cross_entropy(q, d, pairs, temperature):
    "The seeds' formula without in-batch negatives: of (q·p, q·n_1, ...)/T the first should win."
    unit = torch.nn.functional.normalize
    q, d = unit(q, dim=-1), unit(d, dim=-1)
    return torch.stack([torch.nn.functional.cross_entropy((d[own] @ q[row] / temperature)[None], torch.tensor([0])) for row, own in pairs])


def test_own_negatives_only():
    "`in_batch=False` is FlagEmbedding's no_in_batch_neg and nixietune's `paired`: value and gradients; ragged groups are not filled up."
    groups = groups_of(("red", "apple", "stone cherry"), ("blue", "sky", "cherry"), ("green", "leaf grass", "stone sky brick"))
    batch = whole_batch(groups, tiny_model())
    label, names = batch["label"], index_groups(groups).documents
    torch.manual_seed(0)
    q, d = torch.randn(3, 8, requires_grad=True), torch.randn(len(names), 8, requires_grad=True)
    at = [{name: i for i, name in enumerate(names[i] for i in label["d_id"])}[o] for o in names]
    place = dict(zip(names, at))
    own = lambda *some: [place[o] for o in some]
    pairs = [(0, own("apple", "stone", "cherry")), (1, own("sky", "cherry")),
             (2, own("leaf", "stone", "sky", "brick")), (2, own("grass", "stone", "sky", "brick"))]
    each = cross_entropy(q, d, pairs, 0.1)
    expected = torch.stack([each[0], each[1], each[2:].mean()])  # every positive has to win, by itself
    (terms,) = Objective(InfoNCE(0.1, in_batch=False))(q, d, label).values()
    assert torch.allclose(terms.value, expected, atol=1e-6) and terms.weight.tolist() == [1, 1, 1]
    found = torch.autograd.grad(terms.value.sum(), (q, d))
    for one, other in zip(found, torch.autograd.grad(expected.sum(), (q, d))): assert torch.allclose(one, other, atol=1e-5)
    (in_batch,) = Objective(InfoNCE(0.1))(q, d, label).values()
    assert (in_batch.value > terms.value + 1e-3).all()


def test_repeated_documents_count_once():
    "A document that stands twice in a group says nothing new, in neither view."
    once = groups_of(("red", "apple cherry", "stone brick"), ("blue", "sky", "cloud"))
    twice = groups_of(("red", "apple apple cherry", "stone stone brick"), ("blue", "sky", "cloud cloud"))
    for loss in (InfoNCE(0.1), InfoNCE(0.1, in_batch=False), InfoNCE(0.1, in_batch=False, positives="together")):
        assert step_of(once, loss, tiny_model()) == pytest.approx(step_of(twice, loss, tiny_model()), abs=1e-6), loss


def test_several_losses_share_the_vectors():
    "A dict of losses gives each its weight, and the sum has the gradient of the sum."
    groups = toy_groups(8, negatives=2)
    losses = {"all": InfoNCE(0.1), "own": InfoNCE(0.05, in_batch=False)}
    model = tiny_model()
    batch = whole_batch(groups, model)
    parts = Step(model, Objective(losses, weights={"own": 0.5}))(batch["packs"], batch["label"])
    alone = {name: step_of(groups, loss, tiny_model()) for name, loss in losses.items()}
    assert parts["all"].item() == pytest.approx(alone["all"], abs=1e-6)
    assert parts["own"].item() == pytest.approx(alone["own"] / 2, abs=1e-6)
