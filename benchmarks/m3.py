"""A step of three heads beside FlagEmbedding's: `python benchmarks/m3.py --peer PYTHON`, where PYTHON is an interpreter of an environment with FlagEmbedding 1.4.

Both train the same random XLM-RoBERTa (6 layers, 384 dimensions, no dropout) with the same heads on the same token ids: queries of 4 to 24 tokens, and
passages whose lengths are spread as those of web text are, from 16 to 256. Contrastive loss on each similarity and on their mix, with self-distillation.
Each side is a process of its own; printed are CPU seconds a step after the first, forward and backward, the most memory, and the losses, which must agree.
"""
import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")
TEMPERATURE, STEPS = 0.02, 3


def rows_of(o, special):
    "Token ids of queries and passages: [first special, ..., last special]."
    r, (first, last, words) = random.Random(0), special
    text = lambda n: [first, *(r.randrange(words, o.vocabulary) for _ in range(n - 2)), last]
    length = lambda: min(o.longest, max(16, int(r.lognormvariate(4.2, 0.7))))
    return [text(r.randint(4, 24)) for _ in range(o.queries)], [text(length()) for _ in range(o.queries*o.group)]


def prepare(o, folder):
    "Write the model, and what both sides are to read."
    from nixietune.m3 import add_heads, save_m3
    from nixietune.testing import tiny_model
    size = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64) if o.tiny else dict(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    model = tiny_model("xlm-roberta", pooling="cls", length=512, vocab_size=o.vocabulary, max_position_embeddings=520, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **size)
    save_m3(add_heads(model), f"{folder}/model")
    tokenizer = model.tokenizer
    queries, passages = rows_of(o, (tokenizer.cls_token_id, tokenizer.sep_token_id, 10))
    Path(folder, "batch.json").write_text(json.dumps({"queries": queries, "passages": passages, "cls": tokenizer.cls_token_id, "eos": tokenizer.sep_token_id, "pad": tokenizer.pad_token_id, "unk": tokenizer.unk_token_id}))


def padded(rows, pad):
    import torch
    n = max(map(len, rows))
    ids = torch.tensor([row + [pad]*(n - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": torch.tensor([[1]*len(row) + [0]*(n - len(row)) for row in rows])}


def theirs(folder, batch):
    "A function that makes one step with FlagEmbedding."
    import torch
    from FlagEmbedding.finetune.embedder.encoder_only.m3.modeling import EncoderOnlyEmbedderM3Model
    from transformers import AutoModel
    model = AutoModel.from_pretrained(folder, dtype=torch.float32)
    heads = {name: torch.nn.Linear(model.config.hidden_size, n) for name, n in (("colbert_linear", model.config.hidden_size), ("sparse_linear", 1))}
    for name, o in heads.items(): o.load_state_dict(torch.load(f"{folder}/{name}.pt", weights_only=True))
    tokenizer = SimpleNamespace(cls_token_id=batch["cls"], eos_token_id=batch["eos"], pad_token_id=batch["pad"], unk_token_id=batch["unk"])
    whole = EncoderOnlyEmbedderM3Model({"model": model, **heads}, tokenizer, temperature=TEMPERATURE, normalize_embeddings=True, unified_finetuning=True, use_self_distill=True).train()
    queries, passages = (padded(batch[o], batch["pad"]) for o in ("queries", "passages"))
    return whole, lambda: whole(queries, passages).loss


def ours(folder, batch):
    "The same with nixietune: packs of 2,048 tokens, as the trainer makes them on a processor."
    import torch
    from nixietune.encoder import budget_of, layout_of, make_features, plan_forwards
    from nixietune.losses import InfoNCE
    from nixietune.m3 import load_m3, M3
    from nixietune.steps import Step
    model, rows, Q = load_m3(folder, device="cpu"), batch["queries"] + batch["passages"], len(batch["queries"])
    plan, group = plan_forwards(layout_of(model), [len(o) for o in rows], budget_of(model)), len(batch["passages"])//Q
    packs, D = [make_features(layout_of(model), [rows[i] for i in here]) for here in plan], len(batch["passages"])
    edges = torch.stack([torch.arange(D)//group, torch.arange(D)])
    labels = {"q_id": torch.arange(Q), "d_id": torch.arange(D), "edges": edges, "kind": torch.where(torch.arange(D) % group == 0, 2, 1).to(torch.int8), "score": torch.full((D,), float("nan")),
              "teacher": torch.full((D,), float("nan")), "known": torch.zeros(2, 0, dtype=torch.int64), "order": torch.cat([torch.as_tensor(o) for o in plan])}
    step = Step(model.train(), M3(InfoNCE(TEMPERATURE, positives="together"), self_distill=True).train())
    return step, lambda: sum(step(packs, labels).values())


def one_side(o):
    "Run here: CPU seconds a step, loss, peak of memory in MB."
    import torch
    torch.set_num_threads(1)
    model, step = {"ours": ours, "theirs": theirs}[o.side](f"{o.folder}/model", json.loads(Path(o.folder, "batch.json").read_text()))
    seconds = []
    for _ in range(1 + STEPS):
        start = time.process_time()
        loss = step()
        loss.backward()
        seconds.append(time.process_time() - start)
        model.zero_grad()
    print(json.dumps({"seconds": min(seconds[1:]), "loss": loss.item(), "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024}))


def main(o):
    from nixietune.core import runtime, versions
    from nixietune.display import Table
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        prepare(o, folder)
        for side, python in (("theirs", o.peer), ("ours", sys.executable)):
            if not python: continue
            done = subprocess.run([python, __file__, "--side", side, "--folder", folder], capture_output=True, text=True)
            if done.returncode: raise SystemExit(done.stderr[-3000:])
            found[side] = json.loads(done.stdout.splitlines()[-1])
    if len(found) == 2 and abs(found["ours"]["loss"] - found["theirs"]["loss"]) > 1e-3*abs(found["theirs"]["loss"]): raise SystemExit(f"the losses differ: {found}")
    names = {"ours": "nixietune", "theirs": "FlagEmbedding"}
    print(Table([{"": names[side], "CPU s a step": one["seconds"], "peak MB": one["memory"], "loss": one["loss"]} for side, one in found.items()], formats={"CPU s a step": ".2f", "peak MB": ",.0f", "loss": ".5f"}))
    facts = {k: getattr(o, k) for k in ("queries", "group", "longest", "vocabulary", "tiny")} | {"machine": runtime().name, "date": date.today().isoformat(), "versions": versions()}
    Path(o.json).parent.mkdir(parents=True, exist_ok=True)
    Path(o.json).write_text(json.dumps({"facts": facts, "sides": found}, indent=1) + "\n")


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--peer", help="python of an environment with FlagEmbedding; without it only our side runs")
    p.add_argument("--queries", type=int, default=4, help="queries in the batch (%(default)s)")
    p.add_argument("--group", type=int, default=8, help="passages of each (%(default)s)")
    p.add_argument("--longest", type=int, default=256, help="tokens of a passage at most (%(default)s)")
    p.add_argument("--vocabulary", type=int, default=50_000, help="words; bge-m3 has 250,002 (%(default)s)")
    p.add_argument("--json", default="runs/m3.json", help="where results go (%(default)s)")
    p.add_argument("--tiny", action="store_true", help="a few seconds, to see that it runs")
    p.add_argument("--side", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    p.add_argument("--folder", help=argparse.SUPPRESS)
    o = p.parse_args()
    if o.tiny: o.vocabulary, o.longest = 500, 32
    one_side(o) if o.side else main(o)
