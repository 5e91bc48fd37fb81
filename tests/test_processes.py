"Two processes give the loss and the gradient of one process with the whole batch."
import functools
import os
import signal
import subprocess
import sys
import time
from copy import deepcopy
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from sentence_transformers.sentence_transformer import losses as theirs
from torch.distributed.fsdp import fully_shard
from transformers import TrainerCallback

from nixietune.batching import BatchKey, batch_labels, index_groups, Source
from nixietune.checkpoints import last_checkpoint
from nixietune.distillation import DistillVectors
from nixietune.encoder import encode, encode_together
from nixietune.foreign import SentenceTransformersLoss
from nixietune.groups import make_groups, write_groups
from nixietune.losses import BatchKL, Contrastive, CoSENT, InfoNCE, KL, M3KD, Triplet
from nixietune.m3 import add_heads, M3
from nixietune.objectives import Matryoshka, Objective, PerDataset
from nixietune.remining import Remine
from nixietune.steps import Step, union
from nixietune.testing import tiny_model, toy_corpus, toy_groups
from nixietune.training import Trainer, TrainingArguments

holder = functools.cache(tiny_model)  # the model that losses of sentence-transformers are made with
EVERY = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
OBJECTIVES = {
    "InfoNCE": lambda: InfoNCE(0.1),
    "InfoNCE, others' negatives": lambda: InfoNCE(0.1, in_batch="negatives"),
    "InfoNCE, positives together, learned": lambda: Objective(InfoNCE(0.1, positives="together"), learn_temperature=True),
    "four directions, guided": lambda: InfoNCE(0.1, directions=EVERY, guided=True),
    "KL and InfoNCE": lambda: [KL(0.1), InfoNCE(0.1, in_batch=False)],
    "M3KD": lambda: M3KD(0.1),
    "Matryoshka": lambda: Matryoshka(InfoNCE(0.1), (32, 8)),
    "CoSENT": lambda: CoSENT(),
    "BatchKL": lambda: BatchKL(),
    "online contrastive": lambda: Contrastive(online=True),
    "Triplet": lambda: Triplet(0.2, True, "cos"),
    "a loss for the data set": lambda: PerDataset({"birds": InfoNCE(0.1)}),
    "vectors": lambda: DistillVectors(dims=(32, 8), project=(32, 6)),
    "three heads": lambda: M3([InfoNCE(0.1), KL(0.1)], self_distill=True),
    "sentence-transformers": lambda: [SentenceTransformersLoss(theirs.MultipleNegativesRankingLoss(holder())), SentenceTransformersLoss(theirs.SoftmaxLoss(holder(), 32, 2))],
}


def objective_of(name):
    torch.manual_seed(1)
    loss = OBJECTIVES[name]()
    return loss if isinstance(loss, Objective) else Objective(loss)


def groups():
    "Two readers share a document and a known answer, have unequal numbers of documents, and one query asks twice."
    rows = [{"query": o["query"], "pos": [i["doc"] for i in o["pos"]], "neg": [i["doc"] for i in o["neg"]][:n % 4]} for n, o in enumerate(toy_groups(9, negatives=3))]
    rows[6]["neg"].append(rows[0]["pos"][0])  # somebody else's positive
    rows[7]["pos"].append(rows[1]["pos"][0])  # an answer of two queries
    rows[8]["query"] = rows[2]["query"]  # the same query again: each one's positive is known to the other
    rows[3]["type"], rows[4]["type"] = "no_in_batch_neg", "only_1neg"
    return make_groups(rows, "bge")


def step(rows, objective, start, source, cached=False, wrap=lambda model: model):
    if isinstance(objective, M3): start = add_heads(deepcopy(start), multi=16)
    model, batch = wrap(deepcopy(start)), source[BatchKey(0, 0, rows, 0)]
    label = batch["label"] | {"dataset": "birds"}
    numbers = torch.cat([label["q_id"] + 1000, label["d_id"]])  # made from ids, so that they are the same wherever a text is read
    def drawn(n, of): return torch.stack([torch.randn(n, generator=torch.Generator().manual_seed(int(o))) for o in of])
    label["teacher"] = drawn(1, label["edges"][0] * 0 + label["d_id"][label["edges"][1]]).squeeze(1)
    label["vectors"] = {"guide": drawn(5, numbers), "teacher": drawn(6, numbers)}
    out = Step(model, objective, cached)(batch["packs"], label)
    loss = sum(out.values()) if isinstance(out, dict) else out
    loss.backward()
    own = [o.grad.flatten() if o.grad is not None else torch.zeros(o.numel()) for o in objective.parameters()]
    whole = [getattr(o.grad, "full_tensor", lambda: o.grad)().flatten() for o in model.parameters() if o.grad is not None]
    return loss.item(), torch.cat(whole), torch.cat([torch.zeros(0), *own])


