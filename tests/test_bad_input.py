"Each kind of bad input gives one clear error, with file, line and what was expected, and leaves nothing behind."
import json

import pytest

from nixietune.core import InputError
from nixietune.groups import load_corpus, load_groups, make_groups, table_of, write_groups, GROUP

GOOD = {"query": "pizza", "pos": [{"doc": "Serious Pizza", "score": 1.0}], "neg": [{"doc": "Burgermeister"}]}
BGE = {"query": "pizza", "pos": ["Serious Pizza"], "neg": ["Burgermeister"], "neg_scores": [0.1]}


def line(row, **changes): return json.dumps({**row, **changes}).encode()


def without(row, name): return json.dumps({k: v for k, v in row.items() if k != name}).encode()


# what is wrong -> line 2 of the file (after a good line 1), what the message must hold
NIXIETUNE = {
    "not JSON": (b'{"query": "pizza",, }', "not JSON, column 19", "expected one whole JSON object a line"),
    "truncated": (b'{"query": "pizza", "pos": [{"do', "not JSON", "expected one whole JSON object a line"),
    "a list": (b"[1, 2]", "the line is a list", "expected a JSON object"),
    "too deep": (b"[" * 100_000, "JSON that cannot be read", "expected one plain JSON object a line"),
    "a huge number": (b'{"query": ' + b"9" * 5_000 + b"}", "JSON that cannot be read", "expected one plain JSON object"),
    "wrong encoding": (line(GOOD).replace(b"pizza", b"caf\xe9"), "byte 0xe9 at position 15 is not UTF-8", "expected a file saved as UTF-8"),
    "half a character": (line(GOOD, query="pizza \ud83d"), "`query` holds half a character (\\ud83d)", "expected whole Unicode"),
    "no query": (without(GOOD, "query"), "`query` is missing", "expected a text"),
    "query is null": (line(GOOD, query=None), "`query` is null", "expected a text"),
    "query is a number": (line(GOOD, query=3), "`query` is the number 3", "expected a text"),
    "empty query": (line(GOOD, query=""), "`query` is empty", "expected a text"),
    "blank query": (line(GOOD, query=" \t\u3000"), "`query` is blank", "expected a text"),
    "no positives field": (without(GOOD, "pos"), "`pos` is missing", "expected a list of objects {doc, score?}"),
    "no positive": (line(GOOD, pos=[]), "`pos` is an empty list", "expected a list of objects {doc, score?}, at least one"),
    "positives are an object": (line(GOOD, pos={"doc": "x"}), "`pos` is an object", "expected a list of objects"),
    "negatives are a text": (line(GOOD, neg="x"), "`neg` is a text", "expected a list of objects"),
    "document is null": (line(GOOD, pos=[None]), "`pos[0]` is null", "expected an object {doc, score?}"),
    "empty document": (line(GOOD, neg=[{"doc": ""}]), "`neg[0].doc` is empty", "expected a text"),
    "no doc": (line(GOOD, pos=[{"score": 1.0}]), "`pos[0].doc` is missing", "expected a text"),
    "NaN score": (line(GOOD, pos=[{"doc": "x", "score": float("nan")}]), "`pos[0].score` is nan", "expected a finite number"),
    "infinite score": (line(GOOD, pos=[{"doc": "x", "score": float("-inf")}]), "`pos[0].score` is -inf", "expected a finite number"),
    "overflow": (b'{"query": "q", "pos": [{"doc": "x", "score": 1e999}]}', "`pos[0].score` is inf", "expected a finite number"),
    "score is true": (line(GOOD, pos=[{"doc": "x", "score": True}]), "`pos[0].score` is true or false", "expected a number"),
    "score is a text": (line(GOOD, neg=[{"doc": "x", "score": "1"}]), "`neg[0].score` is a text", "expected a number"),
    "id is a list": (line(GOOD, pos=[{"doc": "x", "doc_id": [1]}]), "`pos[0].doc_id` is a list", "expected a text or a whole number"),
    "prompt is a number": (line(GOOD, prompt=1), "`prompt` is the number 1", "expected a text"),
    "prompt and instruction": (line(GOOD, prompt="query: ", instruction="Find"), "`prompt` and `instruction` are both given", "expected one of them"),
}
FLAG = {
    "no positive": (line(BGE, pos=[]), "`pos` is an empty list", "expected a list of texts, at least one"),
    "document is a number": (line(BGE, neg=[5], neg_scores=None), "`neg[0]` is the number 5", "expected a text"),
    "too few scores": (line(BGE, pos_scores=[]), "`pos_scores` has 0 numbers for 1 documents", "expected as many as `pos` has documents"),
    "too many scores": (line(BGE, neg_scores=[0.1, 0.2]), "`neg_scores` has 2 numbers for 1 documents", "expected as many as `neg`"),
    "NaN score": (line(BGE, neg_scores=[float("nan")]), "`neg_scores[0]` is nan", "expected a finite number"),
    "score is true": (line(BGE, neg_scores=[True]), "`neg_scores[0]` is true or false", "expected a number"),
    "scores are a number": (line(BGE, neg_scores=0.5), "`neg_scores` is the number 0.5", "expected a list of numbers"),
    "prompt and instruction": (line(BGE, prompt="Find", instruction="Find"), "both given", "expected one of them"),
}
CORPUS = {
    "not JSON": (b"Serious Pizza", "not JSON, column 1", "expected one whole JSON object a line"),
    "no text": (line({"_id": "d2", "body": "x"}), "no text: `_id` (a text), `body` (a text)", "expected a text in one of text"),
    "empty text": (line({"_id": "d2", "text": ""}), "`text` is empty", "expected a text"),
    "text is a number": (line({"_id": "d2", "text": 5}), "`text` is the number 5", "expected a text"),
    "title is a list": (line({"_id": "d2", "title": [], "text": "x"}), "`title` is a list", "expected a text"),
    "empty id": (line({"_id": "", "text": "x"}), "`_id` is empty", "expected a text"),
    "id is true": (line({"_id": True, "text": "x"}), "`_id` is true or false", "expected a text or a whole number"),
    "no id": (line({"text": "x"}), "a document without an id", "expected an id for every document, or for none"),
    "an id, two texts": (line({"_id": "d1", "text": "y"}), "doc_id 'd1' stood for another text before", "expected one text for each id"),
    "wrong encoding": (b'{"_id": "d2", "text": "\xff"}', "byte 0xff at position 24 is not UTF-8", "expected a file saved as UTF-8"),
}
CASES = [(load, first, name, *case) for load, first, cases in ((load_groups, GOOD, NIXIETUNE), (load_groups, BGE, FLAG),
    (load_corpus, {"_id": "d1", "text": "x"}, CORPUS)) for name, case in cases.items()]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    "An empty folder to work in, and a cache that must stay without files."
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("NIXIETUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path


def complaint(folder, action):
    "The message of the one error that `action` raises; nothing may be written by it."
    files = lambda: sorted(p for p in folder.rglob("*") if p.is_file() or p.parent.parent.name == "cache")
    before = files()
    with pytest.raises(InputError) as error: action()
    assert files() == before
    return str(error.value)


@pytest.mark.parametrize("load, first, name, bad, found, expected", CASES, ids=[f"{o[0].__name__}: {o[2]}" for o in CASES])
def test_bad_line(folder, load, first, name, bad, found, expected):
    (folder / "work/data.jsonl").write_bytes(line(first) + b"\n" + bad + b"\n")
    message = complaint(folder, lambda: load("data.jsonl"))
    assert message.startswith("data.jsonl:2: ") and found in message and expected in message, message


@pytest.mark.parametrize("load, what", [(load_groups, "groups"), (load_corpus, "documents")])
def test_bad_file(folder, load, what):
    (folder / "work/empty.jsonl").touch()
    (folder / "work/blank.jsonl").write_text("\n \n\n")
    (folder / "work/folder.jsonl").mkdir()
    (folder / "work/data.xlsx").write_text("x")
    (folder / "work/utf16.jsonl").write_bytes(json.dumps(GOOD).encode("utf-16"))
    for name, found, expected in (
        ("empty.jsonl", f"no {what} in it", "at least one"),
        ("blank.jsonl", f"no {what} in it", "at least one"),
        ("absent.jsonl", "no such file", "a file of the kind .jsonl"),
        ("folder.jsonl", "no data in this folder", "a file of the kind .jsonl"),
        ("data.xlsx", "a file of the kind '.xlsx' cannot be read here (the table of pd.read_excel can)", "a file of the kind .jsonl"),
        ("utf16.jsonl:1", "byte 0xff at position 1 is not UTF-8", "a file saved as UTF-8 (this looks like UTF-16)"),
    ):
        message = complaint(folder, lambda: load(name.removesuffix(":1")))
        assert message.startswith(f"{name}: {found}; expected {expected}"), message
    assert "expected a path" in complaint(folder, lambda: load({"query": "pizza"}))
    assert "expected at least one file" in complaint(folder, lambda: load([]))


def test_all_faults_in_one_error(folder):
    rows = [line(GOOD), *[line(GOOD, query="")] * 6, b"", line(GOOD), *[b"{"] * 18]
    (folder / "work/a.jsonl").write_bytes(b"\n".join(rows))
    (folder / "work/b.jsonl").write_bytes(line(BGE, pos=[]) + b"\n" + line(BGE) + b"\n")
    message = complaint(folder, lambda: load_groups(["a.jsonl", "b.jsonl"])).splitlines()
    assert message[0] == "25 faults in 28 rows:"
    assert message[1] == "  a.jsonl:2: `query` is empty; expected a text"
    assert [int(o.split(":")[1]) for o in message[1:21]] == [*range(2, 8), *range(10, 24)]
    assert message[21:] == ["  ... and 5 more", "  on_error='skip' goes on without these rows, and lists them"]


README = """{
    "query": "pizza",
    "pos": [
        {"doc": "Standard Serious Pizza", "score": 1.0},
        {"doc": "60 Seconds to Napoli", "score": 1.0},
    ],
    "neg": [
        {"doc": "Burgermeister", "score": 0.0},
        {"doc": "Risa Chicken", "score": 0.0}
    ]
}
"""


def test_the_sample_of_a_manual(folder):
    "nixietune's first README, pasted as it is printed: both faults are named, and the line is shown as it should be."
    (folder / "work/readme.jsonl").write_text(README + json.dumps(GOOD) + "\n" + README)
    first, second = complaint(folder, lambda: load_groups("readme.jsonl")).splitlines()[1:3]
    found = "not JSON Lines: an object spread over 11 lines, and a comma before a closing bracket; expected it on one line: "
    assert first.startswith(f"  readme.jsonl:1: {found}") and second.startswith(f"  readme.jsonl:13: {found}")
    (folder / "work/mended.jsonl").write_text(first.split("on one line: ")[1])
    (folder / "cache2").mkdir()
    assert [o["doc"] for o in load_groups("mended.jsonl")[0]["neg"]] == ["Burgermeister", "Risa Chicken"]


def test_dialects_are_not_guessed(folder, capsys):
    (folder / "work/two.jsonl").write_bytes(line(GOOD) + b"\n" + line(BGE))
    (folder / "work/none.jsonl").write_bytes(line({"question": "pizza", "answer": 7}))
    message = complaint(folder, lambda: load_groups("two.jsonl"))
    assert message.startswith("two.jsonl: two dialects in one, nixietune (line 1: ") and "bge (line 2: " in message
    assert "dialect='nixietune' or dialect='bge'" in message
    assert complaint(folder, lambda: load_groups("two.jsonl", dialect="bge")).startswith("two.jsonl:1: `pos[0]` is an object; expected a text")
    message = complaint(folder, lambda: load_groups("none.jsonl"))
    assert message.startswith("none.jsonl:1: no known dialect: `question` (a text), `answer` (the number 7); expected nixietune {")
    assert "expected one of nixietune, nixietune-lists" in complaint(folder, lambda: load_groups("none.jsonl", dialect="bgee"))


def test_an_id_stands_for_one_query(folder):
    (folder / "work/a.jsonl").write_bytes(line(GOOD, query_id=1) + b"\n" + line(GOOD, query_id="1", query="pasta"))
    message = complaint(folder, lambda: load_groups("a.jsonl"))
    assert message == "a.jsonl:2: query_id '1' stood for another query before; expected one query for each id of a data set"


def test_rows_in_memory(folder):
    assert complaint(folder, lambda: make_groups([GOOD, 5], source="mine")).startswith("mine:2: the row is the number 5; expected a dict")
    assert complaint(folder, lambda: make_groups([{**GOOD, "pos": [{"doc": "x", "score": 10**400}]}])).startswith("rows:1: `pos[0].score` is inf")
    assert "no groups" in complaint(folder, lambda: make_groups(iter([])))


def test_what_is_accepted_is_said(folder, capsys):
    rows = b"\xef\xbb\xbf" + line(GOOD, stars=3) + b"\r\n\r\n" + line(GOOD, neg=None) + b"\n" + without(GOOD, "neg")
    (folder / "work/odd.jsonl").write_bytes(rows)
    for _ in range(2):  # read, and from the cache
        groups = load_groups("odd.jsonl")
        assert groups["source"][:] == ["odd.jsonl:1", "odd.jsonl:3", "odd.jsonl:4"] and [len(o) for o in groups["neg"]] == [1, 0, 0]
        said = capsys.readouterr().out.splitlines()
        assert said == ["odd.jsonl: 3 groups, read as nixietune (line 1: `pos` holds objects with `doc`)",
            "odd.jsonl: 1 blank line passed over", "odd.jsonl: unknown fields left out: `stars` (1 row)"]


def test_failed_write_keeps_what_was_there(folder):
    good = make_groups([GOOD])
    bad = table_of([good[0], good[0] | {"query": "", "source": "a.jsonl:7"}], GROUP)
    write_groups(good, "out.jsonl")
    text = (folder / "work/out.jsonl").read_text()
    assert complaint(folder, lambda: write_groups(bad, "out.jsonl")) == "a.jsonl:7: `query` is empty; expected a text"
    assert complaint(folder, lambda: write_groups(bad, "new.jsonl")) == "a.jsonl:7: `query` is empty; expected a text"
    assert (folder / "work/out.jsonl").read_text() == text
    (folder / "work/folder").mkdir()
    assert "this is a folder" in complaint(folder, lambda: write_groups(good, "folder"))
    assert "at least one" in complaint(folder, lambda: write_groups(good.select([]), "out.jsonl"))
