"nixietune audit, convert, split, compare, merge, report, completion: each on toy data, and each on its worst input."
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer

from nixietune.adapters import add_lora, save_adapter
from nixietune.cli import COMMANDS, main, parser
from nixietune.comparison import compare
from nixietune.dialects import DIALECTS
from nixietune.display import quiet
from nixietune.evaluation import evaluate
from nixietune.groups import load_groups, write_groups
from nixietune.migration import SYSTEMS
from nixietune.testing import tiny_model, toy_corpus, toy_groups

torch.set_num_threads(1)
HERE = ("audit", "convert", "split", "merge", "compare", "report")


def read_lines(path): return [json.loads(o) for o in Path(path).read_text().splitlines()]
def files(): return sorted(str(o) for o in Path().rglob("*") if not str(o).startswith("cache"))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "Groups in files and in a collection, two models, an adapter, an evaluation of each model, a run that was trained."
    folder = tmp_path_factory.mktemp("made")
    groups = toy_groups(100)
    with quiet():
        write_groups(groups, folder / "all.jsonl")
        write_groups(groups.select(range(60)), folder / "train.jsonl")
        write_groups(groups.select(range(60, 100)), folder / "test.jsonl")
        write_groups(groups.select(range(60, 100)), folder / "beir", "beir")
        (folder / "corpus.jsonl").write_text("".join(json.dumps({"_id": i, "text": o}) + "\n" for i, o in zip(toy_corpus()["doc_id"], toy_corpus()["text"])))
        for seed in (0, 1): tiny_model(seed=seed).save_pretrained(str(folder / f"model{seed}"))
        save_adapter(add_lora(SentenceTransformer(str(folder / "model0"), device="cpu"), rank=2), folder / "adapter")
        here = os.getcwd()
        os.chdir(folder)
        for seed in (0, 1): assert main(f"evaluate --model model{seed} --groups test.jsonl --corpus corpus.jsonl --output kept{seed}".split()) == 0
        train = "train --groups train.jsonl --model model0 --output run --epochs 2 --batch-size 16 --learning-rate 5e-3 --precision fp32 --seeds 2 --forgetting --merge --probes beir"
        assert main(train.split()) == 0
        os.chdir(here)
    return folder


