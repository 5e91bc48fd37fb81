"The command line on a user's own files: what it says, what it writes, and what it leaves behind when the input is bad (nothing)."
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from nixietune.cli import main
from nixietune.groups import load_groups, write_groups
from nixietune.testing import tiny_model, toy_corpus, toy_groups

torch.set_num_threads(1)  # tiny tensors: a second thread only waits
YAML = """
# as a user writes it
groups: toy.jsonl
corpus: corpus.jsonl
model: tiny
output: out
epochs: 1
batch_size: 16
learning_rate: 5e-3
temperature: 0.1
precision: fp32
"""


def write_lines(path, rows): path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A folder as a user has it: a model, groups in two dialects, a corpus, settings."
    folder = tmp_path_factory.mktemp("user")
    tiny_model(prompts={"query": "q: ", "document": ""}).save_pretrained(str(folder / "tiny"))
    groups = [(o["query"], o["pos"][0]["doc"], o["neg"][0]["doc"]) for o in toy_groups(120)]
    write_lines(folder / "toy.jsonl", ({"query": q, "pos": [{"doc": p, "score": 1.0}], "neg": [{"doc": n}]} for q, p, n in groups))
    write_lines(folder / "bge.jsonl", ({"query": q, "pos": [p], "neg": [n]} for q, p, n in groups))
    write_lines(folder / "corpus.jsonl", ({"_id": i, "text": text} for i, text in zip(toy_corpus()["doc_id"], toy_corpus()["text"])))
    (folder / "run.yaml").write_text(YAML)
    return folder


