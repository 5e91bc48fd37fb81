"The audit finds every fault that is planted, none where there is none, and each mending call puts its fault right."
import json
import random
import sys

import numpy as np
import pytest
from datasets import Dataset, concatenate_datasets

from nixietune.auditing import (
    FINDINGS,
    NEAR,
    add_positives,
    audit,
    drop_duplicates,
    drop_suspicious,
    drop_teacher,
    forget_ids,
    keep_script,
    limit_hubs,
    mask,
    merge_queries,
    sort_by_grade,
    split_by_length,
    squash_teacher,
    teacher_to_score,
    token_counts,
    unify_documents,
)
from nixietune.core import InputError
from nixietune.display import quiet
from nixietune.groups import FEATURES, corpus_of, load_groups, make_groups, write_groups
from nixietune.testing import tiny_model
from nixietune.texts import split_groups

WORDS = ["".join(random.Random(i).choices("abcdefghijklmnop", k=6)) for i in range(2_000)]


def text(r, words=30): return " ".join(r.sample(WORDS, words))


def clean_rows(n=60, seed=0):
    r = random.Random(seed)
    return [{"query": text(r, 5), "pos": [{"doc": text(r), "teacher": r.uniform(0.6, 0.9)}],
             "neg": [{"doc": text(r), "teacher": r.uniform(0.1, 0.4)} for _ in range(3)]} for _ in range(n)]


def groups_of(rows): return make_groups(rows, "nixietune")


def names(report): return {o.name for o in report}


def reworded(o): return o.replace(o.split()[2], "reworded", 1)


# A fault: how to plant it in clean rows, the row (from 1) that shows it, the call that mends it, what else it may bring.

def repeat_group(rows): rows.append(rows[3])


def repeat_group_nearly(rows): rows.append({**rows[3], "query": rows[3]["query"].upper() + "?"})


def repeat_document(rows): rows[4]["neg"].append(rows[4]["neg"][0])


def repeat_query(rows): rows[9]["query"] = rows[2]["query"]


def contradict(rows): rows[5]["neg"][1] = {"doc": rows[5]["pos"][0]["doc"], "teacher": 0.1}


def contradict_elsewhere(rows): rows.append({"query": rows[5]["query"], "pos": [rows[5]["neg"][1]], "neg": []})


def contradict_nearly(rows): rows[6]["neg"][0] = {"doc": reworded(rows[6]["pos"][0]["doc"]), "teacher": 0.1}


def contradict_by_id(rows):
    rows[7]["pos"][0]["doc_id"] = rows[7]["neg"][0]["doc_id"] = "same"


def copy_document(rows): rows[8]["neg"][0]["doc"] = reworded(rows[20]["pos"][0]["doc"])


def give_two_ids(rows): rows[8]["pos"][0]["doc_id"], rows[30]["neg"][0] = "a", {**rows[8]["pos"][0], "doc_id": "b", "teacher": 0.2}


def make_hub(rows):
    for o in rows[30:55]: o["pos"] = [{"doc": "Ask your doctor.", "teacher": 0.7}]


def score_negative_high(rows): rows[10]["neg"][2]["teacher"] = 0.95


def score_all_alike(rows):
    for o in rows:
        for item in (*o["pos"], *o["neg"]): item["teacher"] = 0.5


def score_in_whole_numbers(rows):
    for o in rows:
        for side, grade in ("pos", 3), ("neg", 0):
            for item in o[side]: item["teacher"] = grade


def score_in_logits(rows):
    for o in rows:
        for item in (*o["pos"], *o["neg"]): item["teacher"] = 10 * item["teacher"] - 5.5


def score_some(rows): del rows[11]["neg"][0]["teacher"]


def grade_wrongly(rows): rows[12]["neg"][0]["score"] = 1.0


def write_in_greek(rows): rows[13]["query"] = "Πώς παίρνω τα δισκία"


