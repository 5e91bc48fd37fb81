"The numbers of `evaluate` are those of the programs that people compare with."
import json

import numpy as np
import pytest
import pytrec_eval
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

from nixietune.core import InputError
from nixietune.display import quiet
from nixietune.evaluation import ALL_METRICS, CUTOFFS, evaluate, evaluate_run, measure_run, write_trec_run
from nixietune.groups import load_corpus, load_groups, make_groups, write_groups
from nixietune.testing import tiny_model, toy_corpus, toy_groups

NAMES = {"ndcg": "ndcg_cut", "recall": "recall", "precision": "P", "map": "map_cut", "success": "success"}
TREC = {f"{ours}@{k}": f"{theirs}_{k}" for ours, theirs in NAMES.items() for k in CUTOFFS}


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
    ours = evaluate(model, groups, corpus, metrics="all")
    assert [*ours.metrics] == [*ALL_METRICS] and ours.run.rows.shape == (200, 300)
    write_trec_run(ours.run, tmp_path / "run.trec")
    with open(tmp_path / "run.trec") as file: run = pytrec_eval.parse_run(file)
    qrels = {o["query_id"]: {d["doc_id"]: int(d["score"]) for d in o["pos"] + o["neg"]} for o in groups}
    theirs = pytrec_eval.RelevanceEvaluator(qrels, {f"{o}.{','.join(map(str, CUTOFFS))}" for o in NAMES.values()} | {"recip_rank"}).evaluate(run)
    for name, key in (TREC | {"mrr@1000": "recip_rank"}).items():
        expected = np.array([theirs[q][key] for q in ours.per_query["query_id"]])
        np.testing.assert_allclose(ours.per_query[name], expected, atol=1e-6, err_msg=name)
        assert abs(ours.metrics[name] - expected.mean()) < 1e-6
    for k in CUTOFFS:  # the two that are not trec_eval's own, from their definitions
        rank, R = (np.array([f(q) for q in ours.per_query["query_id"]]) for f in (lambda q: theirs[q]["recip_rank"], lambda q: sum(g > 0 for g in qrels[q].values())))
        np.testing.assert_allclose(ours.per_query[f"mrr@{k}"], np.where(rank >= 1 / k - 1e-9, rank, 0), atol=1e-6)
        hits = np.array([theirs[q][f"P_{k}"] * k for q in ours.per_query["query_id"]])
        np.testing.assert_allclose(ours.per_query[f"recall_cap@{k}"], hits / np.minimum(R, k), atol=1e-6)


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
    ours = evaluate(model, groups, corpus, metrics="all")
    rankings = {q: [d for d, _ in ranking] for q, ranking in ours.run.items()}
    cutoffs = [*CUTOFFS]
    evaluator = InformationRetrievalEvaluator(
        {o["query_id"]: o["query"] for o in groups}, {o["doc_id"]: o["text"] for o in corpus},
        {o["query_id"]: {d["doc_id"] for d in o["pos"]} for o in groups},
        mrr_at_k=cutoffs, ndcg_at_k=cutoffs, accuracy_at_k=cutoffs, precision_recall_at_k=cutoffs, map_at_k=cutoffs)
    hits = [[dict(corpus_id=d, score=-float(i)) for i, d in enumerate(rankings[q])] for q in evaluator.queries_ids]
    theirs = evaluator.compute_metrics(hits)
    for name, key in dict(ndcg="ndcg@k", mrr="mrr@k", precision="precision@k", recall="recall@k", success="accuracy@k", map="map@k").items():
        for k in cutoffs if name != "map" else (100, 1000): assert abs(ours.metrics[f"{name}@{k}"] - theirs[key][k]) < 1e-6, (name, k)


def test_a_run_goes_out_and_comes_back(tmp_path):
    "Also one by another system, with ties, tabs and an empty line: equal scores stand in the order of their ranks."
    model, groups, corpus = random_problem(3, queries=30)
    first = evaluate(model, groups, corpus, metrics="all")
    write_trec_run(first.run, tmp_path / "run.trec")
    again = evaluate_run(tmp_path / "run.trec", groups, corpus, metrics="all")
    assert again.metrics == first.metrics and (again.per_query["top_text"] == first.per_query["top_text"]).all()
    assert again.info["relevance"] == first.info["relevance"] and again.info["corpus"] == first.info["corpus"]  # so that they may be compared
    (tmp_path / "other.run").write_text("q0\tQ0\td5\t2\t1.0\tx\n\nq0 Q0 d4 1 1.0 x\n")
    with quiet(): other = evaluate_run(tmp_path / "other.run", (None, {"q0": {"d4": 1, "d5": 0}, "q1": ["d4"]}), metrics=("mrr@10", "recall_cap@1"))
    assert other.metrics == {"mrr@10": 0.5, "recall_cap@1": 0.5} and other.info["not_in_run"] == 1


def test_folders_of_beir_and_flagembedding(tmp_path):
    "One problem in three forms gives the same numbers: groups, BEIR's folder, and the folder of FlagEmbedding's custom evaluation."
    model, records, corpus = random_problem(4, queries=40)
    groups = make_groups(records)
    write_groups(groups, tmp_path / "beir", "beir")
    custom = tmp_path / "custom"
    custom.mkdir()
    def lines(name, rows): (custom / name).write_text("".join(json.dumps(o) + "\n" for o in rows))
    lines("corpus.jsonl", [dict(id=o["doc_id"], title="document", text=o["text"].split()[1]) for o in corpus])
    lines("test_queries.jsonl", [dict(id=o["query_id"], text=o["query"]) for o in records])
    lines("test_qrels.jsonl", [dict(qid=o["query_id"], docid=d["doc_id"], relevance=int(d["score"])) for o in records for d in o["pos"] + o["neg"]])
    with quiet():
        expected = evaluate(model, groups, corpus, metrics="all").metrics
        assert evaluate(model, load_groups(tmp_path / "beir"), corpus, metrics="all").metrics == expected
        assert evaluate(model, load_groups(custom, split="test"), load_corpus(custom), metrics="all").metrics == expected
        assert evaluate(model, (custom / "test_queries.jsonl", custom / "test_qrels.jsonl"), load_corpus(custom), metrics="all").metrics == expected


def test_a_cache_is_not_shared_by_processes(tmp_path):
    with pytest.raises(InputError, match="one of them: cache"): evaluate(tiny_model(), toy_groups(4), toy_corpus(), cache=tmp_path, together=True)
