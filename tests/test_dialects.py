"Every dialect gives back what it was given, every kind of source leads to the same groups, and whatever a file holds, only our own error comes out."
import csv
import gzip
import io
import json
import zlib
from pathlib import Path

import datasets
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from nixietune.core import InputError
from nixietune.dialects import DIALECTS, GROUP, SIDES, make_item, make_record
from nixietune.display import quiet
from nixietune.groups import load_corpus, load_groups, make_groups, read_back, write_groups
from nixietune.values import text_id


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NIXIETUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path


def plain(groups): return [{k: v for k, v in row.items() if k not in ("source", "dataset")} for row in groups.to_list()]


# ---- what each dialect can hold comes back, number for number

text = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=12).filter(str.strip)
maybe = lambda strategy: st.none() | strategy
number = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-5, 5).map(float)


def items(at_least=0, **numbers):
    "Items with some of score and teacher, maybe null; each document once."
    made = st.fixed_dictionaries({"doc": text, **{k: maybe(number) for k in numbers}}).map(lambda o: make_item(o["doc"], "doc", **{k: o[k] for k in numbers}))
    return st.lists(made, min_size=at_least, max_size=4, unique_by=lambda o: o["doc"])


def record(**fields): return st.fixed_dictionaries({"query": text, **fields}).map(lambda o: make_record(**o))


full_item = st.fixed_dictionaries({"doc": text, "doc_id": maybe(text), "score": maybe(number), "teacher": maybe(number), "miner": maybe(st.text("ab"))})
HOLDS = {
    "nixietune": st.fixed_dictionaries({"query": text, "query_id": maybe(text), "pos": st.lists(full_item, min_size=1, max_size=3),
        "neg": st.lists(full_item, max_size=3), "scored": st.lists(full_item, max_size=3), "type": maybe(text), "category": maybe(text)}).map(lambda o: make_record(**o)),
    "nixietune-lists": record(pos=items(1), neg=items()),
    "nixietune-flat": record(pos=items(1).map(lambda o: o[:1]), neg=items(score=1)),
    "bge": record(pos=items(1, teacher=1), neg=items(teacher=1), instruction=maybe(text), type=maybe(text), category=maybe(text)),
    "rag": record(pos=items(1), neg=items(), prompt=maybe(text)) | record(scored=items(1, teacher=1), prompt=maybe(text)),
    "columns": record(pos=items(1), neg=items()) | record(scored=items(1).map(lambda o: [i | {"score": 0.5} for i in o])) | record(neg=items(1).map(lambda o: o[:1])),
    "texts": record(prompt=maybe(text)),
}