@pytest.fixture(autouse=True)
def folder(made, tmp_path, monkeypatch):
    "A copy of it to work in."
    shutil.copytree(made, tmp_path / "user")
    monkeypatch.setenv("NIXIETUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path / "user")
    return tmp_path / "user"


def command(*arguments):
    "The installed command in a process of its own; whatever asks a hub is refused, and seen."
    env = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")}
    env |= {"OMP_NUM_THREADS": "1", "HF_ENDPOINT": "http://127.0.0.1:9", "COLUMNS": "200"}
    done = subprocess.run([Path(sys.executable).with_name("nixietune"), *arguments], capture_output=True, text=True, env=env, timeout=300)
    assert "127.0.0.1" not in done.stderr and "Retrying" not in done.stderr, done.stderr
    return done.returncode, done.stdout, done.stderr


def everything(folder): return sorted(str(o.relative_to(folder)) for o in folder.rglob("*"))


def test_help():
    status, said, _ = command("--help")
    assert status == 0 and [o for o in ("demo", "train", "evaluate") if not re.search(rf"^ +{o} +\w", said, re.M)] == []


def test_msmarco(folder):
    "The command that seed 001 prints, with data that is here; --fp16 without a GPU is said, not refused."
    write_lines(folder / "content.jsonl", [dict(content=o) for o in toy_corpus()["text"]])
    write_lines(folder / "dev.jsonl", [dict(query=o["query"], positive=[d["doc"] for d in o["pos"]]) for o in toy_groups(30)])
    more = ["--query_data", "dev.jsonl", "--corpus_data", "content.jsonl", "--max_query_length", "128", "--output", "msmarco"]
    assert main(["msmarco", "--encoder", "tiny", "--fp16", "--add_instruction", "--k", "100", *more]) == 0
    figures = json.loads((folder / "msmarco" / "metrics.json").read_text())
    assert [*figures["as the script prints them"]] == ["MRR@1", "MRR@10", "MRR@100", "Recall@1", "Recall@10", "Recall@100"]
    assert figures["as the script prints them"]["Recall@100"] == figures["metrics"]["recall_cap@100"] and figures["info"]["queries"] == 30
    assert len((folder / "msmarco" / "run.trec").read_text().splitlines()) == 3000


def test_all_metrics(folder):
    assert main(["evaluate", "--model", "tiny", "--groups", "bge.jsonl", "--corpus", "corpus.jsonl", "--metrics", "all", "--output", "all"]) == 0
    assert len(json.loads((folder / "all" / "metrics.json").read_text())["metrics"]) == 42
    assert main(["evaluate", "--model", "tiny", "--groups", "bge.jsonl", "--corpus", "corpus.jsonl", "--metrics", "bleu@1"]) == 2


def test_train_and_evaluate(folder):
    "From a settings file to a model, figures and a report; the saved model is measured again, on the other dialect, in another process."
    status, said, errors = command("train", "run.yaml", "--epochs", "8")
    assert status == 0, errors
    assert "120 groups, read as nixietune" in said and "training on 96 groups: 8 epochs, batch 16, learning rate 0.005" in said
    assert "packed, fp32 on cpu" in said and "nDCG@10" in said and "95% interval" in said and "open report.html in a browser" in said
    out = folder / "out"
    assert sorted(o.name for o in out.iterdir()) == ["before_after.png", "evaluations", "log.jsonl", "loss.png", "metrics.json", "model", "report.html"]
    for name in ("before_after.png", "loss.png"): assert (out / name).read_bytes().startswith(b"\x89PNG\r\n")

    figures = json.loads((out / "metrics.json").read_text())
    assert figures["command"] == "nixietune train run.yaml --epochs 8"
    before, after = (figures[o]["metrics"]["ndcg@10"] for o in ("before", "after"))
    assert after > before + 0.1 and figures["facts"]["groups"] == {"train": 96, "dev": 12, "test": 12, "corpus": 180}
    assert figures["facts"]["training"]["pairs"] == 8 * 96 and figures["recipe"]["temperature"] == 0.1
    report = (out / "report.html").read_text()
    assert report.count("data:image/png;base64,") >= 3 and "nixietune train run.yaml --epochs 8" in report
    assert not re.search(r"<(script|link|iframe)|(src|href)=[\"'](?!data:|#)|@import|url\((?!data:)", report)
    assert f"{before:.3f}" in report and f"{after:.3f}" in report

    model = SentenceTransformer(str(out / "model"), device="cpu")
    assert model.prompts == {"query": "q: ", "document": ""}
    status, said, errors = command("evaluate", "--model", "out/model", "--groups", "bge.jsonl", "--corpus", "corpus.jsonl", "--output", "again")
    assert status == 0, errors
    assert "120 groups, read as bge" in said and "120 queries over 180 documents" in said
    found = json.loads((folder / "again/metrics.json").read_text())
    queries, documents = model.encode_query(toy_groups(120)["query"]), model.encode_document(toy_corpus()["text"])
    scores, texts = queries @ documents.T, toy_corpus()["text"]
    answers = [texts.index(o["pos"][0]["doc"]) for o in toy_groups(120)]
    ranks = (scores > scores[range(120), answers][:, None] + 1e-6).sum(1) + 1
    assert found["metrics"]["mrr@10"] == pytest.approx(np.where(ranks <= 10, 1 / ranks, 0).mean(), abs=1e-6)
    assert len((folder / "again/run.trec").read_text().splitlines()) == 120 * 100
    assert f"{found['metrics']['ndcg@10']:.3f}" in said

    before = everything(folder)
    assert main(["train", "run.yaml"]) == 2  # not over an earlier run
    assert main(["train", "run.yaml", "--resume"]) == 0  # nor is a finished one begun again
    assert main(["evaluate", "--model", "out/model", "--groups", "bge.jsonl", "--output", "again"]) == 2
    assert everything(folder) == before


def test_a_collection(folder, capsys):
    "A test collection by its splits, faulty judgments left out on request."
    write_groups(load_groups("toy.jsonl").select(range(80)), "set", "beir", split="train")
    write_groups(load_groups("toy.jsonl").select(range(80, 120)), "other", "beir")
    capsys.readouterr()
    flags = "--groups set --split train --test other --corpus corpus.jsonl --model tiny --output out --precision fp32 --missing add --batch-size 16"
    assert main(["train", *flags.split()]) == 0
    assert "the judged queries of queries.jsonl with documents of corpus.jsonl" in capsys.readouterr().out
    assert json.loads((folder / "out/metrics.json").read_text())["facts"]["groups"]["test"] == 40
    with open("set/qrels/train.tsv", "a") as file: file.write("q1\td1\thigh\n")
    assert main(["evaluate", "--groups", "set", "--model", "tiny"]) == 2
    assert "the grade is .high." in capsys.readouterr().err.replace(chr(39), ".")
    assert main(["evaluate", "--groups", "set", "--model", "tiny", "--on-error", "skip"]) == 0
    assert "1 faulty row skipped" in capsys.readouterr().out


def test_bge_with_flags(folder, capsys):
    "The BGE dialect, with a dev and a test set of one's own, without a corpus, with own negatives only, in padded buckets."
    lines = (folder / "bge.jsonl").read_text().splitlines(keepends=True)
    for name, some in (("train", lines[:60]), ("dev", lines[60:70]), ("test", lines[70:])): (folder / f"{name}.jsonl").write_text("".join(some))
    flags = "--groups train.jsonl --dev dev.jsonl --test test.jsonl --dialect bge --model tiny --output out --precision fp32 --no-in-batch"
    assert main(["train", *flags.split(), "--train-group-size", "2", "--batch-size", "16", "--missing", "add", "--forward", "bucketed"]) == 0
    said = capsys.readouterr().out
    assert "60 groups, read as bge" in said or "train.jsonl: 60 groups" in said
    assert "in_batch=False" in said and "bucketed" in said and "no corpus was given" in said
    figures = json.loads((folder / "out/metrics.json").read_text())
    assert figures["facts"]["groups"]["train"] == 60 and figures["facts"]["groups"]["test"] == 50
    assert figures["facts"]["training"]["layout"] == "bucketed" and figures["recipe"]["temperature"] == 0.05


def bad_line(folder): (folder / "toy.jsonl").open("a").write('{"query": "x", "pos": [')
def short_corpus(folder): write_lines(folder / "corpus.jsonl", [{"_id": "d1", "text": "nothing of what is asked for"}])
def empty_model(folder): (folder / "empty").mkdir()
def output_is_a_file(folder): (folder / "out").write_text("mine")
def nothing(folder): pass
def unknown_setting(folder): (folder / "run.yaml").write_text(YAML + "lerning_rate: 1e-5\n")
def wrong_kind(folder): (folder / "run.yaml").write_text(YAML + "seed: [1]\n")
def not_yaml(folder): (folder / "run.yaml").write_text("groups: [toy.jsonl\n")


@pytest.mark.parametrize("spoil, flags, found", [
    (bad_line, "", "toy.jsonl:121: not JSON"),
    (short_corpus, "", "are not in the corpus"),
    (unknown_setting, "", "run.yaml: no setting 'lerning_rate'"),
    (wrong_kind, "", "seed is [1]; expected a whole number"),
    (not_yaml, "", "run.yaml: cannot be read"),
    (nothing, "--groups none.jsonl", "none.jsonl: no such file"),
    (nothing, "--dialect trec", "expected"),
    (nothing, "--model ./none", "no such folder"),
    (nothing, "--model toy.jsonl", "toy.jsonl: "),
    (empty_model, "--model ./empty", "empty: "),
    (output_is_a_file, "", "out: "),
    (nothing, "--dev toy.jsonl", "dev without test"),
    (nothing, "--epochs many", "epochs is 'many'; expected a number"),
    (nothing, "--epochs 0", "epochs is "),
    (nothing, "--epochs nan", "epochs is "),
    (nothing, "--batch-size 0", "batch_size is "),
    (nothing, "--batch-size 1.5", "batch_size is '1.5'; expected a whole number"),
    (nothing, "--learning-rate -1", "learning_rate is "),
    (nothing, "--temperature 0", "temperature"),
    (nothing, "--positives-per-query 0", "positives_per_query is "),
    (nothing, "--train-group-size 0", "train_group_size is "),
    (nothing, "--accumulate 0", "accumulate is "),
    (nothing, "--save-steps -1", "save_steps is "),
    (nothing, "--seed -1", "seed is "),
    (nothing, "--max-length 9999", "max_length=9999; expected at most 130"),
    (nothing, "--dropout 1", "dropout"),
    (nothing, "--precision int8", "precision='int8'"),
    (nothing, "--forward fast", "forward='fast'"),
    (nothing, "--missing drop", "missing"),
], ids=lambda o: o.__name__ if callable(o) else o)
def test_bad_input(folder, capsys, spoil, flags, found):
    "Exit code 2, one message that says what and where, no traceback, and not a file more than before."
    spoil(folder)
    before = everything(folder)
    assert main(["train", "run.yaml", *flags.split()]) == 2
    said = capsys.readouterr().err
    message = said[said.index("nixietune: "):]
    assert found in message and "Traceback" not in said, said
    assert everything(folder) == before


def test_bad_input_in_a_process(folder):
    "Exit code 2, one line on stderr, nothing on stdout."
    bad_line(folder)
    before = everything(folder)
    status, said, errors = command("train", "run.yaml")
    assert status == 2 and said == "" and errors.count("\n") == 1, errors
    assert errors.startswith("nixietune: toy.jsonl:121: not JSON, ") and "expected one whole JSON object a line" in errors
    assert everything(folder) == before


def test_bad_input_to_evaluate(folder, capsys):
    bad_line(folder)
    before = everything(folder)
    assert main(["evaluate", "--groups", "toy.jsonl", "--model", "tiny", "--output", "out"]) == 2
    assert "toy.jsonl:121: not JSON" in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit: main(["evaluate", "--no-such-flag"])
    assert exit.value.code == 2 and "--no-such-flag" in capsys.readouterr().err
    assert everything(folder) == before


def test_a_reader_that_goes_away(folder):
    "As with | head: no traceback, and the exit code of a program that SIGPIPE ends."
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "nixietune.cli", "completion", "zsh"], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.returncode == 141 and "Traceback" not in done.stderr, done.stderr


def test_a_folder_that_may_not_be_written_to(folder, monkeypatch, capsys):
    "Said before anything is computed; what the system refuses later is a line, too."
    usual = os.access
    (folder / "ro").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: "ro" not in str(path) and usual(path, mode))
    assert main(["evaluate", "--model", "tiny", "--groups", "bge.jsonl", "--output", "ro/here"]) == 2 and "ro: cannot be written to" in capsys.readouterr().err
    def refuse(*_, **__): raise PermissionError(13, "Permission denied", "ro/x")
    monkeypatch.setattr("nixietune.preparing.write_json_lines", refuse)
    assert main(["audit", "bge.jsonl", "--output", "rows.jsonl"]) == 2 and "nixietune: ro/x: Permission denied" in capsys.readouterr().err
