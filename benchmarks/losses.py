"""What does a loss cost, beside its twin in sentence-transformers? `python benchmarks/losses.py --help`

Forward and backward from vectors: our side makes the relation, the similarities and the loss, as a training step does; theirs computes the loss from
vectors. Each side of each round is a process of its own; printed are medians of CPU seconds, and the most memory that tensors took beyond the vectors.
"""
import argparse
import json
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from statistics import median


def batch_of(n, k, kinds):
    "Labels of n queries with k documents each."
    import torch
    rows = torch.arange(n).repeat_interleave(k)
    nan = torch.full((n * k,), float("nan"))
    return {"q_id": torch.arange(n), "d_id": torch.arange(n * k), "edges": torch.stack([rows, torch.arange(n * k)]), "kind": torch.tensor(kinds, dtype=torch.int8).repeat(n),
        "score": nan, "teacher": torch.rand(n * k), "known": torch.zeros(2, 0, dtype=torch.int64)}


def twins():
    "name -> (our loss, theirs, kinds of each query's documents, does theirs want labels?)"
    from sentence_transformers.sentence_transformer import losses as theirs
    from sentence_transformers.sentence_transformer.losses.triplet import TripletDistanceMetric
    from nixietune.losses import Contrastive, CoSENT, Cosine, InfoNCE, KL, MarginMSE, Triplet
    from nixietune.relation import OWN, POS
    every = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
    make = lambda name, **more: getattr(theirs, name)(model=None, **more)
    return {
        "InfoNCE": (InfoNCE(), make("MultipleNegativesRankingLoss"), [POS], None),
        "InfoNCE, a negative": (InfoNCE(), make("MultipleNegativesRankingLoss"), [POS, OWN], None),
        "InfoNCE, four directions": (InfoNCE(directions=every), make("MultipleNegativesRankingLoss", directions=every), [POS], None),
        "Cosine": (Cosine(), make("CosineSimilarityLoss"), [POS], "ones"),
        "Contrastive": (Contrastive(), make("ContrastiveLoss"), [POS], "ones"),
        "Triplet": (Triplet(0.3, similarity="cos"), make("TripletLoss", distance_metric=TripletDistanceMetric.COSINE, triplet_margin=0.3), [POS, OWN], None),
        "CoSENT": (CoSENT(), make("CoSENTLoss"), [POS], "score"),
        "AnglE": (CoSENT(similarity="angle"), make("AnglELoss"), [POS], "score"),
        "MarginMSE": (MarginMSE(), make("MarginMSELoss"), [POS, OWN], "teacher"),
        "KL": (KL(1.0, similarity="dot"), make("DistillKLDivLoss"), [POS, OWN], "teacher"),
    }


def peak_of(step):
    "The most memory, in bytes, that tensors held at once while `step` ran, beyond what there was: from every allocation and release that the profiler saw."
    import torch
    with torch.profiler.profile(profile_memory=True) as seen: step()
    changes = [o for o in seen.profiler.kineto_results.events() if o.name() == "[memory]"]
    held, most = 0, 0
    for o in sorted(changes, key=lambda o: o.start_ns()):
        held += o.nbytes()
        most = max(most, held)
    return most


def one(side, name, n, dim=384, threads=1):
    "CPU seconds of one forward and backward, the mean of as many as fit into half a second, and the peak of its memory."
    import torch
    from nixietune.objectives import Objective
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    ours, theirs, kinds, wants = twins()[name]
    k = len(kinds)
    q, *columns = (torch.randn(n, dim, requires_grad=True) for _ in range(k + 1))
    d, batch = torch.stack([o.detach() for o in columns], 1).flatten(0, 1).requires_grad_(), batch_of(n, k, kinds)
    if wants == "score": batch["score"] = torch.rand(n)
    labels = {"ones": torch.ones(n), "score": batch["score"], "teacher": batch["teacher"].view(n, k)}.get(wants)
    objective = Objective(ours)

    def step():
        for o in (q, d, *columns): o.grad = None
        if side == "ours": loss = sum((o.value * o.weight).sum() / n for o in objective(q, d, batch).values())
        else: loss = theirs.compute_loss_from_embeddings([q, *columns], labels)
        loss.backward()

    memory, times = peak_of(step), 0  # which is the warm-up, too
    if n <= 512: step()
    start = time.process_time()
    while (spent := time.process_time() - start) < 0.5: step(); times += 1
    return {"seconds": spent / times, "memory": memory}


def round_of(side, losses, sizes):
    "All measurements of one side, in a process of their own."
    command = [sys.executable, __file__, "--side", side, "--losses", *losses, "--sizes", *map(str, sizes)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode: sys.exit(f"{side} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def main(o):
    from nixietune.core import runtime, versions
    from nixietune.display import Table
    found, names = {"ours": [], "theirs": []}, o.losses or list(twins())
    for i in range(o.rounds):
        for side in sorted(found, reverse=i % 2):
            found[side].append(round_of(side, names, o.sizes))
            print(f"round {i + 1} of {o.rounds}, {side}: done", flush=True)
    middle = lambda side, key, what: median(one[key][what] for one in found[side])
    rows = []
    for key in (f"{name}|{n}" for name in names for n in o.sizes):
        ours, theirs, name, n = middle("ours", key, "seconds"), middle("theirs", key, "seconds"), *key.split("|")
        mine, other = middle("ours", key, "memory") / 2**20, middle("theirs", key, "memory") / 2**20
        rows.append({"loss": name, "B": int(n), "ms": 1e3 * ours, "theirs, ms": 1e3 * theirs, "time": ours / theirs, "MB": mine, "theirs, MB": other, "memory": mine / other})
    formats = {k: ".2f" for k in rows[0] if k not in ("loss", "B")}
    print(Table(rows, title=f"384 dimensions, one thread, {runtime().name}, {date.today()}; time and memory: beside theirs", formats=formats))
    facts = {"machine": runtime().name, "date": date.today().isoformat(), "rounds": o.rounds, "versions": versions()}
    if o.json: Path(o.json).write_text(json.dumps(facts | {"rows": rows, "runs": found}, indent=1) + "\n")


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--sizes", type=int, nargs="+", default=[64, 512, 2048, 8192], help="queries a batch")
    p.add_argument("--losses", nargs="+", help="names of losses (all)")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--tiny", action="store_true", help="a few seconds, to see that it runs")
    p.add_argument("--json", help="where to write everything")
    p.add_argument("--side", help=argparse.SUPPRESS)
    o = p.parse_args()
    if o.tiny: o.sizes, o.rounds, o.losses = [8], 1, o.losses or list(twins())[:2]
    if o.side: print(json.dumps({f"{name}|{n}": one(o.side, name, n) for name in o.losses for n in o.sizes}))
    else: main(o)
