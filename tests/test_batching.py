"What a batch draws, and what documents are that nobody calls positive or negative."
import numpy as np
import pytest
import torch

from nixietune.batching import BatchKey, batch_labels, costs_of, counts, draw, index_groups, KeySampler, sampler_of, shortages, Source
from nixietune.groups import make_groups
from nixietune.core import InputError
from nixietune.encoder import prepare
from nixietune.losses import CoSENT, InfoNCE, Triplet
from nixietune.objectives import Objective, PerDataset
from nixietune.relation import NEG, OWN, POS, relate, SKIP
from nixietune.testing import tiny_model, toy_groups
from nixietune.training import Trainer, TrainingArguments


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch): monkeypatch.setenv("NIXIETUNE_CACHE", str(tmp_path / "cache"))


def mixed():
    "A query with a positive and a negative, one with scored documents only, one that is a text and nothing else."
    return make_groups([{"query": "a", "pos": [{"doc": "p"}], "neg": [{"doc": "n"}]},
        {"query": "b", "pos": [], "scored": [{"doc": "s1", "teacher": 0.9}, {"doc": "p", "teacher": 0.1}]}], "nixietune")


def test_scored_documents_teach_nobody_by_themselves():
    "For their own query they are left out, with their numbers; for others they are in-batch negatives like any document."
    index = index_groups(mixed())
    assert index.arrays.kind.tolist() == [POS, OWN, SKIP, SKIP]
    labels, _, documents = batch_labels(index.arrays, BatchKey(0, 0, (0, 1), 0))
    texts = [index.documents[i] for i in documents]
    relation = relate(labels)
    found = [{text: (kind, None if np.isnan(teacher) else round(teacher, 3)) for text, kind, teacher in zip(texts, kinds, teachers)}
        for kinds, teachers in zip(relation.kind.tolist(), relation.teacher.tolist())]
    assert found[0] == {"p": (POS, None), "n": (OWN, None), "s1": (NEG, None)}
    assert found[1] == {"p": (SKIP, 0.1), "n": (NEG, None), "s1": (SKIP, 0.9)}
    own = relate(labels, "own")
    assert own.kind.tolist() == [[POS, OWN], [SKIP, SKIP]]
    assert own.teacher[1].tolist() == pytest.approx([0.9, 0.1])

    torch.manual_seed(0)
    q, d = torch.randn(2, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    terms = Objective(InfoNCE(0.1))(q, d, labels)["InfoNCE"]
    assert terms.weight.tolist() == [1, 0]
    (terms.value * terms.weight).sum().backward()
    assert not q.grad[1].any() and q.grad[0].any()


@pytest.mark.parametrize("positives, negatives", [(1, 3), (2, 0), (None, None), (5, 9)])
def test_draws(positives, negatives):
    "As many as asked for and there, each once, the same for the same key, others in other epochs."
    rows = [{"query": f"q{i}", "pos": [f"p{i}{j}" for j in range(1 + i % 3)], "neg": [f"n{i}{j}" for j in range(i % 6)]} for i in range(12)]
    arrays = index_groups(make_groups(rows)).arrays
    seen = {}
    for epoch in range(40):
        for row in range(12):
            edges = draw(arrays, BatchKey(epoch, 0, (row,), 7), row, positives, negatives)
            assert len({*edges.tolist()}) == len(edges)
            kinds = arrays.kind[edges]
            assert (kinds == POS).sum() == min(1 + row % 3, positives or 9) and (kinds == OWN).sum() == min(row % 6, 9 if negatives is None else negatives)
            assert (edges == draw(arrays, BatchKey(epoch, 5, (1, row), 7), row, positives, negatives)).all()
            seen.setdefault(row, set()).update(edges.tolist())
    for row in range(12):  # in time, everything is drawn
        if negatives != 0: assert len(seen[row]) == arrays.ptr[row + 1] - arrays.ptr[row]


def test_what_is_missing_is_said(tmp_path, capsys):
    groups = make_groups([{"query": "a", "pos": ["p"], "neg": ["n"]}, {"query": "b", "pos": ["r"]}, {"query": "c", "pos": ["s"], "neg": ["t"] + [f"u{i}" for i in range(9)]}])
    arrays = index_groups(groups).arrays
    assert counts(arrays, OWN).tolist() == [1, 0, 10] and list(shortages(arrays, 1)) == [
        "1 of 3 groups have fewer than 1 negatives of their own (1 have none): they are used as they are"]
    assert list(shortages(index_groups(mixed()).arrays, 0)) == ["1 of 2 groups have no positive: a loss that contrasts learns nothing from them"]
    assert list(shortages(index_groups(make_groups([{"query": "a"}], "texts")).arrays)) == ["1 of 1 groups have no positive: a loss that contrasts learns nothing from them"]
    capsys.readouterr()
    trainer = Trainer(tiny_model(), TrainingArguments(str(tmp_path / "run"), precision="fp32"), groups)
    assert "2 of 3 groups have fewer than 7 negatives of their own (1 have none)" in capsys.readouterr().out
    assert trainer.source.draws == (1, 7)


def test_reordered_positives():
    "Long positives only, the same in an epoch for every query, as often as was asked for; the vocabulary stays."
    long, model = "one two three four five six " * 8, tiny_model()
    groups = make_groups([{"query": "q", "pos": [long], "neg": [long + "seven"]}, {"query": "r", "pos": ["short"]}])
    index = index_groups(groups)
    whole, shuffled = Source(model, index, 10_000), Source(model, index, 10_000, shuffle_ratio=0.5)
    texts = lambda source, epoch: sorted(bytes(o.numpy()) for pack in [source[BatchKey(epoch, 0, (0, 1), 3)]["packs"][0]]
        for o in pack["input_ids"][0].split(pack["cu_seq_lens_q"].diff().tolist()))
    changed = sum(texts(whole, epoch) != texts(shuffled, epoch) for epoch in range(200))
    assert 60 < changed < 140
    for epoch in range(20): assert len({*texts(whole, epoch)} & {*texts(shuffled, epoch)}) >= 4 - 1


def test_groups_without_own_negatives_say_nothing(capsys):
    assert list(shortages(index_groups(toy_groups(8, negatives=0)).arrays, 7)) == []


# ---- several data sets, batches of equal tokens

def several():
    rows = [{"query": o["query"], "pos": [i["doc"] for i in o["pos"]], "neg": [i["doc"] for i in o["neg"]]} for o in toy_groups(60)]
    groups = make_groups(rows, "bge")
    return groups.remove_columns("dataset").add_column("dataset", ["large"] * 45 + ["small"] * 15).cast(groups.features)


@pytest.mark.parametrize("mix", ["proportional", "round_robin", 1.0, 3.0])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_one_data_set_a_step(mix, ranks):
    "For all processes at once; everything is read once, if nothing else is asked; a pure function of seed and epoch."
    parts = {"large": np.arange(45), "small": np.arange(45, 60)}
    def epoch(n, seed=0):
        sampler = KeySampler(60, 4, seed, parts, mix, {"small": 2}, ranks=ranks)
        sampler.set_epoch(n)
        found = [key for (key,) in sampler]
        assert len(found) == len(sampler) and len(found) % ranks == 0
        return found
    keys = epoch(0)
    for i in range(0, len(keys), ranks): assert len({key.dataset for key in keys[i:i + ranks]}) == 1
    assert all({*key.rows} <= {*parts[key.dataset]} and 0 < len(key.rows) <= (2 if key.dataset == "small" else 4) + 1 for key in keys)
    if not isinstance(mix, float): assert sorted(row for key in keys for row in key.rows) == list(range(60))
    assert keys == epoch(0) != epoch(1) and keys != epoch(0, seed=1)


def test_more_processes_than_groups():
    with pytest.raises(InputError, match="1 group.s. for 2 processes"): [*KeySampler(1, 4, ranks=2)]


def train(tmp_path, loss, groups=None, **more):
    args = TrainingArguments(str(tmp_path / "run"), precision="fp32", learning_rate=5e-3, per_device_train_batch_size=10, num_train_epochs=2, logging_steps=1, **more)
    trainer = Trainer(tiny_model(), args, several() if groups is None else groups, loss=loss)
    trainer.train()
    return trainer


def test_a_loss_for_each_data_set(tmp_path):
    trainer = train(tmp_path, PerDataset({"large": [InfoNCE(0.1), Triplet(0.2, similarity="cos")], "small": CoSENT()}), same_dataset_within_batch=True, dataset_batch_sizes={"small": 5})
    logged = [{name for name in o if "." in name} for o in trainer.state.log_history if "loss" in o]
    assert logged.count({"small.CoSENT"}) == 6 and logged.count({"large.InfoNCE", "large.Triplet"}) == 10
    both = [o for o in trainer.state.log_history if "large.InfoNCE" in o]
    assert all(o["loss"] == pytest.approx(o["large.InfoNCE"] + o["large.Triplet"], abs=1e-3) for o in both)


@pytest.mark.parametrize("options, problem", [({}, "same_dataset_within_batch=True"), ({"same_dataset_within_batch": True, "mix": "random"}, "'round_robin' or a temperature"),
    ({"same_dataset_within_batch": True, "dataset_batch_sizes": {"huge": 2}}, "a batch size for 'huge'.*'large', 'small'")])
def test_what_does_not_fit(tmp_path, options, problem):
    with pytest.raises(InputError, match=problem): train(tmp_path, PerDataset({"large": InfoNCE(0.1), "small": CoSENT()}), **options)
    with pytest.raises(InputError, match="no loss for 'small'"): train(tmp_path, PerDataset({"large": InfoNCE(0.1)}), same_dataset_within_batch=True)


def test_batches_of_equal_tokens(tmp_path):
    "About as many tokens as asked for in each; all groups once an epoch, and as many batches in each."
    rows = [{"query": f"q{i}", "pos": ["red bird " * (1 + 9 * (i % 5 == 0))], "neg": ["a fish", "blue"]} for i in range(50)]
    trainer = train(tmp_path, InfoNCE(0.1), make_groups(rows, "bge"), tokens_per_batch=120)
    sampler = sampler_of(trainer.source, trainer.args)
    for n in range(3):
        sampler.set_epoch(n)
        keys = [key for (key,) in sampler]
        assert sorted(row for key in keys for row in key.rows) == list(range(50)) and len(keys) == len(sampler)
        tokens = [trainer.source[key]["label"]["real"] for key in keys]  # a document that several share is there once
        assert max(costs_of(trainer.source)[list(key.rows)].sum() for key in keys) < 120 + costs_of(trainer.source).max() and max(tokens) <= 150
    assert trainer.state.global_step == 2 * len(sampler)


def test_like_lengths_together(tmp_path):
    "transformers' own name for it; every group is read once, by any number of processes; less padding, other batches each epoch."
    rng = np.random.default_rng(0)
    groups = make_groups([{"query": f"q{i}", "pos": [f"{i} " + "red bird " * int(n)]} for i, n in enumerate(rng.integers(1, 30, 120))], "bge")
    facts = {order: train(tmp_path, InfoNCE(0.1), groups, train_sampling_strategy=order, forward="padded").facts for order in ("random", "group_by_length")}
    assert facts["group_by_length"]["real"] == facts["random"]["real"]
    assert facts["group_by_length"]["computed"] < 0.85 * facts["random"]["computed"]
    lengths = rng.integers(1, 100, 300)
    for ranks in (1, 3):
        sampler = KeySampler(300, 7, order="group_by_length", lengths=lengths, ranks=ranks)
        keys = [key for (key,) in sampler]
        assert sorted(row for key in keys for row in key.rows) == list(range(300)) and len(keys) == len(sampler)
        sampler.set_epoch(1)
        assert {frozenset(key.rows) for key in keys}.isdisjoint(frozenset(key.rows) for (key,) in sampler)


def test_prompts_of_data_sets(tmp_path):
    "Before queries and documents of one data set; a group's own wins; a text that two read behind two prompts is two documents."
    groups, prompts = several(), {"large": {"query": "a b: ", "document": "c: "}, "small": {"query": "d: "}}
    model = tiny_model(prompts={"query": "e: ", "document": ""})
    both = index_groups(groups, model=model, prompts=prompts)
    twice = [text for text in {*both.documents} if both.documents.count(text) == 2]
    assert twice and len({*zip(both.prompts, both.documents)}) == len(both.documents)
    labels, _, d = batch_labels(both.arrays, BatchKey(0, 0, tuple(range(len(groups))), 0))
    kind, names = relate(labels).kind, [both.documents[i] for i in d]
    for row, column in (kind == POS).nonzero().tolist(): assert not [1 for other, k in zip(names, kind[row]) if other == names[column] and k in (NEG, OWN)], "nobody's positive is a negative of its own query behind another prompt"
    everywhere = {name: o | {"document": "c: "} for name, o in prompts.items()}
    index = index_groups(groups, model=model, prompts=everywhere)
    assert {prompt for prompt, _ in index.queries} == {"a b: ", "d: "} and {*index.prompts} == {"c: "}
    trainer = train(tmp_path, InfoNCE(0.1), prompts=everywhere)
    plain = train(tmp_path, InfoNCE(0.1))
    assert trainer.facts["real"] > plain.facts["real"]
    documents = trainer.source.stores["document"]
    assert documents[0][1:3].tolist() == model.tokenizer("c:")["input_ids"][1:3]
    for wrong in ("query: ", {"query": "query: "}, {"large": "query: "}):
        with pytest.raises(InputError, match="load_encoder"): train(tmp_path, InfoNCE(0.1), prompts=wrong)


def test_a_rest_that_is_dropped_is_counted(tmp_path, capsys):
    trainer = train(tmp_path, InfoNCE(0.1), several().select(range(57)), dataloader_drop_last=True)
    assert trainer.state.global_step == 10 and "7 of 57 groups are left out of each epoch" in capsys.readouterr().out
    with pytest.raises(InputError, match="less than one batch of 10"): train(tmp_path, InfoNCE(0.1), several().select(range(9)), dataloader_drop_last=True)


def test_task_types_among_others(capsys):
    "In one batch: a query that looks at its own documents, one that has one negative, and sentences that are read as queries."
    rows = [{"query": "q0", "pos": ["p0"], "neg": ["a", "b", "c"], "type": "no_in_batch_neg"}, {"query": "q1", "pos": ["p1"], "neg": ["d", "e"], "type": "only_1neg"},
            {"query": "q2", "pos": ["p2"], "prompt": "Same? ", "type": "symmetric_sts"}, {"query": "q3", "pos": ["p3"], "type": "no_in_batch_neg sideways"}]
    index = index_groups(make_groups(rows, "bge"), model=tiny_model())
    assert "type 'sideways' of 1 groups is unknown" in capsys.readouterr().out
    assert dict(zip(index.documents, index.prompts))["p2"] == "Same? " and {*index.prompts} == {"", "Same? "}
    assert any("1 of 4 groups look at their own documents only" in o for o in shortages(index.arrays, 3))
    assert any("2 of 4 groups have fewer than 3" in o for o in shortages(index.arrays, 3)), "one is all that q1 wants"
    labels, _, d = batch_labels(index.arrays, BatchKey(0, 0, (0, 1, 2, 3), 0), 1, 7)
    relation, texts = relate(labels), [index.documents[i] for i in d]
    assert [texts[i] for i in np.flatnonzero(relation.kind[0] != SKIP)] == ["p0", "a", "b", "c"]
    assert (relation.kind[1] == OWN).sum() == 1 and (relation.kind[1] == NEG).sum() == len(texts) - 2
    assert (relation.kind[2] == NEG).sum() == len(texts) - 1
    assert (relation.kind[3] != SKIP).sum() == 1


@pytest.mark.parametrize("loss", [InfoNCE(0.1), InfoNCE(0.1, directions=("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")), InfoNCE(0.1, hardness=0.5)])
def test_a_query_alone(loss):
    "The others in the batch change neither its term nor its gradient, and it stays none of theirs."
    labels = {"q_id": torch.arange(3), "d_id": torch.arange(4), "edges": torch.tensor([[0, 0, 1, 2], [0, 1, 2, 3]]), "kind": torch.tensor([POS, OWN, POS, POS], dtype=torch.int8),
              "score": torch.full((4,), float("nan")), "teacher": torch.full((4,), float("nan")), "known": torch.zeros(2, 0, dtype=torch.int64), "alone": torch.tensor([True, False, False])}
    torch.manual_seed(0)
    q, d = torch.randn(3, 8), torch.randn(4, 8)
    terms = Objective(loss)(q, d, labels)["InfoNCE"].value
    moved = Objective(loss)(torch.cat([q[:1], torch.randn(2, 8)]), torch.cat([d[:2], torch.randn(2, 8)]), labels)["InfoNCE"].value
    assert terms[0] == pytest.approx(moved[0].item(), abs=1e-6)
    expected = torch.nn.functional.cross_entropy(torch.nn.functional.cosine_similarity(q[:1], d[:2])[None]/0.1 + getattr(loss, "hardness", 0)*torch.tensor([[0, 1.]])*torch.nn.functional.cosine_similarity(q[:1], d[:2]), torch.tensor([0]))
    if len(loss.directions) == 1: assert terms[0] == pytest.approx(expected.item(), abs=1e-5)
    assert (terms[1:] - moved[1:]).abs().min() > 1e-4


@pytest.mark.parametrize("forward", ["padded", "bucketed"])
def test_padded_to_multiples(forward):
    "Every padded forward is as long as a multiple of what was asked, and its texts stay the same."
    model = tiny_model()
    prepare(model, forward)
    index = index_groups(toy_groups(24), model=model)
    plain, rounded = (Source(model, index, 300, multiple=o) for o in (1, 8))
    key = BatchKey(0, 0, tuple(range(8)), 0)
    lengths = [[pack["input_ids"].shape[1] for pack in source[key]["packs"]] for source in (plain, rounded)]
    assert all(o % 8 == 0 for o in lengths[1]) and any(o % 8 for o in lengths[0])
    assert plain[key]["label"]["real"] == rounded[key]["label"]["real"]