FAULTS = [  # plant, finding, line, mend, findings that come with it
    (repeat_group, "duplicate_groups", 61, drop_duplicates, ""),
    (repeat_group_nearly, "near_duplicate_groups", 61, lambda o: drop_duplicates(o, near=NEAR), ""),
    (repeat_document, "repeated_documents", 5, drop_duplicates, ""),
    (repeat_query, "repeated_queries", 10, merge_queries, ""),
    (contradict, "contradictions", 6, mask, ""),
    (contradict_elsewhere, "contradictions", 6, lambda o: mask(merge_queries(o)), "repeated_queries no_negatives"),
    (contradict_nearly, "near_contradictions", 7, lambda o: mask(o, near=NEAR), "near_documents"),
    (contradict_by_id, "contradictions", 8, mask, "ids_with_texts"),
    (contradict_by_id, "ids_with_texts", 8, forget_ids, "contradictions"),
    (copy_document, "near_documents", 9, unify_documents, ""),
    (give_two_ids, "texts_with_ids", 31, unify_documents, ""),
    (make_hub, "hubs", 31, limit_hubs, ""),
    (score_negative_high, "suspicious_to_teacher", 11, drop_suspicious, ""),
    (score_all_alike, "constant_teacher", 1, drop_teacher, ""),
    (score_in_whole_numbers, "whole_teacher", 1, teacher_to_score, ""),
    (score_in_logits, "wide_teacher", 1, squash_teacher, ""),
    (score_some, "partial_teacher", 1, drop_teacher, ""),
    (grade_wrongly, "grades_against_sides", 13, sort_by_grade, ""),
    (write_in_greek, "scripts", 14, keep_script, ""),
]


@pytest.mark.parametrize("seed", range(3))
def test_nothing_is_found_where_nothing_is_wrong(seed):
    groups = groups_of(clean_rows(seed=seed))
    with quiet():
        report = audit(groups, corpus_of(groups), splits=split_groups(groups), max_length=30)
        assert names(report) == set() and "Nothing was found" in repr(report) and "Nothing was found" in report._repr_html_()
        for mend in (drop_duplicates, merge_queries, mask, unify_documents, limit_hubs, drop_suspicious, sort_by_grade, keep_script):
            assert mend(groups).to_list() == groups.to_list(), mend.__name__


@pytest.mark.parametrize("plant, finding, line, mend, others", FAULTS, ids=[f"{o[0].__name__}-{o[1]}" for o in FAULTS])
def test_each_fault_is_found_and_mended(plant, finding, line, mend, others):
    rows = json.loads(json.dumps(clean_rows()))
    plant(rows)
    groups = groups_of(rows)
    report = audit(groups)
    assert names(report) == {finding, *others.split()}
    found = report[finding]
    assert f"rows:{line}" in [o["source"] for o in found.all()]
    assert found.count == len(list(found.all())) == len(found.rows.rows)
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()
    with quiet(): mended = mend(groups)
    assert mended.features == FEATURES()
    assert finding not in audit(mended)
    if not others: assert names(audit(mended)) <= {"no_negatives", "grades_against_sides"} - {finding}


def test_all_faults_at_once(tmp_path):
    "A file with everything in it: each row that is shown is the row of the file, and after all calls nothing is left."
    rows = json.loads(json.dumps(clean_rows(80)))
    for plant in (contradict, contradict_nearly, copy_document, make_hub, score_negative_high, write_in_greek, repeat_document, repeat_group): plant(rows)
    path = write_groups(groups_of(rows), tmp_path / "dirty.jsonl")
    with quiet(): groups = load_groups(path)
    report = audit(groups)
    assert len(report) >= 8
    lines = path.read_text().splitlines()
    for finding in report:
        for o in finding.all():
            written = json.loads(lines[int(o["source"].rpartition(":")[2]) - 1])
            assert written["query"] == o["query"]
            if "document" in o: assert o["document"] in [item["doc"] for side in ("pos", "neg") for item in written[side]]
    with quiet():
        mended = merge_queries(drop_duplicates(unify_documents(groups)))
        mended = keep_script(limit_hubs(drop_suspicious(mask(mended, near=NEAR))))
    assert names(audit(mended)) == set()
    order = [o.severity for o in report]
    assert order == sorted(order, key=["error", "warning", "note"].index)


