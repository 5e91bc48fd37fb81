"""How fast are data read, and in how much memory? `python benchmarks/data.py --help`

Generates a JSON Lines file of groups in the BGE dialect (one positive and four negatives of 30 words; a million groups are
about 1 GB) and, each in a process of its own, loads it with nixietune for the first time, from the cache, and with
`datasets.load_dataset("json")` alone, and converts it to another dialect. Printed are the seconds of processor and wall time and
the peak of the memory that the process holds by itself (files that are mapped into memory are not counted).
"""
import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from datetime import date
from pathlib import Path

WAYS = ("first load", "from the cache", "datasets, json", "to another dialect")


def generate(path, groups, negatives=4, words=30, seed=0):
    "Write groups of random words; the same arguments give the same file."
    r = random.Random(seed)
    vocabulary = ["".join(r.choices("abcdefghijklmnopqrstuvwxyz", k=r.randint(2, 9))) for _ in range(20_000)]
    pool = [" ".join(r.choices(vocabulary, k=words)) for _ in range(50_000)]
    with open(path, "w") as file:
        for i in range(groups):
            pos, *neg = (f"{i} {o}" for o in r.choices(pool, k=negatives + 1))
            file.write(json.dumps({"query": f"{i} {' '.join(r.choices(vocabulary, k=5))}", "pos": [pos], "neg": neg}) + "\n")


def own_memory():
    "Bytes of memory that are this process's own: not mapped from files."
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon:", "RssShmem:")))


class Peak(threading.Thread):
    "Watches the memory while something runs."
    def __init__(self): super().__init__(daemon=True); self.most, self.done = 0, threading.Event()
    def run(self):
        while not self.done.wait(0.02): self.most = max(self.most, own_memory())


def one_run(way, path):
    "Do one thing and say what it cost."
    import datasets
    import nixietune.groups as groups
    datasets.disable_progress_bars()
    if way == "to another dialect": table = groups.load_groups(path)
    peak = Peak()
    peak.start()
    cpu, wall = time.process_time(), time.perf_counter()
    if way == "datasets, json": rows = len(datasets.load_dataset("json", data_files=str(path), split="train"))
    elif way == "to another dialect": rows = len(table); groups.write_groups(table, Path(path).with_suffix(".out.jsonl"))
    else: rows = len(groups.load_groups(path))
    found = dict(way=way, rows=rows, cpu=time.process_time() - cpu, wall=time.perf_counter() - wall)
    peak.done.set()
    return found | {"peak MB": round(max(peak.most, own_memory()) / 2**20)}


def main(o):
    from nixietune.core import runtime, versions
    from nixietune.display import Table
    with tempfile.TemporaryDirectory(dir=o.folder) as folder:
        path = Path(folder, "groups.jsonl")
        generate(path, o.groups)
        size = path.stat().st_size
        env = os.environ | {"NIXIETUNE_CACHE": f"{folder}/cache", "HF_HOME": f"{folder}/hf", "HF_DATASETS_CACHE": f"{folder}/hf"}
        rows = []
        for way in WAYS:
            done = subprocess.run([sys.executable, __file__, "--one", way, str(path)], env=env, capture_output=True, text=True)
            if done.returncode: sys.exit(f"{way} failed:\n{done.stdout}\n{done.stderr}")
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print("{way:20}{cpu:8.1f} CPU seconds {wall:8.1f} s {peak MB:6} MB".format(**rows[-1]), flush=True)
    facts = dict(groups=o.groups, megabytes=round(size / 1e6), machine=runtime().name, date=date.today().isoformat(), versions=versions())
    print(Table(rows, title=f"{o.groups:,} groups, {facts['megabytes']:,} MB, {facts['machine']}, {facts['date']}", formats={"cpu": ".1f", "wall": ".1f"}))
    if o.json: Path(o.json).write_text(json.dumps({"facts": facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--groups", type=int, default=1_000_000, help="groups in the file (%(default)s)")
    p.add_argument("--tiny", action="store_true", help="a few seconds, to see that it runs")
    p.add_argument("--folder", help="where to work; a temporary folder without it")
    p.add_argument("--json", help="where to write everything")
    p.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = p.parse_args()
    if options.tiny: options.groups = 500
    if options.one: print(json.dumps(one_run(*options.one)))
    else: main(options)