@pytest.mark.parametrize("name", DIALECTS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_what_a_dialect_holds_comes_back(name, data):
    wanted, dialect = data.draw(HOLDS[name]), DIALECTS[name]
    rows = json.loads(json.dumps(dialect.write(wanted | {"query_id": wanted["query_id"] or text_id(wanted["query"])})))
    found = read_back(dialect, rows)
    assert found == wanted | {"query_id": found["query_id"]}
    assert found["query_id"] in (wanted["query_id"], None, text_id(wanted["query"]))


@pytest.mark.parametrize("name", DIALECTS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_files_of_each_dialect(name, data, tmp_path):
    "Through a file, and recognised from it."
    wanted = data.draw(st.lists(HOLDS[name].map(lambda o: o | {"query_id": None}), min_size=1, max_size=4))
    rows = [row for o in wanted for row in DIALECTS[name].write(o | {"query_id": text_id(o["query"])})]
    with quiet():
        groups = make_groups(rows, name)
        packing = data.draw(st.sampled_from(["", ".gz", ".zst"]))
        path = write_groups(groups, tmp_path / f"{name}.jsonl{packing}", name)
        again = load_groups(path) if any(o.get("neg") or o.get("negscore") for o in rows) else load_groups(path, name)
    assert plain(again) == plain(groups)


# ---- any source

ROWS = [{"query": "pizza", "pos": ["Serious Pizza", "Napoli"], "neg": ["Burger"]}, {"query": "burger", "pos": ["Burger"], "neg": ["Napoli", "Risa"]}]


def sources():
    "The same two groups from everything that may hold them."
    lines = "".join(json.dumps(o) + "\n" for o in ROWS)
    files = {"a.jsonl": lines.encode(), "b.ndjson": b"\xef\xbb\xbf" + lines.replace("\n", "\r\n").encode(), "c.json": json.dumps(ROWS, indent=1).encode(),
        "d.jsonl.gz": gzip.compress(lines.encode()), "e.json.zst": pa.compress(lines.encode(), "zstd", asbytes=True)}
    for name, content in files.items(): Path(name).write_bytes(content)
    datasets.Dataset.from_list(ROWS).to_parquet("f.parquet")
    for name, mark in (("g.csv", ","), ("h.tsv", "\t")):
        with open(name, "w", newline="") as file:
            writer = csv.DictWriter(file, list(ROWS[0]), delimiter=mark)
            writer.writeheader()
            writer.writerows({k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()} for row in ROWS)
    yield from [*files, "f.parquet", "g.csv", "h.tsv"]
    Path("folder").mkdir()
    Path("folder/a.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    Path("folder/b.jsonl").write_text(json.dumps(ROWS[1]) + "\n")
    yield from ["folder", Path("folder"), "folder/*.jsonl", "f*/[ab].jsonl", ["folder/a.jsonl", Path("folder/b.jsonl")]]
    yield from [datasets.Dataset.from_list(ROWS), pd.DataFrame(ROWS), [datasets.Dataset.from_list(ROWS[:1]), "folder/b.jsonl"]]


def test_any_source(capsys):
    wanted = plain(make_groups(ROWS))
    for source in sources():
        groups = load_groups(source)
        assert plain(groups) == wanted, source
        assert "read as bge" in capsys.readouterr().out


def test_sources_keep_their_place():
    *_, = sources()
    assert load_groups("c.json")["source"][:] == ["c.json:2", "c.json:12"]
    assert load_groups("h.tsv")["source"][:] == ["h.tsv:2", "h.tsv:3"]
    assert load_groups("f.parquet")["source"][:] == ["f.parquet:1", "f.parquet:2"]
    assert load_groups("folder")["dataset"][:] == ["a", "b"]
    Path("other").mkdir()
    Path("other/a.jsonl").write_text(json.dumps(ROWS[0]))
    assert load_groups(["folder/a.jsonl", "other/a.jsonl"])["dataset"][:] == ["folder/a", "other/a"]  # two files of one name


def test_hub(monkeypatch, capsys):
    "The name, the split and what the Hub answers; a range is cut here."
    asked = []
    def load_dataset(name, split):
        asked.append((name, split))
        if name == "user/none": raise ConnectionError("no network\nand more")
        return datasets.Dataset.from_list(ROWS * 10)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(load_groups("user/data")) == 20
    assert len(load_groups("user/data", split="dev[:10%]")) == 2
    assert asked == [("user/data", "train"), ("user/data", "dev")]
    with pytest.raises(InputError, match="user/none: cannot be had from the Hub: ConnectionError: no network; expected a file"): load_groups("user/none")
    with pytest.raises(InputError, match="split='train.1-2.' cannot be read"): load_groups("user/data", split="train[1-2]")


# ---- test collections

DOCS, QUERIES = {"d1": "Serious Pizza", "d2": "Napoli", "d3": "Burger"}, {"q1": "pizza", "q2": "burger"}
JUDGED = [("q1", "d1", 2), ("q1", "d3", 0), ("q2", "d3", 1)]


def lines(*rows): return "".join(json.dumps(o) + "\n" for o in rows)


def collections():
    documents = lines(*({"_id": k, "title": "", "text": v} for k, v in DOCS.items()))
    table = "".join(f"{k}\t{v}\n" for k, v in DOCS.items())
    yield "beir", {"corpus.jsonl": documents, "queries.jsonl": lines(*({"_id": k, "text": v} for k, v in QUERIES.items())),
        "qrels/test.tsv": "query-id\tcorpus-id\tscore\n" + "".join("\t".join(map(str, o)) + "\n" for o in JUDGED)}
    yield "flag", {"corpus.jsonl": documents.replace("_id", "id"), "test_queries.jsonl": lines(*({"id": k, "text": v} for k, v in QUERIES.items())),
        "test_qrels.jsonl": lines(*({"qid": q, "docid": d, "relevance": g} for q, d, g in JUDGED))}
    yield "marco", {"collection.tsv": table, "queries.test.tsv": "".join(f"{k}\t{v}\n" for k, v in QUERIES.items()),
        "qrels.test.tsv": "".join(f"{q}\t0\t{d}\t{g}\n" for q, d, g in JUDGED)}
    yield "trec", {"corpus.tsv": table, "queries.tsv": "".join(f"{k}\t{v}\n" for k, v in QUERIES.items()), "qrels.test.trec": "".join(f"{q} 0 {d} {g}\n" for q, d, g in JUDGED)}


@pytest.mark.parametrize("name, files", [*collections()])
def test_collections(name, files):
    for path, content in files.items():
        (Path(name) / path).parent.mkdir(parents=True, exist_ok=True)
        (Path(name) / path).write_text(content)
    groups = load_groups(name)
    assert [(o["query_id"], o["query"], [(d["doc_id"], d["doc"], d["score"]) for d in o["pos"]], [d["doc_id"] for d in o["neg"]]) for o in groups] == [
        ("q1", "pizza", [("d1", "Serious Pizza", 2.0)], ["d3"]), ("q2", "burger", [("d3", "Burger", 1.0)], [])]
    assert [len(o["pos"]) for o in load_groups(name, threshold=2)] == [1, 0]
    assert load_corpus(name).to_list() == [{"doc_id": k, "text": v} for k, v in DOCS.items()]
    assert {*groups["dataset"]} == {name}
    write_groups(groups, "again", "beir", split="dev")
    assert plain(load_groups("again", split="dev")) == plain(groups)
    Path(name, "qrels.other.tsv" if name in ("marco", "trec") else "qrels/other.tsv" if name == "beir" else "other_qrels.jsonl").write_text("q1\td2\t1\n")
    with pytest.raises(InputError, match="judgments for 'other', 'test'; expected which of them"): load_groups(name)


def test_a_collection_with_holes():
    (name, files), *_ = collections()
    files["qrels/test.tsv"] += "q1\td9\t1\nq9\td1\t1\nq2\td3\t2\nq2\td1\thigh\n"
    for path, content in files.items():
        (Path(name) / path).parent.mkdir(parents=True, exist_ok=True)
        (Path(name) / path).write_text(content)
    with pytest.raises(InputError) as error: load_groups(name)
    for part in ("query 'q9' is not in queries.jsonl", "document 'd9' is not in corpus.jsonl", "test.tsv:7: query 'q2' and document 'd3' were judged 1 before",
        "test.tsv:8: the grade is 'high'; expected a finite number"): assert part in str(error.value)


# ---- several data sets

def test_data_sets_are_arranged(capsys):
    for name, count in (("big", 50), ("small1", 2), ("small2", 3)):
        (Path("sets-no_in_batch_neg")).mkdir(exist_ok=True)
        Path(f"sets-no_in_batch_neg/{name}.jsonl").write_text(lines(*({"query": f"{name} {i}", "pos": ["d"]} for i in range(count))))
    Path("alone.jsonl").write_text(lines({"query": "alone", "pos": ["d"], "type": "only_1neg"}))
    rules = dict(small_threshold=4, drop_threshold=5, max_example_num_per_dataset=10, seed=1)
    groups = load_groups(["sets-no_in_batch_neg", "alone.jsonl"], **rules)
    said = capsys.readouterr().out
    assert {name: groups["dataset"][:].count(name) for name in {*groups["dataset"]}} == {"big": 10, "sets-no_in_batch_neg": 5}
    assert {*groups["type"]} == {"no_in_batch_neg"}
    for part in ("big: 10 of 50 groups taken at random", "small1: 2 groups, merged into sets-no_in_batch_neg", "alone: dropped, 1 group of at least 4"): assert part in said
    assert plain(load_groups(["sets-no_in_batch_neg", "alone.jsonl"], **rules)) == plain(groups)
    assert plain(load_groups(["sets-no_in_batch_neg", "alone.jsonl"], **rules | {"seed": 2})) != plain(groups)
    assert {*load_groups("sets-no_in_batch_neg", types={"big": "symmetric_sts"}, dataset=["big"] * 3)["type"]} == {"symmetric_sts"}
    assert len(load_groups("sets-no_in_batch_neg", small_threshold=4, drop_threshold=6)) == 50


# ---- broken files

WHOLE = {"a.jsonl": lines(*ROWS).encode(), "a.json": json.dumps(ROWS).encode(), "a.csv": b"query,pos,score\npizza,\"[\"\"a\"\"]\",1\n", "a.tsv": b"anchor\tpositive\nq\td\n",
    "a.jsonl.gz": gzip.compress(lines(*ROWS).encode(), mtime=0), "a.jsonl.zst": pa.compress(lines(*ROWS).encode(), "zstd", asbytes=True)}


def parquet():
    out = io.BytesIO()
    datasets.Dataset.from_list(ROWS).to_parquet(out)
    return out.getvalue()


WHOLE["a.parquet"] = parquet()
broken = st.tuples(st.sampled_from(sorted(WHOLE)), st.lists(st.tuples(st.integers(0, 400), st.binary(max_size=3), st.integers(0, 3)), max_size=4), st.integers(0, 500))
json_value = st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5) | st.sampled_from([[], {}, [""], [None]]),
    lambda o: st.lists(o, max_size=3) | st.dictionaries(st.sampled_from([*GROUP, "doc", "score", "scores", "positive", "sentence1"]), o, max_size=3), max_leaves=8)
odd_row = st.dictionaries(st.sampled_from([*GROUP, "doc", "positive", "negative", "neg_scores", "negscore", "scores", "prompt_for_query", "anchor", "sentence1", "sentence2", "label", "x"]),
    json_value | st.just("text") | st.lists(st.just("text"), max_size=2), max_size=6)


def attempt(path, load=load_groups):
    "Only our own error comes out, and what is loaded has text in its queries."
    with quiet():
        try: groups = load(path)
        except InputError as error: assert str(error); return
        if load is load_groups: assert all(o.strip() for o in groups["query"])


def break_bytes(case, folder):
    name, edits, cut = case
    content = bytearray(WHOLE[name])
    for at, new, drop in edits: content[at % (len(content) + 1):at % (len(content) + 1) + drop] = new
    path = folder / name
    path.write_bytes(bytes(content)[:cut] if cut < 450 else bytes(content))
    attempt(path)
    attempt(path, load_corpus)


def load_odd(rows, folder):
    path = folder / "odd.jsonl"
    path.write_text(lines(*rows), encoding="utf-8", errors="surrogatepass")
    attempt(path)
    for name in DIALECTS: attempt(path, lambda o: load_groups(o, name))


few = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
many = settings(max_examples=5_000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@few
@given(broken)
def test_broken_bytes(tmp_path, case): break_bytes(case, tmp_path)


@few
@given(st.lists(odd_row, min_size=1, max_size=4))
def test_odd_rows(tmp_path, rows): load_odd(rows, tmp_path)


@pytest.mark.slow
@many
@given(broken)
def test_many_broken_bytes(tmp_path, case): break_bytes(case, tmp_path)


@pytest.mark.slow
@many
@given(st.lists(odd_row, min_size=1, max_size=4))
def test_many_odd_rows(tmp_path, rows): load_odd(rows, tmp_path)


def test_a_long_line_and_a_half_file():
    row = {"query": "q", "pos": ["word " * 10_000_000]}
    Path("long.jsonl").write_text(json.dumps(row))
    assert len(load_groups("long.jsonl")[0]["pos"][0]["doc"]) == 50_000_000
    content = gzip.compress("".join(json.dumps({"query": f"q{i}", "pos": [f"{zlib.crc32(str(i).encode())}"]}) + "\n" for i in range(2_000)).encode())
    Path("half.jsonl.gz").write_bytes(content[:len(content) // 2])
    with pytest.raises(InputError, match=r"half.jsonl.gz:\d+: the file cannot be unpacked any further"): load_groups("half.jsonl.gz")
    some, faults = load_groups("half.jsonl.gz", on_error="skip")
    assert 500 < len(some) < 2_000 and len(faults.rows) == 1


def test_fields_that_stand_twice():
    Path("twice.jsonl").write_text('{"query": "a", "query": "b", "pos": [{"doc": "x"}]}\n{"query": "a", "pos": [{"doc": "x", "doc": "y"}]}\n')
    with pytest.raises(InputError, match="2 faults") as error: load_groups("twice.jsonl")
    assert str(error.value).count("stands twice in one object; expected each field once") == 2


def test_scored_documents_are_neither(capsys):
    "They are nobody's positive and nobody's own negative until a threshold says so; what a dialect cannot hold is said."
    rows = [{"query": "a", "pos": ["x", "y"], "scores": [0.9, 0.1]}]
    groups = make_groups(rows)
    assert [len(groups[0][side]) for side in SIDES] == [0, 0, 2]
    assert [len(make_groups(rows, threshold=0.5)[0][side]) for side in SIDES] == [1, 1, 0]
    with pytest.raises(InputError, match="rows:1: `pos` is an empty list"): write_groups(groups, "a.jsonl", "bge")
    with pytest.raises(InputError, match="nothing in it that this dialect can hold; expected a positive"): write_groups(groups, "a.jsonl", "nixietune-flat")
    assert plain(load_groups(write_groups(groups, "a.jsonl"))) == plain(groups)


# ---- what a stranger tried

def test_columns_say_what_they_cannot_mean():
    "A number beside a positive is used, or is an error; never left out, and never turned into a positive."
    one = lambda **row: make_groups([row])[0]
    assert [len(one(anchor="a", positive="b", label=0)[side]) for side in SIDES] == [0, 1, 0]
    assert one(anchor="a", positive="b", score=0.3)["scored"][0]["score"] == 0.3
    taught = one(query="a", positive="b", negative_1="c", negative_2="d", label=[9.1, 2.0, 1.5])
    assert [o["teacher"] for o in taught["pos"] + taught["neg"]] == [9.1, 2.0, 1.5]
    for row, message in (({"query": "a", "positive": "b", "negative": "c", "score": 3.2}, "`score` beside a negative"),
            ({"anchor": "a", "query": "q", "positive": "b"}, "`query` beside `anchor`"), ({"sentence1": "a", "sentence2": "b", "negative": "c"}, "`negative` beside `sentence1`"),
            ({"sentence1": "a", "sentence2": "b", "score": None}, "`score` is null"), ({"anchor": "a", "positive": "b", "negative": "c", "label": [1, 2, 3]}, "has 3 numbers for 2 documents")):
        with pytest.raises(InputError, match=message): one(**row)
    with pytest.raises(InputError, match="`scores` belongs to the dialect rag"): make_groups([{"query": "a", "pos": ["b"], "pos_scores": [1]}] * 100 + [{"query": "a", "pos": ["b"], "scores": [0.0]}])


def test_one_bad_row_of_a_table_is_one_row():
    good = "".join(f"q{i},d{i}\n" for i in range(1_000))
    Path("a.csv").write_text("anchor,positive\n" + good + 'x,"y" z\n' + good)
    Path("b.csv").write_bytes(("anchor,positive\n" + good).encode() + b"caf\xe9,d\n" + good.encode())
    Path("c.json").write_text('[{"anchor":"a","positive":"b"},\n{"anchor":"a","anchor":"c","positive":"b"},\n{"anchor":"e","positive":"f"}]')
    for name, rows, line in (("a.csv", 2_000, 1_002), ("b.csv", 2_000, 1_002), ("c.json", 2, 2)):
        with quiet(): groups, faults = load_groups(name, on_error="skip")
        assert len(groups) == rows and [o["where"] for o in faults.rows] == [f"{name}:{line}"], name
    Path("d.tsv").write_text('anchor\tpositive\nc\t"hello" world\n"whole"\t"two ""quoted"" words"\n')
    assert [(o["query"], o["pos"][0]["doc"]) for o in load_groups("d.tsv")] == [("c", '"hello" world'), ("whole", 'two "quoted" words')]


def test_collections_are_added_to_and_nothing_else_is_touched(capsys):
    groups = make_groups([{"query": "a", "pos": [{"doc": "x", "score": 0.123456789}]}, {"query": "b", "pos": [{"doc": "y", "score": 1234567.0}]}])
    write_groups(groups.select([0]), "set", "beir", split="train")
    write_groups(groups.select([1]), "set", "beir", split="test")
    assert load_groups("set", split="train")[0]["pos"][0]["score"] == 0.123456789 and load_groups("set", split="test")[0]["pos"][0]["score"] == 1234567.0
    assert len(load_corpus("set")) == 2
    Path("mine").mkdir()
    Path("mine/code.py").write_text("precious")
    with pytest.raises(InputError, match="mine: holds other things, such as code.py"): write_groups(groups, "mine", "beir")
    assert Path("mine/code.py").read_text() == "precious"
    capsys.readouterr()
    write_groups(make_groups([{"query": "a", "pos": [{"doc": "x"}], "neg": [{"doc": "x"}], "dataset": "d"}]), "twice", "beir")
    assert "dataset (1 group)" in (said := capsys.readouterr().out) and "a document that stands twice in its group (1 group)" in said
    with pytest.raises(InputError, match="an id without tabs"): write_groups(make_groups([{"query": "a", "query_id": "a\tb", "pos": [{"doc": "x"}]}]), "ids", "beir")
    with pytest.raises(InputError, match="a name for the judgments"): write_groups(groups, "split", "beir", split="a/b")


def test_judgments_with_holes():
    Path("q.jsonl").write_text("1\td1\t\n")
    for text, found in (("1\td1\t\n", "a cell is empty"), ("\td1\t1\n", "a cell is empty"), ("corpus-id\tquery-id\tscore\nd1\tq1\t1\n", ("q1", "d1", 1.0)), ("qid\tpid\nq1\td1\n", ("q1", "d1", 1.0)), ("q1 0 d1 2\n", ("q1", "d1", 2.0)), ("q1 d1\n", ("q1", "d1", 1.0))):
        from nixietune.judgments import judgments
        Path("q.tsv").write_text(text)
        (_, one), = judgments(Path("q.tsv"))
        assert one == found if isinstance(found, tuple) else found in str(one), text


def test_corpora_of_all_kinds():
    Path("co").mkdir()
    Path("co/collection.tsv").write_text("1\tone\n2\ttwo\n")
    Path("co/more.txt").write_text("three\n")
    for source in ("co/collection.tsv", ["co/collection.tsv"], "co/*.tsv"): assert load_corpus(source)["doc_id"][:] == ["1", "2"], source
    assert load_corpus(["co/more.txt"])["text"][:] == ["three"]


def test_splits_and_rules_that_cannot_be_meant():
    Path("a.jsonl").write_text(lines(*ROWS))
    for options, message in (({"split": "test"}, "files have no splits"), ({"split": "train]"}, "cannot be read"), ({"split": "[%:]"}, "cannot be read"), ({"split": "[20:30]"}, "leaves nothing of 2 rows"),
            ({"threshold": float("nan")}, "`threshold` is nan"), ({"threshold": "0.5"}, "`threshold` is a text"), ({"max_example_num_per_dataset": -3}, "a whole number, 1 or more"), ({"small_threshold": None}, "a whole number, 0 or more")):
        with pytest.raises(InputError, match=message): load_groups("a.jsonl", **options)
    with pytest.raises(InputError, match="the same file twice"): load_groups(["a.jsonl", Path("a.jsonl").resolve()])
    with pytest.raises(InputError, match="the rows are null"): make_groups(None)
    with pytest.raises(InputError, match="the columns of groups"): write_groups(datasets.Dataset.from_list(ROWS), "b.jsonl")
    with pytest.raises(InputError, match="two columns have the same name|the frame cannot be read"): load_groups(pd.DataFrame([["a", "b"]], columns=["query", "query"]))


def test_the_convention_is_added_to_the_type():
    Path("clustering-no_in_batch_neg").mkdir()
    Path("clustering-no_in_batch_neg/arxiv.jsonl").write_text(lines({"query": "a", "pos": ["b"], "type": "symmetric_clustering", "category": "cs"}))
    for source in ("clustering-no_in_batch_neg", "clustering-no_in_batch_neg/*.jsonl", "clustering-no_in_batch_neg/arxiv.jsonl"):
        assert load_groups(source, dataset="x")["type"][:] == ["symmetric_clustering no_in_batch_neg"]


def test_many_faults_before_the_first_good_row():
    "The dialect is settled by rows that can be read, wherever they begin."
    Path("late.jsonl").write_text("{\n" * 150 + lines(*ROWS))
    with quiet(): groups, faults = load_groups("late.jsonl", on_error="skip")
    assert len(groups) == 2 and len(faults.rows) == 150


def test_a_corpus_has_no_splits_either(capsys):
    Path("c.txt").write_text("one\ntwo\nthree\nfour\n")
    assert load_corpus("c.txt", split="[:50%]")["text"][:] == ["one", "two"] and "2 of 4 documents: [:50%]" in capsys.readouterr().out
    with pytest.raises(InputError, match="files have no splits"): load_corpus("c.txt", split="test")
    with pytest.raises(InputError, match="the same file twice"): load_corpus(["c.txt", Path("c.txt").resolve()])
