"""What does `tune` find, and is it better on test than the recipe's settings? `python benchmarks/tuning.py --help`

Learning rate times temperature for wordllama's word vectors on lay terms, by successive halving on dev; then the best setting and the recipe's are trained
on all of it with further seeds and compared on test.
"""
import argparse
import json
import os
import tempfile
from dataclasses import asdict
from datetime import date
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")


def train(model, sample, rate, temperature, seed, o):
    import nixietune as nt
    with tempfile.TemporaryDirectory() as folder:
        args = nt.TrainingArguments(folder, learning_rate=rate, per_device_train_batch_size=o.batch, num_train_epochs=1, precision="fp32", seed=seed)
        nt.Trainer(model, args, sample.train, known=[sample.dev], loss=nt.InfoNCE(temperature)).train()
    return nt.evaluate(model, sample.test, sample.corpus, progress=False)


def main(o):
    import torch
    import nixietune as nt
    from nixietune.core import runtime, versions
    from nixietune.samples import Sample
    from nixietune.testing import tiny_model, toy_corpus, toy_groups
    torch.set_num_threads(1)
    fresh = lambda: tiny_model("static") if o.tiny else nt.load_encoder("wordllama", device="cpu")
    sample = Sample(toy_groups(48), toy_groups(10, seed=1), toy_groups(10, seed=2), toy_corpus(), {}) if o.tiny else nt.lay_terms()
    o.batch, rates, temperatures = (8, (0.01, 0.1), (0.1,)) if o.tiny else (128, (0.003, 0.01, 0.03, 0.1, 0.3), (0.02, 0.05, 0.1, 0.2))
    with nt.quiet(), tempfile.TemporaryDirectory() as folder:
        found = nt.tune(sample.train, fresh(), sample.corpus, sample.dev, minutes=o.minutes, learning_rates=rates, temperatures=temperatures, seeds=range(o.seeds),
                        output_dir=folder, per_device_train_batch_size=o.batch, num_train_epochs=1, precision="fp32")
        known = nt.recipe(fresh())
        settings = {"tuned": (found.best["learning_rate"], found.best["temperature"]), "recipe": (known.learning_rate, known.temperature)}
        runs = {name: [train(fresh(), sample, *both, seed, o) for seed in range(10, 10 + o.seeds + 1)] for name, both in settings.items()}
        judged = nt.compare(runs["recipe"], runs["tuned"], chosen_on=sample.dev)
    print(found)
    print(f"tuned {settings['tuned']} beside the recipe's {settings['recipe']}: {judged.verdict}")
    facts = {"tiny": o.tiny, "dev": len(sample.dev), "test": len(sample.test), "groups": len(sample.train), "batch": o.batch, "machine": runtime().name, "date": date.today().isoformat(), "versions": versions()}
    test = {name: {"settings": both, "ndcg@10": [e.metrics["ndcg@10"] for e in runs[name]]} for name, both in settings.items()}
    Path(o.json).parent.mkdir(parents=True, exist_ok=True)
    Path(o.json).write_text(json.dumps({"facts": facts, "before": found.before, "best": found.best, "skipped": found.skipped, "trials": [{k: v for k, v in asdict(t).items() if k != "seconds"} for t in found.trials],
                                        "test": test, "verdict": judged.verdict}, indent=1) + "\n")


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--minutes", type=float, default=60, help="that tuning may take (%(default)s: enough for all settings)")
    p.add_argument("--seeds", type=int, default=2, help="of each setting; one more on test (%(default)s)")
    p.add_argument("--json", default="runs/tuning.json", help="where results go (%(default)s)")
    p.add_argument("--tiny", action="store_true", help="a few seconds, to see that it runs")
    main(p.parse_args())