def sharded(model):
    "Weights divided among the processes, layer by layer: what FSDP does."
    for layer in model[0].auto_model.encoder.layer: fully_shard(layer)
    return fully_shard(model)


def beginning(folder):
    model, _ = tiny_model(), holder()
    return model, Source(model, index_groups(groups(), model=model, folder=f"{folder}/index"), 60)


def reader(rank, parts, names, folder):
    torch.set_num_threads(1)
    start, source = beginning(folder)  # before there are processes: only the first one writes files then
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=len(parts))
    found = {}
    for name, cached in names:
        loss, gradient, own = step(parts[rank], objective_of(name), start, source, cached)
        dist.all_reduce(gradient)
        gathered = [torch.empty_like(own) for _ in parts]
        dist.all_gather(gathered, own)
        found[name, cached] = loss, gradient / len(parts), gathered  # the mean, as data-parallel training takes it
    texts = [o["query"] for o in groups()] + ["one more"]
    found["vectors"] = encode_together(start, texts, "query", progress=False), encode(start, texts, "query", progress=False)
    source.budget = (25, 60)[rank]  # unequal numbers of forwards
    for cached in (False, True):
        found["sharded", cached] = *step(parts[rank], objective_of("KL and InfoNCE"), start, source, cached, sharded)[:2], len(source[BatchKey(0, 0, parts[rank], 0)]["packs"])
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes(tmp_path):
    parts, names = [(0, 1, 2, 3, 4), (5, 6, 7, 8)], [(name, cached) for name in OBJECTIVES for cached in (False, True)]
    torch.set_num_threads(1)
    start, source = beginning(tmp_path)
    mp.spawn(reader, (parts, names, str(tmp_path)), nprocs=2)
    found = [torch.load(tmp_path / f"{i}.pt", weights_only=False) for i in range(2)]
    loss, gradient, _ = step(sum(parts, ()), objective_of("KL and InfoNCE"), start, source)
    assert len({one["sharded", False][2] for one in found}) == 2, "the processes have unequal numbers of forwards"
    for one in found:
        for cached in (False, True):
            theirs, divided, _ = one["sharded", cached]
            assert theirs == pytest.approx(loss, rel=1e-5, abs=1e-5)
            assert (divided - gradient).abs().max() <= 1e-5 * max(1, gradient.abs().max()), "weights divided among processes"
    for one in found: assert one["vectors"][0] == pytest.approx(one["vectors"][1], abs=1e-6), "every process encodes a share, and gets all"
    for name, cached in names:
        loss, gradient, own = step(sum(parts, ()), objective_of(name), start, source)
        assert gradient.abs().max() > 1e-4, name
        for one in found:
            theirs, mean, each = one[name, cached]
            assert theirs == pytest.approx(loss, rel=1e-5, abs=1e-5), name
            assert (mean - gradient).abs().max() <= 1e-5 * max(1, gradient.abs().max()), name
            for o in each: assert torch.allclose(o, own, atol=1e-5, rtol=1e-4), name


def test_the_parts_matter():
    "What the two readers share is there: without it the test above would prove less."
    arrays = index_groups(groups()).arrays
    labels = [batch_labels(arrays, BatchKey(0, 0, rows, 0))[0] for rows in ((0, 1, 2, 3, 4), (5, 6, 7, 8))]
    assert len({*labels[0]["d_id"].tolist()} & {*labels[1]["d_id"].tolist()}) >= 2 and len(labels[0]["d_id"]) != len(labels[1]["d_id"])
    whole, first = union(labels)
    alone = batch_labels(arrays, BatchKey(0, 0, tuple(range(9)), 0))[0]
    for name in ("q_id", "d_id", "kind", "edges"): assert torch.equal(whole[name], alone[name]), name
    assert {*map(tuple, whole["known"].T.tolist())} == {*map(tuple, alone["known"].T.tolist())}
    assert first.max() < sum(len(o["d_id"]) for o in labels)


RUNS = {"plain": {}, "a rest": {"groups": 43}, "accumulated": {"gradient_accumulation_steps": 2}, "cached": {"cache_gradients": True},
    "data sets": {"same_dataset_within_batch": True, "groups": 39}, "mined anew": {"remine": 3}}


ALONE = {"each alone": {"negatives_cross_device": False}} # no one process does the same; but all end with the same weights


class Die(TrainerCallback):
    "Ends the process at a step, as a machine that is taken away does."
    def __init__(self, step): self.step = step
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step: os.kill(os.getpid(), signal.SIGKILL)