def test_splits_that_share():
    rows = clean_rows(40)
    rows[30]["query"] = rows[0]["query"]
    rows[31]["pos"][0]["doc"] = reworded(rows[1]["pos"][0]["doc"])
    rows[32]["neg"][0]["doc"] = rows[2]["pos"][0]["doc"]  # a negative may be shared
    groups = groups_of(rows)
    parts = groups.select(range(20)), groups.select(range(20, 30)), groups.select(range(30, 40))
    report = audit(groups, splits=parts)
    (query,), (positive,) = report["shared_queries"].all(), report["shared_positives"].all()
    assert (query["split"], query["source"], query["earlier split"], query["first"]) == ("test", "rows:31", "train", "rows:1")
    assert (positive["source"], positive["first"], positive["text"]) == ("rows:32", "rows:2", rows[31]["pos"][0]["doc"])
    assert "(1 nearly the same)" in report["shared_positives"].what
    with quiet(): parts = split_groups(groups)
    assert not {"shared_queries", "shared_positives"} & names(audit(groups, splits=parts))
    assert names(audit(groups, splits={"a": groups, "b": groups.select([])})) == names(audit(groups))


def test_positives_that_are_not_in_the_corpus():
    groups = groups_of(clean_rows(20))
    corpus = corpus_of(groups)
    short = corpus.filter(lambda o: o["text"] != groups[7]["pos"][0]["doc"])
    report = audit(groups, short)
    assert [o["source"] for o in report["missing_positives"].all()] == ["rows:8"] and report.counts["corpus"] == len(corpus) - 1
    with quiet(): assert names(audit(groups, add_positives(short, groups))) == set()


def test_suspicious_to_an_encoder():
    "A negative that the encoder puts above every positive; a function will do as an encoder."
    points = {"q": (1, 0), "good": (1, 0.1), "poor": (0, 1), "near": (1, 0.5), "better": (1, 0.05)}
    groups = make_groups([{"query": "q", "pos": [{"doc": "good"}, {"doc": "poor"}], "neg": [{"doc": "near"}, {"doc": "better"}]}])
    encoder = lambda texts, role: np.array([points[o] for o in texts], float)  # noqa: E731
    report = audit(groups, encoder=encoder)
    (found,) = report["suspicious_to_encoder"].all()
    assert found["document"] == "better" and found["negative"] > found["positive"] == pytest.approx(1 / np.hypot(1, 0.1))
    assert report.unit == "words" and len(report.scores["encoder"]["positives"]) == 2
    with quiet():
        assert [o["doc"] for o in drop_suspicious(groups, encoder)[0]["neg"]] == ["near"]
        assert drop_suspicious(groups, encoder, margin=-1)[0]["neg"] == []


def test_lengths_in_tokens_and_what_is_cut():
    model = tiny_model(length=16)
    groups = make_groups([{"query": "bird", "pos": [{"doc": "bird " * 40}], "neg": [{"doc": "red fish"}]}])
    report = audit(groups, encoder=model)
    assert report.unit == "tokens" and {k: o.tolist() for k, o in report.lengths.items()} == {"queries": [3], "positives": [42], "negatives": [4]}
    (found,) = report["cut_positives"].all()
    assert (found["source"], found["tokens"]) == ("rows:1", 42)
    assert "1 of 1 positives longer than 16 tokens, 61.9% of their text cut" == report["cut_positives"].what
    assert names(audit(groups, encoder=model, max_length=42)) <= {"suspicious_to_encoder"}
    with pytest.raises(InputError, match="max_length is 0"): audit(groups, max_length=0)


@pytest.mark.parametrize("kind", ["bert", "roberta", "qwen3", "static"])
def test_token_counts_are_those_of_the_tokenizer(kind):
    model = tiny_model(kind)
    texts = ["a red bird", "bird", "an unknown word or two, and more " * 60]
    tokenizer = model[0].tokenizer
    before = tokenizer.to_str() if kind == "static" else None
    counts = token_counts(texts, model).tolist()
    if kind == "static": assert tokenizer.to_str() == before  # its settings are left as they were
    else: assert counts == [len(tokenizer(o, truncation=False, verbose=False)["input_ids"]) for o in texts]
    assert counts[2] > 128


@pytest.mark.parametrize("seed", range(3))
def test_split_by_length(seed):
    "Every group is in one bin, the one of its longest text."
    r, model = random.Random(seed), tiny_model()
    item = lambda: {"doc": " ".join(["bird"] * r.randint(1, 60))}  # noqa: E731
    groups = make_groups([{"query": "fish " * r.randint(1, 60), "pos": [item()], "neg": [item() for _ in range(r.randint(0, 3))]} for _ in range(50)])
    with quiet(): bins = split_by_length(groups, model, (0, 10, 20, 40, 400))
    assert sorted(o for part in bins.values() for o in part["source"][:]) == sorted(groups["source"][:])
    assert "len-400-inf" not in bins
    for name, part in bins.items():
        low, high = map(int, name.split("-")[1:])
        for o in part: assert low <= 2 + max(len(t.split()) for t in (o["query"], *(i["doc"] for side in ("pos", "neg") for i in o[side]))) < high


