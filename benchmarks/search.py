"""How fast is exact search, and in how much memory? `python benchmarks/search.py --help`

Writes a memory-mapped file of half-precision vectors of length one (a million of 384 dimensions are 768 MB) and searches it for the 100 best
documents of 10,000 queries by inner product, each way in a process of its own: nixietune on torch, on faiss and on two devices that are the same
processor, an index of faiss through nixietune (which prints its recall), and plain faiss: an IndexFlatIP, to which the vectors are added in blocks.

Counted from the call to the answer: processor and wall seconds, and the peak of the memory that is the process's own (anonymous and shared pages),
less what it held just before: the queries and the libraries. Pages of the mapped file are not counted: the system takes them back when it needs them.
They are in the peak of all resident memory, ru_maxrss, which is given, too. The answers are compared: scores to 1e-5, rows as a share.

Processor seconds are comparable with `--threads 1` (the default): several OpenMP threads spin while they wait for each other, which counts as work where
others use the machine, too. Two cores are used by "two threads", which are nixietune's own, of one OpenMP thread each.
"""
import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

from data import Peak, own_memory

OURS = {
    "nixietune, torch": dict(backend="torch"), "nixietune, faiss": dict(backend="faiss"),
    "nixietune, torch, two threads": dict(backend="torch", devices=["cpu", "cpu"]),
    "nixietune, ivf": dict(approximate="ivf"), "nixietune, hnsw": dict(approximate="hnsw")}
WAYS = ["faiss, IndexFlatIP", *OURS]


def generate(folder, documents, queries, dim, seed=0):
    "Vectors of length one around a thousand centres; the same arguments give the same files."
    import numpy as np
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((1000, dim), "float32")
    def some(n):
        x = centres[rng.integers(0, len(centres), n)] + rng.standard_normal((n, dim), "float32")
        return x / np.linalg.norm(x, axis=1, keepdims=True)
    out = np.lib.format.open_memmap(folder / "documents.npy", "w+", "float16", (documents, dim))
    for s in range(0, documents, 16_384): out[s:s + 16_384] = some(min(16_384, documents - s))
    out.flush()
    np.save(folder / "queries.npy", some(queries))


def plain_faiss(queries, documents, k):
    "What one would write without nixietune."
    import faiss
    index = faiss.IndexFlatIP(queries.shape[1])
    for s in range(0, len(documents), 16_384): index.add(documents[s:s + 16_384].astype("float32"))
    return index.search(queries, k)


def one_run(way, folder, k):
    "Search once and say what it cost."
    import faiss  # noqa: F401  loaded before the clock starts, for all
    import numpy as np
    import nixietune as nt
    nt.search(np.eye(8, 384), np.eye(64, 384), 4)
    documents, queries = np.load(folder / "documents.npy", mmap_mode="r"), np.load(folder / "queries.npy")
    peak, before = Peak(), own_memory()
    peak.start()
    cpu, wall = time.process_time(), time.perf_counter()
    found = plain_faiss(queries, documents, k) if way not in OURS else nt.search(queries, documents, k, "ip", **OURS[way])
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    peak.done.set()
    for name, values in zip(("scores", "rows"), found): np.save(folder / f"{name}.{WAYS.index(way)}.npy", values)
    own, resident = max(peak.most, own_memory()) - before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return dict(way=way, cpu=round(cpu, 1), wall=round(wall, 1), own=round(own / 1e6), resident=round(resident / 1e6))


def agreement(folder, way, first):
    "The largest difference of two answers' scores, and the share of equal rows."
    import numpy as np
    read = lambda name, o: np.load(folder / f"{name}.{WAYS.index(o)}.npy")
    return dict(difference=float(np.abs(read("scores", way) - read("scores", first)).max()), equal=float((read("rows", way) == read("rows", first)).mean()))


def run_way(way, folder, o):
    "One way in a process of its own."
    env = os.environ | {"OMP_NUM_THREADS": str(o.threads)}
    done = subprocess.run([sys.executable, __file__, "--one", way, "--folder", str(folder), "-k", str(o.k)], env=env, capture_output=True, text=True)
    if done.returncode: sys.exit(f"{way} failed:\n{done.stdout}\n{done.stderr}")
    *said, found = done.stdout.splitlines()
    return json.loads(found) | ({"said": said[-1]} if said else {})


def main(o):
    from nixietune.core import runtime, versions
    from nixietune.display import Table
    if o.tiny: o.documents, o.queries, o.k, o.rounds = 20_000, 200, 10, 1
    rows = []
    with tempfile.TemporaryDirectory(dir=o.folder) as folder:
        folder = Path(folder)
        generate(folder, o.documents, o.queries, o.dim)
        for i in range(o.rounds):
            for way in o.ways:
                rows.append({"round": i} | run_way(way, folder, o) | agreement(folder, way, o.ways[0]))
                print("{way:32}{cpu:8.1f} CPU seconds {wall:8.1f} s {own:6} MB of its own, {resident:6} MB resident".format(**rows[-1]), flush=True)
    facts = dict(documents=o.documents, queries=o.queries, dimensions=o.dim, k=o.k, megabytes=round(o.documents*o.dim*2/1e6), machine=runtime().name,
                 threads=o.threads, date=date.today().isoformat(), versions=versions(), command="python " + " ".join(["benchmarks/search.py", *sys.argv[1:]]))
    found = dict(facts=facts, rows=rows)
    print(Table([{k: v for k, v in row.items() if k != "said"} for row in rows], title=f"{o.documents:,} documents, {o.queries:,} queries"))
    if o.json: Path(o.json).write_text(json.dumps(found, indent=1) + "\n")


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--documents", type=int, default=1_000_000)
    p.add_argument("--queries", type=int, default=10_000)
    p.add_argument("--dim", type=int, default=384)
    p.add_argument("-k", type=int, default=100, help="documents for each query (%(default)s)")
    p.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS[:5], help="default: all but hnsw")
    p.add_argument("--rounds", type=int, default=1)
    p.add_argument("--threads", type=int, default=1, help="OpenMP threads (%(default)s)")
    p.add_argument("--folder", help="where the vectors are written; default: where temporary files go")
    p.add_argument("--json", help="a file for the results")
    p.add_argument("--tiny", action="store_true", help="seconds, to see that it runs")
    p.add_argument("--one", help=argparse.SUPPRESS)
    return p


if __name__ == "__main__":
    options = arguments().parse_args()
    if options.one: print(json.dumps(one_run(options.one, Path(options.folder), options.k)))
    else: main(options)