def train(start, folder, name, batch_size, groups=40, die_at=None, resume=False, remine=None, **more):
    "A run of the trainer; its weights, the objective's among them."
    rows = [{"query": o["query"], "pos": [i["doc"] for i in o["pos"]], "neg": [i["doc"] for i in o["neg"]][:n % 3]} for n, o in enumerate(toy_groups(groups, negatives=2))]
    data = make_groups(rows, "bge")
    data = data.remove_columns("dataset").add_column("dataset", ["even" if n % 2 else "odd" for n in range(groups)]).cast(data.features)
    args = TrainingArguments(f"{folder}/{name}", precision="fp32", learning_rate=5e-3, per_device_train_batch_size=batch_size, num_train_epochs=2, logging_steps=1, seed=1,
        tokens_per_forward=60, **more)
    trainer = Trainer(deepcopy(start), args, data, loss=Objective([InfoNCE(0.1), CoSENT()], learn_temperature=True))
    if remine: trainer.add_callback(Remine(trainer, toy_corpus(), every_steps=remine, number=2, relative=None))
    if die_at: trainer.add_callback(Die(die_at))
    trainer.train(resume)
    return {"weights": torch.cat([o.detach().flatten() for o in trainer.loss.parameters()]), "steps": trainer.state.global_step,
        "searches": getattr(trainer.model_wrapped, "find_unused_parameters", None),
        "losses": [(o["loss"], o["InfoNCE"], o["CoSENT"]) for o in trainer.state.log_history if "loss" in o]}


def torchrun(folder, what="all"):
    "This file, in two processes."
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__, str(folder), what]
    return subprocess.run(command, capture_output=True, text=True, timeout=500)


def test_the_trainer_in_two_processes(tmp_path, monkeypatch):
    "Under torchrun, with DDP: the same steps, losses and weights as one process with batches of both."
    monkeypatch.setenv("NIXIETUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    done = torchrun(tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert torchrun(tmp_path, "die").returncode != 0  # killed in the second epoch, after the checkpoint of step 6
    assert Path(last_checkpoint(tmp_path / "killed")).name == "checkpoint-6"
    done = torchrun(tmp_path, "resume")
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(2): assert torch.equal(torch.load(tmp_path / f"killed{rank}.pt")["weights"], torch.load(tmp_path / f"plain{rank}.pt")["weights"])
    for name in ALONE:
        one, two = (torch.load(tmp_path / f"{name}{rank}.pt")["weights"] for rank in range(2))
        assert torch.equal(one, two), name
    for name, options in RUNS.items():
        (one, two), expected = (torch.load(tmp_path / f"{name}{rank}.pt") for rank in range(2)), train(tiny_model(), tmp_path, f"{name} alone", 8, **options)
        assert torch.equal(one["weights"], two["weights"]), name
        assert one["steps"] == expected["steps"], name
        assert one["searches"] is False, name  # for parameters without a gradient: the pooler is frozen
        assert torch.allclose(torch.tensor(one["losses"]), torch.tensor(expected["losses"]), atol=2e-4), name
        assert (one["weights"] - expected["weights"]).abs().max() < 1e-4, name


LAUNCHED = """import signal, sys
import nixietune as nt
signal.signal(signal.SIGINT, signal.default_int_handler)
nt.launch({"model": "tiny", "groups": ["rows.jsonl"], "output": "run", "batch_size": 8, "epochs": int(sys.argv[1]), "save_steps": 5, "learning_rate": 1e-3, "resume": True})
"""


@pytest.mark.slow
def test_a_launched_run_is_stopped(tmp_path, monkeypatch):
    "Ctrl-C in the cell that launched two processes: they end their step, write a checkpoint, and none of them stays; the same call goes on."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NIXIETUNE_CACHE", str(tmp_path / "cache"))
    tiny_model().save_pretrained("tiny")
    write_groups(toy_groups(80), "rows.jsonl")
    with open("said.txt", "w") as said: process = subprocess.Popen([sys.executable, "-c", LAUNCHED, "200"], stdout=said, stderr=said)
    while process.poll() is None and not Path("run/checkpoint-5").exists(): time.sleep(0.1)
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    assert process.wait(120) and "KeyboardInterrupt" in Path("said.txt").read_text()
    assert not [o for o in family if o.is_running()]
    stopped = int(last_checkpoint("run").rsplit("-", 1)[1])
    done = subprocess.run([sys.executable, "-c", LAUNCHED, str(-(-stopped//4) + 1)], capture_output=True, text=True, timeout=300)  # four steps an epoch
    assert done.returncode == 0 and f"going on from checkpoint-{stopped}" in done.stdout, done.stdout + done.stderr
    assert (tmp_path / "run/model").exists()


if __name__ == "__main__":
    torch.set_num_threads(1)
    start, folder, what, rank = tiny_model(), sys.argv[1], sys.argv[2], os.environ["RANK"]  # before there are processes: only the first one writes files then
    keep = dict(save_strategy="steps", save_steps=3)
    if what == "die": train(start, folder, "killed", 4, die_at=7, **keep)
    elif what == "resume": torch.save(train(start, folder, "killed", 4, resume=True, **keep), f"{folder}/killed{rank}.pt")
    else:
        for name, options in (RUNS | ALONE).items(): torch.save(train(start, folder, name, 4, **options), f"{folder}/{name}{rank}.pt")
