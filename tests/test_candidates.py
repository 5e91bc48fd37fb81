"Re-ranking and pairs, beside what sentence-transformers and scikit-learn compute."
import numpy as np
import pytest
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator, RerankingEvaluator
from sklearn.metrics import roc_auc_score

from nixietune.candidates import evaluate_candidates, evaluate_pairs, pair_scores
from nixietune.core import InputError
from nixietune.testing import tiny_model, toy_groups


def with_negatives(n):
    "Toy groups, each with the positives of its neighbours as negatives."
    groups = toy_groups(n)
    docs = [o["doc"] for group in groups for o in group["pos"]]
    for i, group in enumerate(groups):
        own = {o["doc"] for o in group["pos"]}
        yield dict(query_id=group["query_id"], query=group["query"], pos=[dict(doc=o) for o in own],
                   neg=[dict(doc=o) for o in dict.fromkeys(docs[i:i + 12]) if o not in own])


def test_like_the_reranking_evaluator():
    model, groups = tiny_model(), list(with_negatives(40))
    ours = evaluate_candidates(model, groups, metrics=("ndcg@10", "mrr@10", "map@1000"), progress=False)
    samples = [dict(query=o["query"], positive=[d["doc"] for d in o["pos"]], negative=[d["doc"] for d in o["neg"]]) for o in groups]
    theirs = RerankingEvaluator(samples, at_k=10)(model)
    for mine, name in (("ndcg@10", "ndcg@10"), ("mrr@10", "mrr@10"), ("map@1000", "map")): assert abs(ours.metrics[mine] - theirs[name]) < 1e-5, mine


def test_pairs_like_the_similarity_evaluator():
    model, rng = tiny_model(), np.random.default_rng(0)
    texts = [o["query"] for o in toy_groups(60)]
    rows = [dict(sentence1=texts[a], sentence2=texts[b], score=float(g)) for a, b, g in zip(rng.permutation(60), rng.permutation(60), rng.integers(0, 6, 60))]
    ours = evaluate_pairs(model, rows, symmetric=True, progress=False)
    theirs = EmbeddingSimilarityEvaluator(*([o[k] for o in rows] for k in ("sentence1", "sentence2", "score")))(model)
    assert abs(ours.metrics["spearman"] - theirs["spearman_cosine"]) < 1e-5 and abs(ours.metrics["pearson"] - theirs["pearson_cosine"]) < 1e-5
    assert abs(ours.metrics["auc"] - roc_auc_score([o["score"] > 0 for o in rows], ours.pairs["score"])) < 1e-9


@pytest.mark.parametrize("name, expected", [("cosine", 1.0), ("dot", 4.0), ("euclidean", -4.0)])
def test_the_similarity_is_the_models(name, expected):
    class Model:
        similarity_fn_name = name
        def __call__(self, texts, role): return np.array([[2.0, 0.0] if o == "a" else [4.0 if name == "euclidean" else 2.0, 0.0] for o in texts])
    assert pair_scores(Model(), ["a"], ["b"]) == pytest.approx([expected])


def test_a_score_that_is_no_number_is_refused():
    class Model:
        def predict(self, pairs, show_progress_bar): return [float("nan")] * len(pairs)
    with pytest.raises(InputError, match="scores are no numbers"): evaluate_candidates(Model(), list(with_negatives(3)))
