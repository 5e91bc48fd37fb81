"""How fast is an evaluation once the texts are encoded? `python benchmarks/evaluation.py --help`

10,000 queries with three relevant documents each over 100,000 documents, vectors of 384 dimensions made around a thousand centres: nixietune's `evaluate`
and sentence-transformers' `InformationRetrievalEvaluator` get them from stand-ins that encode nothing, and compute the same metrics (nDCG, MRR, MAP,
recall, precision, success) at the same cutoffs, up to k. Each run is a process of its own.

Counted from the call to the metrics, everything that is not encoding included (matching documents, searching, sorting, measuring, the frame of queries):
processor and wall seconds, and the peak of the memory that is the process's own, less what it held just before. The metrics are compared: to 1e-4, since
sentence-transformers compares scores in single precision and orders equal ones by the names of the documents; its MAP@k is not compared below k = 100,
where it divides by another number.
"""
import argparse
import json
import os
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

from data import Peak, own_memory

WAYS = ["sentence-transformers", "nixietune"]
KINDS = {"ndcg": "ndcg@k", "mrr": "mrr@k", "map": "map@k", "recall": "recall@k", "precision": "precision@k", "success": "accuracy@k"}


def problem(o):
    "Vectors of queries and documents, and the relevant rows of each query; the same arguments give the same numbers."
    import numpy as np
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((1000, o.dim), "float32")
    documents = centres[rng.integers(0, 1000, o.documents)] + rng.standard_normal((o.documents, o.dim), "float32")
    near = rng.integers(0, o.documents, o.queries)
    queries = documents[near] + rng.standard_normal((o.queries, o.dim), "float32") * 2
    relevant = [list({int(near[q]), *rng.integers(0, o.documents, 2).tolist()}) for q in range(o.queries)]
    return queries, documents, relevant


def ours(queries, documents, relevant, cutoffs):
    "The means, by nixietune."
    import nixietune as nt
    model = lambda texts, role: queries if role == "query" else documents
    corpus = {"doc_id": [f"d{i}" for i in range(len(documents))], "text": [f"document {i}" for i in range(len(documents))]}
    asked = ({f"q{i}": f"query {i}" for i in range(len(queries))}, {f"q{i}": [f"d{d}" for d in of] for i, of in enumerate(relevant)})
    found = nt.evaluate(model, asked, corpus, metrics=[f"{kind}@{k}" for kind in KINDS for k in cutoffs])
    return found.metrics, {k: v["cpu"] for k, v in found.seconds.items()}


def theirs(queries, documents, relevant, cutoffs):
    "The means, by sentence-transformers."
    import torch
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
    from sentence_transformers.util import cos_sim
    class Encoded(InformationRetrievalEvaluator):
        def embed_inputs(self, *args, **kwargs): return torch.from_numpy(queries)
    asked, corpus = {f"q{i}": f"query {i}" for i in range(len(queries))}, {f"d{i}": f"document {i}" for i in range(len(documents))}
    evaluator = Encoded(asked, corpus, {f"q{i}": {f"d{d}" for d in of} for i, of in enumerate(relevant)}, score_functions={"cosine": cos_sim},
                        **{name: cutoffs for name in ("mrr_at_k", "ndcg_at_k", "accuracy_at_k", "precision_recall_at_k", "map_at_k")})
    scores = evaluator.compute_all_metrics(None, corpus_embeddings=torch.from_numpy(documents))["cosine"]
    return {f"{kind}@{k}": float(scores[name][k]) for kind, name in KINDS.items() for k in cutoffs}, {}


def one_run(o):
    "One way, once."
    import ir_measures, nixietune.evaluation, pandas, sentence_transformers, torch  # noqa: E401, F401  loaded before the clock starts
    given, cutoffs = problem(o), [k for k in (1, 3, 5, 10, 100, 1000) if k <= o.k]
    run = {"nixietune": ours, "sentence-transformers": theirs}[o.one]
    small = [x[:200] for x in given]
    run(small[0][:20], small[1], [[i] for i in range(20)], [1, 10])  # whatever is loaded at first use
    peak, before = Peak(), own_memory()
    peak.start()
    cpu, wall = time.process_time(), time.perf_counter()
    metrics, parts = run(*given, cutoffs)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    peak.done.set()
    return dict(way=o.one, k=o.k, cpu=round(cpu, 2), wall=round(wall, 2), own=round((max(peak.most, own_memory()) - before) / 1e6), parts=parts, metrics=metrics)


def run_way(way, k, o):
    "One way in a process of its own."
    sizes = [str(x) for name in ("documents", "queries", "dim") for x in (f"--{name}", getattr(o, name))]
    done = subprocess.run([sys.executable, __file__, "--one", way, "-k", str(k), *sizes], env=os.environ | {"OMP_NUM_THREADS": str(o.threads)}, capture_output=True, text=True)
    if done.returncode: sys.exit(f"{way} failed:\n{done.stdout}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def summary(rows):
    "The fastest round of each way and depth, beside sentence-transformers'."
    best = {}
    for row in rows:
        if row["cpu"] <= best.get((row["k"], row["way"]), row)["cpu"]: best[row["k"], row["way"]] = row
    for (k, way), row in best.items():
        peer = best[k, WAYS[0]]
        gaps = [abs(v - peer["metrics"][name]) for name, v in row["metrics"].items() if not (name.startswith("map@") and int(name[4:]) < 100)]
        row |= {"times": round(peer["cpu"] / row["cpu"], 2), "largest difference": max(gaps)}
    return list(best.values())


def main(o):
    from nixietune.core import runtime, versions
    from nixietune.display import Table
    if o.tiny: o.documents, o.queries, o.dim, o.depths, o.rounds = 2_000, 100, 32, [10], 1
    rows = []
    for i in range(o.rounds):
        for k in o.depths:
            for way in WAYS:
                rows.append({"round": i} | run_way(way, k, o))
                print("k = {k:<6}{way:24}{cpu:8.2f} CPU seconds {wall:8.2f} s {own:6} MB of its own".format(**rows[-1]), flush=True)
    best = summary(rows)
    facts = dict(documents=o.documents, queries=o.queries, dimensions=o.dim, machine=runtime().name, threads=o.threads, rounds=o.rounds, date=date.today().isoformat(),
                 versions=versions(), command="python " + " ".join(["benchmarks/evaluation.py", *sys.argv[1:]]))
    print(Table([{k: v for k, v in row.items() if k not in ("parts", "metrics", "round")} for row in best], title=f"{o.documents:,} documents, {o.queries:,} queries"))
    if o.json: Path(o.json).write_text(json.dumps(dict(facts=facts, summary=best, rows=[{k: v for k, v in row.items() if k != "metrics"} for row in rows]), indent=1) + "\n")


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--documents", type=int, default=100_000)
    p.add_argument("--queries", type=int, default=10_000)
    p.add_argument("--dim", type=int, default=384)
    p.add_argument("-k", type=int, default=100, help=argparse.SUPPRESS)
    p.add_argument("--depths", type=int, nargs="+", default=[100], help="documents for each query (%(default)s)")
    p.add_argument("--rounds", type=int, default=2)
    p.add_argument("--threads", type=int, default=1, help="OpenMP threads (%(default)s)")
    p.add_argument("--json", help="a file for the results")
    p.add_argument("--tiny", action="store_true", help="seconds, to see that it runs")
    p.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)
    return p


if __name__ == "__main__":
    options = arguments().parse_args()
    if options.one: print(json.dumps(one_run(options)))
    else: main(options)
