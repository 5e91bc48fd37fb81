"Evaluations that others run, on toy data."
import json

import pytest

from nixietune.core import InputError
from nixietune.display import quiet
from nixietune.evaluation import evaluate
from nixietune.suites import as_printed, evaluate_msmarco, evaluate_mteb, MtebEncoder, mteb_task
from nixietune.testing import tiny_model, toy_corpus, toy_groups

HERE = "mteb is in the dev extra; this environment does not have it"


def test_msmarco_by_its_definition(tmp_path):
    "MRR and capped recall of the script, counted by hand, with two positives and one that is not in the corpus."
    corpus, groups = toy_corpus()["text"], toy_groups(30)
    rows = [dict(query=o["query"], positive=[o["pos"][0]["doc"], corpus[i]]) for i, o in enumerate(groups)]
    rows[0]["positive"].append("nowhere")
    (tmp_path / "queries.jsonl").write_text("".join(json.dumps(o) + "\n" for o in rows))
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(dict(content=o)) + "\n" for o in corpus))
    model = tiny_model(prompts={"query": "ask: "})
    with quiet(): found = evaluate_msmarco(model, tmp_path / "queries.jsonl", tmp_path / "corpus.jsonl", progress=False)
    plain = tiny_model()
    q, d = plain.encode([o["query"] for o in rows], normalize_embeddings=True), plain.encode(corpus, normalize_embeddings=True)
    mrr, recall = dict.fromkeys((1, 10, 100), 0), dict.fromkeys((1, 10, 100), 0)
    for scores, row in zip(q @ d.T, rows):
        ranking, labels = [corpus[i] for i in (-scores).argsort(kind="stable")[:100]], set(row["positive"])
        for k in mrr:
            hits = [rank for rank, o in enumerate(ranking[:k], 1) if o in labels]
            mrr[k] += 1 / hits[0] / len(rows) if hits else 0
            recall[k] += len(hits) / min(k, len(labels)) / len(rows)
    expected = {f"MRR@{k}": v for k, v in mrr.items()} | {f"Recall@{k}": v for k, v in recall.items()}
    assert as_printed(found) == pytest.approx(expected, abs=1e-6) and "Capped recall@100" in repr(found)


def test_a_local_task_of_mteb(tmp_path):
    "mteb's scores of our own problem are ours, prompts included, and a model that was trained further is not taken for the old one."
    pytest.importorskip("mteb", reason=HERE)
    model, groups, corpus = tiny_model(prompts={"query": "find: ", "document": "text: "}), toy_groups(30), toy_corpus()
    with quiet(): found = evaluate_mteb(model, [mteb_task(groups, corpus, "Toy")], cache=tmp_path)
    ours = evaluate(model, groups, corpus, metrics="all", progress=False).metrics
    [scores] = found.results.task_results[0].scores["test"]
    for name, theirs in (("ndcg", "ndcg"), ("map", "map"), ("recall", "recall"), ("precision", "precision"), ("mrr", "mrr")):
        for k in (1, 3, 5, 10, 100): assert scores[f"{theirs}_at_{k}"] == pytest.approx(ours[f"{name}@{k}"], abs=2e-5), (name, k)
    assert found.scores[0]["main_score"] == scores["ndcg_at_10"] and "ndcg_at_10" in repr(found)
    first = MtebEncoder(model).mteb_model_meta
    with quiet(): model[0].auto_model.embeddings.word_embeddings.weight.data *= 1.5
    assert MtebEncoder(model).mteb_model_meta.revision != first.revision


def test_an_unknown_task(): # no network is asked for what is not known
    pytest.importorskip("mteb", reason=HERE)
    with pytest.raises(InputError, match="NoSuchTask"): evaluate_mteb(tiny_model(), ["NoSuchTask"])