def test_bins_say_what_is_in_them(capsys):
    groups = make_groups([{"query": "bird", "pos": [{"doc": "bird " * n}]} for n in (1, 30)])
    capsys.readouterr()
    assert list(split_by_length(groups, tiny_model(), (10, 20))) == ["len-20-inf"]
    assert capsys.readouterr().out == "shorter: 1 group, len-20-inf: 1 group; shorter than 10 tokens, and in no bin\n"
    for bad in ((), (5, 5), (10, 5), (-1, 5), (0.5, 1), (True, 5)):
        with pytest.raises(InputError, match="bounds"): split_by_length(groups, tiny_model(), bad)


def test_data_sets_are_judged_by_themselves():
    fine, flat = groups_of(clean_rows(10)), json.loads(json.dumps(clean_rows(10, seed=1)))
    score_all_alike(flat)
    both = concatenate_datasets([fine, make_groups([o | {"dataset": "flat"} for o in flat], "nixietune")])
    report = audit(both)
    assert names(report) == {"constant_teacher"} and report["constant_teacher"].call == "drop_teacher(groups, ['flat'])"
    with quiet(): mended = eval(report["constant_teacher"].call, {"groups": both, "drop_teacher": drop_teacher})
    assert mended[0] == both[0] and mended[19]["pos"][0]["teacher"] is None and names(audit(mended)) == set()


def test_documents_that_are_only_scored():
    "Tables may have a third list of documents, which only carry a number; they are counted and kept."
    records = groups_of(clean_rows(5)).to_list()
    for o in records: o["scored"] = [{"doc": f"scored for {o['query']}", "doc_id": None, "score": 0.3, "teacher": None, "miner": None}]
    report = audit(Dataset.from_list(records))
    assert report.counts["scored"] == 5 and "scored" in report.lengths


def test_one_word_may_matter():
    "Queries that differ in a word are never merged, however alike they look."
    query = "{} end part of the middle bone of the little finger of the left hand"
    doc = lambda o: " ".join(f"{w} {o}" if i == 20 else w for i, w in enumerate(WORDS[:40]))  # noqa: E731
    groups = make_groups([{"query": query.format(o), "pos": [{"doc": doc(o)}]} for o in ("small", "enlarged")])
    report = audit(groups)
    assert names(report) == {"near_documents"} and report["near_documents"].severity == "note"
    with quiet(): assert len(drop_duplicates(groups, near=NEAR)) == len(merge_queries(groups, loose=True)) == 2
    shared = audit(groups, splits=(groups.select([0]), groups.select([1])))
    assert {shared[o].severity for o in ("shared_queries", "shared_positives")} == {"warning"}


def test_what_is_shown():
    report = audit(groups_of(clean_rows(30) * 5))
    found = report["duplicate_groups"]
    assert found.count == 120 and len(found.rows.rows) == 100 and "the first 100 of 120" in found.rows.note
    assert len(report.to_dict()["findings"][0]["rows"]) == 10
    for o in (found.what, found.meaning, found.advice, found.call): assert o in repr(report)
    assert "duplicate_groups" in report._repr_html_() and "<script" not in report._repr_html_()
    with pytest.raises(InputError, match="no finding 'hubs'; expected duplicate_groups"): report["hubs"]
    with pytest.raises(InputError, match="no groups"): audit(groups_of(clean_rows(1)).select([]))


def test_every_finding_is_described():
    "All findings are in the table, and each says what it looks for."
    module = sys.modules["nixietune.auditing"]
    functions = {o for name, o in vars(module).items() if name.startswith("find_")}
    assert functions == set(FINDINGS) and all(o.__doc__ for o in FINDINGS)


def test_what_mends_can_be_typed():
    "Every call that a finding names is a public name."
    import re
    from pathlib import Path

    import nixietune as nt
    from nixietune import auditing
    named = {*re.findall(r'"(\w+)\((?:groups|model)', Path(auditing.__file__).read_text()), *(o[-1] for o in auditing._TEACHERS)}
    assert len(named) > 8 and not named - {*nt.__all__}
