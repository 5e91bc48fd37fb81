"Every benchmark runs, small: its figures mean nothing then, but none of them is left untried."
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parents[1]


def run(tmp_path, name, *options):
    "The benchmark's output, and what it wrote."
    env = os.environ | {"NIXIETUNE_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "benchmarks" / f"{name}.py"), *options, "--tiny", "--json", str(tmp_path / "out.json")]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path, timeout=600)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"[-3000:]
    return done.stdout, json.loads((tmp_path / "out.json").read_text())


@pytest.fixture
def here(tmp_path, monkeypatch, capsys):
    "The same in this process, where a benchmark starts none of its own: what it imports is there already."
    import torch
    threads = torch.get_num_threads()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(HERE / "benchmarks")
    monkeypatch.setenv("NIXIETUNE_CACHE", str(tmp_path / "cache"))

    def run(name, *options):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *options, "--tiny", "--json", str(tmp_path / "out.json")])
        runpy.run_path(str(HERE / "benchmarks" / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out, json.loads((tmp_path / "out.json").read_text())

    yield run
    torch.set_num_threads(threads)


def test_training(tmp_path):
    "All read the same batches, and with dropout off all have the same loss."
    ways = ["sentence-transformers", "packed", "cached"]
    said, found = run(tmp_path, "training", "mixed", "--device", "cpu", "--dropout", "off", "--ways", *ways)
    assert not found["wrong"] and "so are the mean losses" in said
    rows = {row["way"]: row for row in found["summary"]}
    assert [*rows] == ways and rows["packed"]["padding"] == 0 < rows["sentence-transformers"]["padding"]
    assert all(0 < row["utilisation"] < 1 and row["tokens/s"] > 0 for row in rows.values())
    assert found["facts"]["command"].startswith("python benchmarks/training.py mixed") and str(tmp_path) not in found["facts"]["command"]


def test_losses(tmp_path): assert len(run(tmp_path, "losses")[1]["rows"]) == 2


def test_data(tmp_path): assert [row["rows"] for row in run(tmp_path, "data")[1]["rows"]] == [500] * 4


def test_shortcuts(here): assert {o["way"] for o in here("shortcuts", "--seeds", "1")[1]["runs"]} == {"as usual", "attention weights not dropped", "groups of like lengths together"}


def test_quality(here, tmp_path):
    "What was run is not run again; every query of every reported run is in the file."
    options = ("--seeds", "1", "--work", str(tmp_path / "work"))
    found = here("quality", "negatives", "--arms", "none", "filtered", *options)[1]["runs"]
    assert [o["config"].get("arm") for o in found] == [None, None, "none", "filtered", "none", "filtered"]
    said, whole = here("quality", "merging", *options)
    assert whole["runs"][:len(found)] == found and {o["config"].get("what") for o in whole["runs"]} == {None, "tuned", "merged"}
    assert all(len(o["each"].split()) == 40 for o in whole["runs"] if "test" in o) and said.count("merged") >= 4


def test_choosing(here, tmp_path):
    found = here("choosing", "--work", str(tmp_path / "work"))[1]
    assert len(found["runs"]) > 3


def test_mining(tmp_path):
    found = run(tmp_path, "mining", "--work", str(tmp_path / "work"))[1]
    assert {o["way"] for o in found["summary"]} == {"nixietune", "sentence-transformers"} and found["planted"]["rows"][0]["both (default)"] == 0


def test_search(tmp_path):
    "All ways give the same answer but an index, which may miss some and says how many."
    found = run(tmp_path, "search", "--folder", str(tmp_path))[1]["rows"]
    assert [o["way"] for o in found][:2] == ["faiss, IndexFlatIP", "nixietune, torch"] and len(found) == 5
    for o in found: assert o["equal"] > 0.999 and o["difference"] < 1e-5 if "ivf" not in o["way"] else "recall@10 is" in o["said"]


def test_evaluation(tmp_path):
    "Both sides compute the same metrics."
    found = run(tmp_path, "evaluation")[1]["summary"]
    assert [o["way"] for o in found] == ["sentence-transformers", "nixietune"] and all(o["largest difference"] < 1e-4 and len(o["metrics"]) == 24 for o in found)


def test_m3(tmp_path):
    "Our side; the other one needs an environment of its own."
    found = run(tmp_path, "m3")[1]["sides"]
    assert found["ours"]["loss"] > 0 and [*found] == ["ours"]


def test_heads(here):
    found = here("heads")[1]
    assert [o["similarity"] for o in found["rows"]] == ["dense", "lexical", "multi", "mix", "dense, trained alone"] and len(found["beside"]) == 2


def test_tuning(here):
    found = here("tuning", "--seeds", "1")[1]
    assert len(found["trials"]) >= 3 and [*found["test"]] == ["tuned", "recipe"] and len(found["test"]["recipe"]["ndcg@10"]) == 2