@pytest.fixture(autouse=True)
def folder(made, tmp_path, monkeypatch):
    "A folder to write to, with links to what was made."
    monkeypatch.setenv("NIXIETUNE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "user").mkdir()
    monkeypatch.chdir(tmp_path / "user")
    for o in made.iterdir(): (shutil.copyfile if o.is_file() else os.symlink)(o, o.name)
    return tmp_path / "user"


def reported(said, capsys):
    "The exit code and the report of a command with --json: one line on standard output."
    capsys.readouterr()
    code = main([*shlex.split(said), "--json"])
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    return code, json.loads(out)


def test_audit(capsys):
    "A leak is an error and ends with 1; the file has every row; --fail-on moves the bar."
    code, found = reported("audit --groups all.jsonl", capsys)
    assert (code, found["counts"]["groups"], found["failed"]) == (0, 100, False)
    code, found = reported("audit --groups train.jsonl --test all.jsonl --corpus corpus.jsonl --output rows.jsonl", capsys)
    assert code == 1 and {o["name"]: o["severity"] for o in found["findings"]}["shared_queries"] == "error"
    rows = read_lines("rows.jsonl")
    assert len(rows) == sum(o["count"] for o in found["findings"]) and sum(o["finding"] == "shared_queries" for o in rows) == 60
    assert main("audit --groups train.jsonl --test all.jsonl --fail-on never".split()) == 0
    out = capsys.readouterr().out
    assert "error:   60 groups with a query of an earlier split [shared_queries]" in out and out.rstrip().endswith("2 errors")
    Path("twice.jsonl").write_text(Path("train.jsonl").read_text() * 2)
    assert [main(f"audit --groups twice.jsonl --rows 0 --fail-on {o}".split()) for o in ("error", "warning", "note")] == [0, 1, 1]


def test_audit_with_a_model(capsys):
    assert reported("audit --groups train.jsonl --model model0 --max-length 5", capsys)[1]["unit"] == "tokens"


@pytest.mark.parametrize("dialect", [*DIALECTS, "beir"])
def test_convert(dialect, capsys):
    "Every dialect is written and read again; what it cannot hold is said and counted."
    output = "out" if dialect == "beir" else "out.jsonl"
    code, found = reported(f"convert --groups train.jsonl --output {output} --write-as {dialect}", capsys)
    assert code == 0 and (found["groups"], found["dialect"]) == (60, dialect)
    assert bool(found["lost"]) == (dialect != "nixietune")
    again = load_groups(output)
    assert {*again["query"]} == {*load_groups("train.jsonl")["query"]}
    if dialect != "texts": assert [o[0]["doc"] for o in again["pos"]][:5] == [o[0]["doc"] for o in load_groups("train.jsonl")["pos"]][:5]
    main(f"convert --groups train.jsonl --output {output} --write-as {dialect} --overwrite".split())
    assert dialect == "nixietune" or f"{dialect} has no place for" in capsys.readouterr().out


def test_convert_a_collection(capsys):
    "A folder, and the same three files under names of their own; packed, too."
    assert main("convert --groups beir --output one.jsonl --write-as bge".split()) == 0
    for o, name in (("queries.jsonl", "q.jsonl"), ("qrels/test.tsv", "judged.tsv"), ("corpus.jsonl", "texts.jsonl")): shutil.copy(f"beir/{o}", name)
    assert main("convert --queries q.jsonl --qrels judged.tsv --corpus texts.jsonl --output two.jsonl.gz --write-as bge".split()) == 0
    assert load_groups("one.jsonl")["query"][:] == load_groups("two.jsonl.gz")["query"][:] == load_groups("test.jsonl")["query"][:]
    Path("judged.tsv").write_text(Path("judged.tsv").read_text() + "q9999\td1\t1\n")
    before = files()
    assert main("convert --queries q.jsonl --qrels judged.tsv --corpus texts.jsonl --output three.jsonl".split()) == 2
    assert "judged.tsv:" in capsys.readouterr().err and files() == before
    assert main("convert --queries q.jsonl --qrels judged.tsv --corpus texts.jsonl --output three.jsonl --on-error skip".split()) == 0 and len(read_lines("three.jsonl")) == 40


def test_split(capsys):
    "Every group once, nothing shared, the same again with the same seed; what was dealt out stays when rows come."
    code, found = reported("split --groups train.jsonl --output new/data --write-as bge", capsys)
    assert code == 0 and sum(found["parts"].values()) == 60 and not any(o["queries"] or o["positives"] for o in found["shared"].values())
    parts = {o: load_groups(f"new/data/{o}.jsonl", "bge") for o in ("train", "dev", "test")}
    assert {o: len(part) for o, part in parts.items()} == found["parts"]
    assert sorted(q for part in parts.values() for q in part["query"]) == sorted(load_groups("train.jsonl")["query"])
    assert main("split --groups train.jsonl --output again --write-as bge".split()) == 0
    assert all(Path(f"again/{o}.jsonl").read_text() == Path(f"new/data/{o}.jsonl").read_text() for o in parts)
    assert main("split --groups all.jsonl --output later --before new/data/train.jsonl new/data/dev.jsonl new/data/test.jsonl".split()) == 0
    assert all({*part["query"]} <= {*load_groups(f"later/{o}.jsonl")["query"]} for o, part in parts.items())
    assert not [o for o in files() if Path(o).name.startswith(".")]


def test_split_into_a_collection():
    assert main("split --groups all.jsonl --output whole --write-as beir --fractions 0.7 0.3 --names learn judge".split()) == 0
    assert [len(load_groups("whole", split=o)) for o in ("learn", "judge")] == [70, 30]


def test_split_beside_other_files(capsys):
    "Files of other names stay; a part that is there is not written over, and then none is."
    Path("data").mkdir()
    Path("data/dev.jsonl").write_text("mine\n")
    assert main("split --groups all.jsonl --output data".split()) == 2 and "dev.jsonl: is there already" in capsys.readouterr().err
    assert os.listdir("data") == ["dev.jsonl"]
    Path("data/notes.md").write_text("mine\n")
    assert main("split --groups all.jsonl --output data --overwrite".split()) == 0
    assert sorted(os.listdir("data")) == ["dev.jsonl", "notes.md", "test.jsonl", "train.jsonl"]


def test_compare(capsys):
    "What was kept, what is measured now, and rankings with judgments give one verdict, which is that of `compare`."
    kept = reported("compare --before kept0 --after kept1 --fail-on never", capsys)[1]
    now = reported("compare --before model0 --after model1 --groups test.jsonl --corpus corpus.jsonl --fail-on never --output queries.jsonl", capsys)[1]
    ranked = reported("compare --before kept0/run.trec --after kept1/run.trec --groups test.jsonl --corpus corpus.jsonl --fail-on never", capsys)[1]
    with quiet(): expected = compare(*(evaluate(tiny_model(seed=o), load_groups("test.jsonl"), toy_corpus()) for o in (0, 1))).summary()
    for found in (kept, now, ranked): assert found["comparisons"][0]["verdict"] == expected["verdict"]
    assert kept["comparisons"][0]["difference"] == pytest.approx(expected["difference"], abs=1e-12)
    rows = read_lines("queries.jsonl")
    assert len(rows) == 40 and sum(o["difference"] for o in rows) / 40 == pytest.approx(expected["difference"])


def test_compare_rankings(capsys):
    "Judgments alone are enough for rankings."
    flags = "--qrels beir/qrels/test.tsv --fail-on never"
    shutil.copy("kept0/run.trec", "mine.trec")
    lines = [o for o in Path("kept1/run.trec").read_text().splitlines()]
    Path("short.trec").write_text("\n".join(o for o in lines if int(o.split()[3]) <= 5) + "\n")
    ids = {o["query_id"]: {i["doc_id"] for i in o["pos"]} for o in load_groups("beir")}
    judged = {row.split("\t")[1] for row in Path("beir/qrels/test.tsv").read_text().splitlines()[1:]}
    assert judged >= set().union(*ids.values())
    code, found = reported(f"compare --before mine.trec --after short.trec mine.trec {flags}", capsys)
    assert code == 0 and [o["after"] for o in found["comparisons"]] == ["short.trec", "mine.trec"] and found["comparisons"][1]["outcome"] == "no difference"


@pytest.mark.parametrize("after, flags, code", [("model0", "", 0), ("model0", "--fail-on not-better", 1), ("run/evaluations/before", "", 1), ("run/evaluations/before", "--fail-on never", 0)])
def test_compare_exit_codes(after, flags, code, capsys):
    "1 for worse (the run's model, and what it was before), and for no difference where that is asked."
    before = "run" if after.startswith("run") else "model0 --groups test.jsonl --corpus corpus.jsonl"
    found = reported(f"compare --before {before} --after {after} {flags}", capsys)
    assert found[0] == code and found[1]["failed"] == bool(code)
    assert found[1]["comparisons"][0]["outcome"] == ("worse" if after.startswith("run") else "no difference")


def test_compare_runs_of_one_recipe(capsys):
    "Both trainings together against the model before: the spread of the runs is in the verdict, as in the run's own."
    after = "run/evaluations/after run/evaluations/after-2"
    found = reported(f"compare --before run/evaluations/before --after {after} --as-one", capsys)[1]["comparisons"]
    assert len(found) == 1 and found[0]["verdict"] == json.loads(Path("run/metrics.json").read_text())["comparison"]["verdict"]


def test_train_leaves(capsys):
    "Evaluations with every query, what was lost elsewhere, and the best mix, which is a plain model."
    figures = json.loads(Path("run/metrics.json").read_text())
    assert len(figures["runs"]) == 2 and figures["forgetting"]["probes"][0]["probe"] == "beir" and figures["sweep"]["shares"][0]["share"] == 0
    share = figures["sweep"]["best"]
    assert Path("run/merged/modules.json").is_file() == (0 < share < 1)
    if 0 < share < 1: assert figures["facts"]["merged"]["share"] == share and SentenceTransformer("run/merged", device="cpu").encode("a bird").shape == (32,)
    for o in ("before", "after", "after-2"): assert len(read_lines(f"run/evaluations/{o}/per_query.jsonl")) == figures["facts"]["groups"]["test"]
    code, found = reported("train --groups train.jsonl --model model0 --output other --epochs 1 --precision fp32", capsys)
    assert code == 0 and found["comparison"]["verdict"] == json.loads(Path("other/metrics.json").read_text())["comparison"]["verdict"]


def test_evaluate_as_json(capsys):
    code, found = reported("evaluate --model model1 --groups test.jsonl --corpus corpus.jsonl", capsys)
    assert code == 0 and found["metrics"] == pytest.approx(json.loads(Path("kept1/metrics.json").read_text())["metrics"])


def test_merge(capsys):
    "Every weight is the weighted mean; plain sentence-transformers loads the folder."
    code, found = reported("merge --model model0 model1 --weights 0.25 0.75 --output mix", capsys)
    assert code == 0 and found["weights"] == [0.25, 0.75]
    mix, a, b = (dict(SentenceTransformer(o, device="cpu").named_parameters()) for o in ("mix", "model0", "model1"))
    for k in mix: torch.testing.assert_close(mix[k], 0.25 * a[k] + 0.75 * b[k])
    shares = reported("merge --model model0 model1 run/model --examples train.jsonl --temperature 0.1 --output cocktail", capsys)[1]["weights"]
    assert sum(shares) == pytest.approx(1) and shares[2] == max(shares)
    code, found = reported("merge --model model0 run/model --dev test.jsonl --probes train.jsonl --output best", capsys)
    assert code == 0 and found["sweep"]["best"] == pytest.approx(found["weights"][1]) and SentenceTransformer("best", device="cpu").encode("a bird").shape == (32,)
    assert reported("merge --model model0 model1 --output even", capsys)[1]["weights"] == [0.5, 0.5]


def test_merge_an_adapter(capsys):
    assert main("merge --model model0 --adapter adapter --output whole".split()) == 0
    assert not Path("whole/adapter_config.json").exists() and SentenceTransformer("whole", device="cpu").encode("a bird").shape == (32,)


def test_report():
    "From a run, with what was measured beside it; from two evaluations."
    assert main("report --run run --output run.html --about First. Second. --audit train.jsonl --title".split() + ["A run"]) == 0
    html = Path("run.html").read_text()
    for o in ("<h1>A run</h1>", "First.", "On other data", "Mixed with the model", "What the audit found", "--forgetting --merge"): assert o in html, o
    assert main("report --before kept0 --after kept1 --output pair.html".split()) == 0
    assert "kept1, compared with kept0" in Path("pair.html").read_text()


@pytest.mark.parametrize("said, found", [
    ("audit", "no groups"),
    ("audit --groups nothing.jsonl", "nothing.jsonl"),
    ("audit --groups train.jsonl --fail-on worst", "fail_on is 'worst'"),
    ("audit --groups train.jsonl --output train.jsonl --overwrite", "is what is read"),
    ("audit --groups broken.jsonl --output rows.jsonl", "broken.jsonl:2: not JSON"),
    ("convert --groups train.jsonl", "no output"),
    ("convert --groups train.jsonl --output x.jsonl --write-as csv", "write_as is 'csv'"),
    ("convert --groups train.jsonl --output x.parquet", "not written as '.parquet'"),
    ("convert --groups train.jsonl --output test.jsonl", "is there already"),
    ("convert --groups train.jsonl --output beir --write-as beir", "is there already"),
    ("convert --groups train.jsonl --output train.jsonl --overwrite", "is what is read"),
    ("convert --groups broken.jsonl --output x.jsonl", "broken.jsonl:2: not JSON"),
    ("convert --qrels beir/qrels/test.tsv --output x.jsonl", "no queries"),
    ("convert --queries no.jsonl --qrels beir/qrels/test.tsv --corpus corpus.jsonl --output x.jsonl", "no.jsonl: no such file"),
    ("convert --groups train.jsonl --qrels beir/qrels/test.tsv --output x.jsonl", "groups beside qrels"),
    ("split --groups train.jsonl", "no output"),
    ("split --groups train.jsonl --output x --fractions 0.5 0.6", "fractions: sum to 1.1"),
    ("split --groups train.jsonl --output x --fractions 0.25 0.25 0.25 0.25", "no names for 4 fractions"),
    ("split --groups train.jsonl --output x --names a b", "2 names for 3 fractions"),
    ("split --groups train.jsonl --output x --names ../a b c", "a part called '../a'"),
    ("split --groups train.jsonl --output x --split-by document", "document"),
    ("split --groups broken.jsonl --output x", "broken.jsonl:2: not JSON"),
    ("split --groups train.jsonl --output train.jsonl", "is a file"),
    ("split --groups all.jsonl --output beir --write-as beir", "is there already"),
    ("split --groups one.jsonl --output x", "1 group"),
    ("compare --after kept1", "no before"),
    ("compare --before kept0 --after nowhere", "nothing to measure it on"),
    ("compare --before kept0/run.trec --after kept1", "a ranking, and nothing to measure it on"),
    ("compare --before kept0 kept1 --after kept1", "--as-one"),
    ("compare --before kept0 --after kept1 kept1", "kept1: stands there twice"),
    ("compare --before kept0 --after kept1 --groups test.jsonl", "groups does nothing here"),
    ("compare --before kept0 --after kept1 --metric ndcg@7", "'ndcg@7' is not in both"),
    ("compare --before kept0 --after run", "queries are only in"),
    ("compare --before kept0 --after damaged", "damaged evaluation"),
    ("compare --before kept0 --after kept1 --fail-on sad", "fail_on is 'sad'"),
    ("compare --before kept0 --after kept1 --confidence 2", "confidence"),
    ("compare --before broken.jsonl --after kept1 --groups test.jsonl --corpus corpus.jsonl --output x.jsonl", "broken.jsonl:1"),
    ("merge --model model0 model1", "no output"),
    ("merge --model model0 --output x", "one model without an adapter"),
    ("merge --model model0 model1 --output kept0", "is there already"),
    ("merge --model model0 model1 --output x --weights 0.5 0.6", "the weights sum to 1.1"),
    ("merge --model model0 model1 --output x --weights 1", "1 weights for 2 models"),
    ("merge --model model0 model1 --output x --weights 0.5 0.5 --dev test.jsonl", "weights and dev together"),
    ("merge --model model0 model1 --output x --probes test.jsonl", "probes does nothing here"),
    ("merge --model model0 model1 run/model --output x --dev test.jsonl", "dev with 3 models"),
    ("merge --model model0 beir --output x", "beir"),
    ("merge --model model0 model1 --output x --method average", "method='average'"),
    ("merge --model model0 model1 --output x --kind dense", "model_type='dense'"),
    ("merge --model model0 model1 --output x --examples broken.jsonl", "broken.jsonl:2: not JSON"),
    ("report --output x.html", "--run FOLDER, or --before and --after"),
    ("report --run kept0 --output x.html", "holds no run"),
    ("report --run run --before kept0 --after kept1 --output x.html", "a run beside evaluations"),
    ("report --before kept0 --after kept1 run --output x.html", "queries are only in"),
    ("report --run run --output test.jsonl", "is there already"),
    ("train --groups train.jsonl --model model0 --output x --probes test.jsonl", "probes do nothing here"),
    ("train --groups train.jsonl --model model0 --output x --forgetting --probes nothing.jsonl", "nothing.jsonl"),
    ("train --groups train.jsonl --model model0 --output x --merge --test test.jsonl", "merge without a dev set"),
    ("train --groups train.jsonl --model model0 --output x --no-measure --seeds 2", "seeds without measuring"),
    ("completion", "no shell"),
    ("completion fish", "no completion for 'fish'"),
])
def test_refused(said, found, capsys):
    "Exit code 2, one message, nothing on standard output that looks like a result, and not a file more than before."
    Path("broken.jsonl").write_text(Path("train.jsonl").read_text().splitlines()[0] + '\n{"query": "x", "pos": [\n')
    Path("one.jsonl").write_text(Path("train.jsonl").read_text().splitlines()[0] + "\n")
    Path("damaged").mkdir()
    for o in ("metrics.json", "per_query.jsonl"): Path("damaged", o).write_text("{}\n")
    before = files()
    assert main(said.split()) == 2
    errors = capsys.readouterr().err
    message = errors[errors.index("nixietune: "):]
    assert found in message and "Traceback" not in errors, errors
    assert files() == before


@pytest.mark.parametrize("name", HERE)
def test_run_files(name, capsys):
    "The same settings from YAML and JSON; the key that is wrong is named."
    for file, text in (("s.yaml", "no_such_key: 1\n"), ("s.json", '{"no_such_key": 1}')):
        Path(file).write_text(text)
        assert main([name, file]) == 2 and f"{file}: no setting 'no_such_key'; expected " in capsys.readouterr().err
    option = next(o for o in COMMANDS[name].options if o.kind is not str and not o.many)
    Path("s.yaml").write_text(f"{option.name}: [maybe]\n")
    assert main([name, "s.yaml"]) == 2 and f"s.yaml: {option.name} is ['maybe']" in capsys.readouterr().err
    assert main([name, "s.yaml", "s.json"]) == 2 and "two files of settings" in capsys.readouterr().err


def test_what_stands_without_an_option(capsys):
    "Groups, what was and what is now, a run: with or without their options the same; too many and too few are errors."
    reports = []
    for words in (["all.jsonl"], ["--groups", "all.jsonl"]):
        assert main(["audit", *words, "--json", "--rows", "0"]) == 0
        reports.append(json.loads(capsys.readouterr().out))
    assert reports[0] == reports[1]
    Path("list.json").write_text(json.dumps([{"query": "q", "pos": ["a red bird"]}]))
    assert main(["convert", "list.json", "--output", "list.jsonl"]) == 0 and Path("list.jsonl").exists()
    Path("faq.csv").write_text("Frage,Antwort\nwo,hier\n")
    assert main(["convert", "faq.csv", "--columns", "Frage=query", "Antwort=positive", "--output", "faq.jsonl"]) == 0 and json.loads(Path("faq.jsonl").read_text())["query"] == "wo"
    assert main(["convert", "faq.csv", "--columns", "Frage", "--output", "x.jsonl"]) == 2 and "--columns: 'Frage'; expected name=value" in capsys.readouterr().err.splitlines()[-1].replace("nixietune: ", "")
    for words, expected in (("compare a", "'a' alone; expected before and after"), ("report a b", "one run"), ("demo x.jsonl", "options, or a file of settings"), ("audit a.jsonl --groups b.jsonl", "'a.jsonl' beside --groups")):
        assert main(words.split()) == 2 and expected in capsys.readouterr().err
    assert main(["compare", "a", "b"]) == 2 and "--before" not in capsys.readouterr().err


def test_a_run_file():
    Path("split.yaml").write_text("groups: all.jsonl\noutput: parts\nfractions: [0.5, 0.5]\n")
    assert main(["split", "split.yaml", "--names", "a", "b"]) == 0 and sorted(os.listdir("parts")) == ["a.jsonl", "b.jsonl"]


def test_overview(capsys):
    "Every command stands in the help under its part, and without a command there is the help."
    with pytest.raises(SystemExit) as done: main([])
    out = capsys.readouterr().out
    assert not done.value.code
    parts = out.split("\n\n")
    for name, command in COMMANDS.items(): assert any(part.startswith(f"{command.part}:") and f"\n  {name} " in part and command.help in part for part in parts), name
    assert all(f"\n  {name} " in out for name in SYSTEMS)
    assert not any(len(o) > 120 for o in out.splitlines())


@pytest.mark.parametrize("name", COMMANDS)
def test_examples(name, capsys):
    "The example in a command's help is one that the command can read."
    example = COMMANDS[name].example.split(">")[0]
    typed = vars(parser().parse_args([name, *shlex.split(example)]))
    assert all(value for key, value in typed.items() if f"--{key.replace('_', '-')} " in example)
    with pytest.raises(SystemExit): main([name, "--help"])
    assert f"example:\n  nixietune {name} {example.strip()}" in capsys.readouterr().out


def test_help_is_light():
    "Nothing heavy is imported for the help of the new commands, nor for completion."
    code = f"""
import sys
from nixietune.cli import main
for name in {HERE}:
    try: main([name, '--help'])
    except SystemExit as done: assert not done.code
assert main(['completion', 'zsh']) == 0
assert not {{'torch', 'numpy', 'transformers', 'datasets', 'pandas', 'matplotlib'}} & {{*sys.modules}}"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash")
def test_completion(capsys):
    "bash offers every command, and of a command every option that its help has."
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    def pressed(*words): return subprocess.run(["bash", "-c", f"{script}\nCOMP_WORDS=({shlex.join(words)}); COMP_CWORD={len(words) - 1}; _nixietune; echo ${{COMPREPLY[@]}}"], capture_output=True, text=True, check=True).stdout.split()
    assert {*pressed("nixietune", "")} == {*COMMANDS, *SYSTEMS, "--help", "--version"}
    for name in ("train", "compare"):
        with pytest.raises(SystemExit): main([name, "--help"])
        said = {o.strip(",") for o in capsys.readouterr().out.split() if o.startswith("--")}
        offered = {*pressed("nixietune", name, "--")}
        assert {f"--{o.name.replace('_', '-')}" for o in COMMANDS[name].options} <= offered & said
    assert pressed("nixietune", "merge", "--wei") == ["--weights"] and pressed("nixietune", "merge", "--model", "mod") == []


@pytest.mark.skipif(not shutil.which("zsh"), reason="no zsh")
def test_completion_for_zsh(capsys):
    assert main(["completion", "zsh"]) == 0
    subprocess.run(["zsh", "-n"], input=capsys.readouterr().out, text=True, check=True)
