"The numbers of `evaluate` are those of the programs that people compare with."
import numpy as np
import pytest
import pytrec_eval
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

from nixietune.evaluation import evaluate, measure_run, write_trec_run
from nixietune.testing import tiny_model, toy_corpus, toy_groups

TREC = {"ndcg@10": "ndcg_cut_10", "recall@10": "recall_10", "recall@100": "recall_100", "precision@10": "P_10",
        "map@100": "map_cut_100", "success@10": "success_10"}


def random_problem(seed, queries=200, documents=300, top=4):
    "Random vectors, and grades 0 to `top` for some documents of each query."
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((documents, 16)).astype("float32")
    asked = rng.standard_normal((queries, 16)).astype("float32")
    groups = []
    for q in range(queries):
        grades = rng.integers(0, top + 1, 12)
        grades[0] = max(1, grades[0])
        graded = zip(rng.permutation(documents), grades)
        items = [dict(doc=f"document {d}", doc_id=f"d{d}", score=float(g)) for d, g in graded]
        groups.append(dict(query_id=f"q{q}", query=f"query {q}", pos=[o for o in items if o["score"]],
                           neg=[o for o in items if not o["score"]]))
    corpus = [dict(doc_id=f"d{d}", text=f"document {d}") for d in range(documents)]
    known = {f"query {q}": asked[q] for q in range(queries)} | {f"document {d}": vectors[d] for d in range(documents)}
    return (lambda texts, role: np.stack([known[o] for o in texts])), groups, corpus


@pytest.mark.parametrize("seed, top", [(0, 4), (1, 1), (2, 3)])
def test_like_trec_eval(seed, top, tmp_path):
    model, groups, corpus = random_problem(seed, top=top)
    ours = evaluate(model, groups, corpus, metrics=(*TREC, "mrr@100"))
    write_trec_run(ours.run, tmp_path / "run.trec")
    with open(tmp_path / "run.trec") as file: run = pytrec_eval.parse_run(file)
    qrels = {o["query_id"]: {d["doc_id"]: int(d["score"]) for d in o["pos"] + o["neg"]} for o in groups}
    theirs = pytrec_eval.RelevanceEvaluator(qrels, {*TREC.values(), "recip_rank"}).evaluate(run)
    for name, key in (TREC | {"mrr@100": "recip_rank"}).items():
        expected = np.array([theirs[q][key] for q in ours.per_query["query_id"]])
        np.testing.assert_allclose(ours.per_query[name], expected, atol=1e-6, err_msg=name)
        assert abs(ours.metrics[name] - expected.mean()) < 1e-6


def test_fractional_grades_are_the_same_after_scaling():
    "nDCG is a ratio: a third of every grade gives the same values, although another library computes them."
    rng = np.random.default_rng(0)
    rankings = [rng.permutation(40)[:20] for _ in range(100)]
    grades = [dict(zip(rng.permutation(60)[:9].tolist(), rng.integers(0, 5, 9).tolist())) | {3: 2} for _ in rankings]
    whole = measure_run(rankings, grades, ("ndcg@5", "ndcg@20", "recall@10"))
    thirds = measure_run(rankings, [{d: g / 3 for d, g in o.items()} for o in grades], tuple(whole))
    for name in whole: np.testing.assert_allclose(whole[name], thirds[name], atol=1e-12)


@pytest.mark.parametrize("kind", ["bert", "static"])
def test_like_sentence_transformers(kind):
    "Binary relevance, a real model with a prompt: theirs encodes padded batches, ours packs."
    model, groups, corpus = tiny_model(kind, prompts={"query": "find: "}), toy_groups(60), toy_corpus()
    ours = evaluate(model, groups, corpus, progress=False)
    ids = dict(zip(corpus["text"], corpus["doc_id"]))
    theirs = InformationRetrievalEvaluator(
        {o["query_id"]: o["query"] for o in groups}, dict(zip(corpus["doc_id"], corpus["text"])),
        {o["query_id"]: {ids[d["doc"]] for d in o["pos"]} for o in groups}, query_prompt="find: ",
        mrr_at_k=[10], ndcg_at_k=[10], accuracy_at_k=[10], precision_recall_at_k=[10, 100], map_at_k=[100])(model)
    for name, value in ours.metrics.items(): assert abs(value - theirs[f"cosine_{name}"]) < 1e-6, name


def test_several_positives_like_sentence_transformers():
    "Their MAP divides by min(R, k), trec_eval's and ours by R: the same where R is at most k."
    model, groups, corpus = random_problem(5, top=1)
    ours = evaluate(model, groups, corpus)
    rankings = {q: [d for d, _ in ranking] for q, ranking in ours.run.items()}
    evaluator = InformationRetrievalEvaluator(
        {o["query_id"]: o["query"] for o in groups}, {o["doc_id"]: o["text"] for o in corpus},
        {o["query_id"]: {d["doc_id"] for d in o["pos"]} for o in groups},
        mrr_at_k=[10], ndcg_at_k=[10], accuracy_at_k=[10], precision_recall_at_k=[10, 100], map_at_k=[100])
    hits = [[dict(corpus_id=d, score=-float(i)) for i, d in enumerate(rankings[q])] for q in evaluator.queries_ids]
    theirs = evaluator.compute_metrics(hits)
    for name, key in dict(ndcg="ndcg@k", mrr="mrr@k", precision="precision@k", recall="recall@k").items():
        assert abs(ours.metrics[f"{name}@10"] - theirs[key][10]) < 1e-6, name
    assert abs(ours.metrics["map@100"] - theirs["map@k"][100]) < 1e-6
