"When texts are nearly the same, and what splits promise: nothing leaks, the order does not matter, what is there stays."
import random
import unicodedata
from itertools import combinations

import numpy as np
import pytest

from nixietune.core import InputError
from nixietune.display import quiet
from nixietune.groups import make_groups
from nixietune.texts import NEAR, SHORT, components, leaks, near_duplicates, near_pairs, normal_form, split_groups

WORDS = ["".join(random.Random(i).choices("abcdefghij", k=6)) for i in range(500)]


def similarity(a, b):
    "The definition, as slow as it reads."
    a, b = (normal_form(o).split() for o in (a, b))
    if a == b: return 1.0
    if min(len(a), len(b)) < SHORT: return 0.0
    a, b = ({tuple(o[i:i + 3]) for i in range(len(o) - 2)} for o in (a, b))
    return len(a & b) / len(a | b)


def variant(r, text):
    "Nearly, or not so nearly, the same text."
    words = text.split()
    for _ in range(r.randrange(3)): words[r.randrange(len(words))] = r.choice(WORDS)
    text = (" ", ", ", "  ")[r.randrange(3)].join(words)
    return text.upper() if r.random() < 0.3 else text


def many_texts(r, n):
    texts = [" ".join(r.choices(WORDS, k=r.randint(1, 60))) for _ in range(2 * n // 3)]
    while len(texts) < n: texts.append(variant(r, r.choice(texts)))
    return texts


def world(r, n, texts=40, sets=3):
    "Groups that share queries, positives and near-duplicates of both."
    queries, docs = many_texts(r, 2 * n), many_texts(r, texts)
    rows = [{"query": r.choice(queries), "pos": [{"doc": r.choice(docs)}], "neg": [{"doc": r.choice(docs)}],
             "dataset": f"set {r.randrange(sets)}"} for _ in range(n)]
    return make_groups(rows, "nixietune", source="world")


def split(*args, **options):
    with quiet(): return split_groups(*args, **options)


def sources(parts): return [set(part["source"][:]) for part in parts]


def test_normal_forms_are_final():
    "The normal form of a normal form is itself, and letters are never lost."
    for code in range(0, 0x30000, 7):
        if unicodedata.category(chr(code)) == "Cs": continue
        form = normal_form(f"a{chr(code)}b")
        assert normal_form(form) == form, hex(code)
        if unicodedata.category(chr(code))[0] in "LMN" and unicodedata.normalize("NFKC", chr(code)).strip(): assert len(form) > 2 or form != "ab", hex(code)


def test_short_texts_go_by_their_normal_form():
    a = "how do I treat a fever"
    assert list(near_duplicates([a, a + " blister", "How do I treat a: fever?!"])) == [0, 1, 0]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("threshold", [0.5, NEAR, 0.95])
def test_near_pairs_are_exact(seed, threshold):
    "No false pair, and none missed among a few hundred: the clusters are those of the definition."
    texts = many_texts(random.Random(seed), 120)
    pairs, found = near_pairs(texts, threshold)
    assert (pairs[:, 0] < pairs[:, 1]).all()
    for (i, j), s in zip(pairs, found): assert s == pytest.approx(similarity(texts[i], texts[j])) and s >= threshold
    cluster = list(range(len(texts)))
    for i, j in combinations(range(len(texts)), 2):
        if similarity(texts[i], texts[j]) >= threshold and cluster[i] != cluster[j]:
            low, high = sorted((cluster[i], cluster[j]))
            cluster = [low if o == high else o for o in cluster]
    assert list(near_duplicates(texts, threshold)) == cluster


def test_near_duplicates_in_any_order():
    r = random.Random(1)
    texts = many_texts(r, 2_000)
    order = r.sample(range(2_000), 2_000)
    here, there = near_duplicates(texts), near_duplicates([texts[i] for i in order])
    together = lambda number, names: {frozenset(names[i] for i in np.flatnonzero(number == o)) for o in set(number.tolist())}
    assert together(here, range(2_000)) == together(there, order)


def test_a_crowd_is_held_together():
    "A form letter with a thousand names in it is one cluster, although not every pair is compared."
    letter = " ".join(random.Random(0).choices(WORDS, k=80)).split()
    texts = [" ".join([*letter[:40], f"name{i}", *letter[41:]]) for i in range(1_000)]
    assert set(near_duplicates(texts).tolist()) == {0}


@pytest.mark.parametrize("seed", range(12))
def test_nothing_leaks(seed):
    "Whatever links the groups: no query, no positive and no near-duplicate of one is in two splits, and no row is lost."
    r = random.Random(seed)
    groups = world(r, 100, texts=240)
    parts = split(groups, (0.5, 0.3, 0.2), seed)
    assert components(groups).max() < 90 # there is something to leak
    assert sorted(o for part in parts for o in part["source"][:]) == sorted(groups["source"][:])
    for a, b in combinations(parts, 2):
        assert set(leaks(a, b, near=NEAR).values()) == {0}
        for kind in (lambda o: [o["query"]], lambda o: [item["doc"] for item in o["pos"]]):
            first, second = ({t for o in part for t in kind(o)} for part in (a, b))
            assert all(similarity(x, y) < NEAR for x in first for y in second)


def test_by_query_links_by_queries_alone():
    groups = make_groups([{"query": f"question {i // 2}", "pos": [{"doc": "the one answer"}]} for i in range(100)])
    with pytest.raises(InputError, match='by="query"'): split(groups)
    parts = split(groups, by="query")
    assert [len(o) for o in parts] == [80, 10, 10]
    assert leaks(parts[0], parts[2]) == {"queries": 0, "positives": 1, "groups": 10}


@pytest.mark.parametrize("seed", range(4))
def test_any_order_of_rows(seed):
    groups = world(random.Random(seed), 200, texts=500)
    assert sources(split(groups, seed=7)) == sources(split(groups.shuffle(seed=seed), seed=7)) != sources(split(groups, seed=8))


def test_every_data_set_is_divided():
    rows = lambda name, n: [{"query": f"{name} {i}", "pos": [{"doc": f"of {name}: {i // 2}"}], "dataset": name} for i in range(n)]
    groups = make_groups(rows("large", 1_000) + rows("small", 100) + rows("tiny", 20) + [o for i in range(30) for o in rows(f"very tiny {i}", 4)],
                         "nixietune")
    parts = split(groups)
    shares = lambda name: [sum(o.startswith(name) for o in part["dataset"][:]) for part in parts]
    assert shares("large") == [800, 100, 100]
    assert shares("small") == [80, 10, 10]
    assert shares("tiny") == [16, 2, 2]
    assert np.abs(np.array(shares("very tiny")) - [96, 12, 12]).max() <= 2


def test_a_component_in_two_data_sets_stays_whole():
    row = lambda name, i, doc: {"query": f"{name} {i}", "pos": [{"doc": doc}], "dataset": name}
    groups = make_groups([row(name, i, f"answer {i}") for name in "ab" for i in range(100)], "nixietune")
    parts = split(groups)
    assert [[part["dataset"][:].count(name) for part in parts] for name in "ab"] == [[80, 10, 10]] * 2


def test_a_hub_is_shown():
    texts = ["The imprint of our company. " * 9, "A second hub", "A third, smaller one"]
    docs = [texts[0]] * 40 + [texts[1]] * 20 + [texts[2]] * 11
    rows = [{"query": f"q{i}", "pos": [{"doc": o}, *[{"doc": "the link"}] * (i % 10 == 0)]} for i, o in enumerate(docs)]
    groups = make_groups(rows + [{"query": f"other {i}", "pos": [{"doc": f"other {i}"}]} for i in range(400)])
    with pytest.raises(InputError) as error: split(groups)
    first, *lines = str(error.value).splitlines()
    assert first == "split_groups: 71 groups of 471 hang together, more than the smallest split (47):"
    assert lines[0].startswith('  "The imprint of our company.') and lines[0].endswith('…" answers 40 groups') and len(lines[0]) < 100
    assert lines[1] == '  "A second hub" answers 20 groups'
    assert 'by="query"' in lines[2] and "near=None" not in str(error.value)


def test_a_query_in_too_many_groups():
    groups = make_groups([{"query": "how" if i < 30 else f"q{i}", "pos": [{"doc": f"d{i}"}]} for i in range(100)])
    for by in ("positive", "query"):
        with pytest.raises(InputError) as error: split(groups, by=by)
        assert str(error.value).splitlines()[1].startswith('  "how" is asked in 30 groups')
        assert 'by="query"' not in str(error.value)


def test_near_duplicates_that_link_too_much():
    "Where only likeness makes the component large, the error says how to go by equal texts."
    words = random.Random(3).choices(WORDS, k=60)
    rows = [{"query": f"q{i}", "pos": [{"doc": " ".join([*words, f"number{i}"])}]} for i in range(50)]
    groups = make_groups(rows + [{"query": f"other {i}", "pos": [{"doc": f"other {i}"}]} for i in range(50)])
    with pytest.raises(InputError, match="near=None"): split(groups)
    assert [len(o) for o in split(groups, near=None)] == [80, 10, 10]


def test_small_tables_are_split():
    "A few rows in common are no fault where all rows are few."
    groups = make_groups([{"query": f"q{i}", "pos": [{"doc": f"d{min(i, 20)}"}]} for i in range(28)])
    assert [len(o) for o in split(groups)] == [22, 3, 3]


@pytest.mark.parametrize("seed", range(6))
def test_added_rows_move_only_what_they_touch(seed, capsys):
    r = random.Random(seed)
    rows = lambda name, n: [{"query": f"{name} {i}", "pos": [{"doc": f"{name} answer {i // 2}"}]} for i in range(n)]
    old = make_groups(rows("old", 200), source="old")
    before = split(old)
    bridges = [{"query": f"bridge {i}", "pos": [{"doc": o["pos"][0]["doc"]} for o in (r.choice(before[0]), r.choice(before[2]))]}
               for i in range(3)]
    added = make_groups(rows("new", 60) + bridges, source="new")
    whole = make_groups([{"query": o["query"], "pos": o["pos"], "source": o["source"]} for o in [*old, *added]], source="whole")
    capsys.readouterr()
    after = split_groups(whole.shuffle(seed=seed), seed=r.random(), before=before)
    said = capsys.readouterr().out
    touched = {item["doc"] for o in bridges for item in o["pos"]}
    was = {o["query"]: i for i, part in enumerate(before) for o in part}
    now = {o["query"]: i for i, part in enumerate(after) for o in part}
    moved = [q for q in was if was[q] != now[q]]
    assert len(now) == len(whole) and moved
    for o in old:
        if o["query"] in moved: assert o["pos"][0]["doc"] in touched and (was[o["query"]], now[o["query"]]) == (2, 0)
    assert f"{len(moved)} groups of before moved" in said and '" from test to train' in said
    for a, b in combinations(after, 2): assert set(leaks(a, b, near=NEAR).values()) == {0}
    assert [len(o) for o in after] == pytest.approx([0.8 * len(whole), 0.1 * len(whole), 0.1 * len(whole)], abs=4)


def test_new_rows_alone_go_by_what_is_there():
    "The rows of before need not be among the groups."
    old = make_groups([{"query": f"q{i}", "pos": [{"doc": f"d{i}"}]} for i in range(100)])
    before = split(old)
    new = make_groups([{"query": f"again {o['query']}", "pos": o["pos"]} for o in before[2]])
    with pytest.raises(InputError, match="split into 0, 0, 10"): split(new, before=before)
    more = make_groups([{"query": f"more {i}", "pos": [{"doc": f"more {i}"}]} for i in range(90)])
    parts = split(make_groups([{"query": o["query"], "pos": o["pos"]} for o in [*new, *more]]), before=before)
    assert set(new["query"][:]) <= set(parts[2]["query"][:])
    assert split(old, seed=5, before=before)[2]["query"][:] == before[2]["query"][:]


def test_groups_without_positives_are_split():
    "Rows whose documents only carry a number have no positive to share."
    groups = make_groups([{"query": f"q{i}", "pos": [{"doc": f"d{i}"}]} for i in range(20)])
    from nixietune.groups import GROUP, table_of
    bare = table_of([o | {"pos": []} for o in groups], GROUP)
    assert [len(o) for o in split(bare)] == [16, 2, 2]
    assert list(components(bare)) == list(range(20))
    assert leaks(bare, bare.select([])) == {"queries": 0, "positives": 0, "groups": 0}
