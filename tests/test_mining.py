"Mining: what is never a negative, what the ranking means, who judges, and that nothing depends on luck or order."
import random
import sys
from functools import partial

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import nixietune as nt
from nixietune.batching import index_groups
from nixietune.core import InputError
from nixietune.index import search
from nixietune.mining import bm25_miner, candidates, miners_of, pool_of, read_range
from nixietune.relation import OWN
from nixietune.scoring import as_scorer
from nixietune.texts import normal_form

WORDS = ["red", "Blue", "grün", "東京", "naïve", "🐟", "über", "dog", "the", "x"]
text = st.lists(st.sampled_from(WORDS), min_size=1, max_size=4).map(" ".join)
LONG = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"


def hashed(texts, role):
    "An encoder that has an opinion about every text, and no idea."
    return np.stack([np.random.default_rng(list(f"{o}".encode())).normal(size=8) for o in texts])


def make(rows): return nt.make_groups([{"query": q, "pos": [{"doc": o} if isinstance(o, str) else o for o in pos], "neg": [{"doc": o} for o in neg]} for q, pos, *[neg] in [(*row, []) if len(row) == 2 else row for row in rows]], "nixietune")


def corpus_of(texts): return [{"doc_id": f"d{i}", "text": o} for i, o in enumerate(texts)]


def mined(*args, **options):
    with nt.quiet(): return nt.mine_negatives(*args, **{"progress": False, **options})


def new(groups): return [[o["doc"] for o in neg if o["miner"]] for neg in groups["neg"][:]]


@st.composite
def world(draw):
    "Groups whose queries, positives and documents repeat, and other groups that are only known."
    docs = draw(st.lists(text, min_size=1, max_size=15))
    query = text.flatmap(lambda o: st.sampled_from([o, o.upper(), o + "?"]))
    item = st.sampled_from(docs).flatmap(lambda o: st.sampled_from([{"doc": o}, {"doc": o, "doc_id": f"d{docs.index(o)}"}])) | text.map(lambda o: {"doc": "only here " + o})
    group = st.tuples(query, st.lists(item, min_size=1, max_size=3), st.lists(text, max_size=2))
    return docs, draw(st.lists(group, min_size=1, max_size=6)), draw(st.lists(group, max_size=3))


@given(world(), st.sampled_from(["top", "random", "softmax"]), st.sampled_from([hashed, "bm25", (hashed, "bm25")]), st.sampled_from(["rrf", "union"]),
       st.sampled_from([None, .95]), st.sampled_from([None, "random"]), st.integers(1, 5), st.sampled_from(["keep", "replace"]))
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_known_positive_is_ever_mined(world, sampling, encoder, fuse, relative, fill, number, existing):
    docs, rows, others = world
    groups, known = make(rows), [make(others)] if others else []
    out = mined(groups, list(encoder) if isinstance(encoder, tuple) else encoder, corpus_of(docs), number=number, sampling=sampling, fuse=fuse, relative=relative, fill=fill, known=known, existing=existing)
    positives = {}
    for q, pos, _ in rows + others: positives.setdefault(normal_form(q), set()).update(normal_form(o["doc"]) for o in pos)
    assert out["pos"][:] == groups["pos"][:] and out["query"][:] == groups["query"][:]
    for (q, _, given), neg, found in zip(rows, out["neg"][:], new(out)):
        assert not {normal_form(o) for o in found} & positives[normal_form(q)]
        assert q not in found and len(set(found)) == len(found) <= number and set(found) <= set(docs)
        assert [o["doc"] for o in neg if not o["miner"]] == (given if existing == "keep" else [])
        if existing == "keep": assert not {*found} & {*given}


@given(world(), st.randoms(use_true_random=False), st.sampled_from(["top", "random", "softmax"]))
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
def test_the_order_of_groups_does_not_matter(world, r, sampling):
    docs, rows, _ = world
    order = r.sample(range(len(rows)), len(rows))
    a = new(mined(make(rows), hashed, corpus_of(docs), number=2, sampling=sampling, relative=None, fill="random", seed=3))
    b = new(mined(make([rows[i] for i in order]), hashed, corpus_of(docs), number=2, sampling=sampling, relative=None, fill="random", seed=3))
    assert [a[i] for i in order] == b


def in_order(texts, role): return np.array([[1.0, -float(o.split()[1]) if role == "document" else 1.0] for o in texts])


@pytest.mark.parametrize("first,end", [(0, 10), (2, 7), (2, 200), (0, 1), (9, 10), (5, 6)])
def test_range_is_a_slice_of_the_whole_ranking(first, end):
    "Ten documents, numbers 3 and 5 are positives: places count them, as FlagEmbedding's code does."
    groups = make([("low 0", ["number 3", "number 5"])])
    ranking = [f"number {i}" for i in range(10)]
    expected = [o for o in ranking[first:end] if o not in ("number 3", "number 5")]
    found = mined(groups, in_order, corpus_of(ranking[::-1]), number=min(10, end - first), ranks=f"{first}-{end}", relative=None, metric="ip")
    assert new(found) == [expected]


def test_ceilings_against_the_slow_way():
    "What each ceiling allows, computed one by one."
    docs = [f"document {i}" for i in range(60)]
    groups = make([(f"query {i}", docs[2*i:2*i + 2]) for i in range(10)])
    for metric in ("cos", "ip"):
        for against, choice in (("lowest", min), ("highest", max)):
            for limits in (dict(relative=.9), dict(relative=None, margin=.2), dict(relative=None, max_score=.3), dict(relative=.95, margin=.1, max_score=.5)):
                found = new(mined(groups, hashed, corpus_of(docs), number=60, ranks=60, metric=metric, against=against, **limits))
                for query, pos, neg in zip(groups["query"][:], groups["pos"][:], found):
                    q, d = hashed([query], "")[0], hashed(docs, "")
                    score = d @ q / (np.linalg.norm(d, axis=1)*np.linalg.norm(q) if metric == "cos" else 1)
                    best = choice(score[docs.index(o["doc"])] for o in pos)
                    allowed = [limits["relative"] is None or s <= best - (1 - limits["relative"])*abs(best) for s in score]
                    allowed = [a and s <= best - limits.get("margin", -9) and s <= limits.get("max_score", 9) for a, s in zip(allowed, score)]
                    ranked = [i for i in np.argsort(-score, kind="stable") if allowed[i] and docs[i] not in {o["doc"] for o in pos}]
                    assert neg == [docs[i] for i in ranked]


def test_distance():
    try: search(np.eye(2), np.eye(2), 1, "l2")
    except InputError: pytest.skip("exact search does not know metric='l2' yet")
    docs = [f"document {i}" for i in range(30)]
    groups = make([("a query", [docs[0]])])
    near = ((hashed(docs, "") - hashed(["a query"], ""))**2).sum(1)
    found = new(mined(groups, hashed, corpus_of(docs), number=30, ranks=30, metric="l2"))[0]
    assert found == [docs[i] for i in np.argsort(near, kind="stable") if near[i] >= 1.05*near[0]]


def test_copies_are_refused_to_the_last_one():
    "Under other ids, in other cases and spacings, and nearly the same."
    r = random.Random(0)
    positives = [" ".join(r.choices(LONG.split(), k=20)) + f" number{i}" for i in range(20)]
    copies = [*positives, *(o.upper() for o in positives), *("  ".join(o.split()) + "!" for o in positives)]
    edited = [f"{o} more" for o in positives]
    groups, others = make([(f"query {i}", [o]) for i, o in enumerate(positives)]), [f"something else {i}" for i in range(5)]
    exact = new(mined(groups, hashed, corpus_of([*copies, *others]), number=50, relative=None))
    for i, neg in enumerate(exact): assert not {normal_form(o) for o in neg} & {normal_form(positives[i])} and len(neg) > 5
    nearly = new(mined(groups, hashed, corpus_of([*copies, *edited, *others]), number=90, relative=None))
    assert not any(edited[i] in neg for i, neg in enumerate(nearly))
    by_text = new(mined(groups, hashed, corpus_of([*copies, *edited, *others]), number=90, relative=None, near=None))
    assert all(edited[i] in neg and positives[i] not in neg for i, neg in enumerate(by_text))


def test_positives_count_by_id():
    "The corpus has another version of the positive under its id."
    groups = make([("a query", [{"doc": "old words", "doc_id": "d0"}])])
    assert new(mined(groups, hashed, corpus_of(["quite new words", "another"]), number=5, relative=None)) == [["another"]]


def test_small_worlds():
    "More asked than there is, one document, one query, copies only, an empty corpus, nobody to judge."
    one = make([("a query", ["the answer"])])
    assert new(mined(one, hashed, corpus_of(["the answer", "b", "b", "c"]), number=7, ranks="0-1000", relative=None))[0] in (["b", "c"], ["c", "b"])
    assert new(mined(one, hashed, corpus_of(["b"]), relative=None)) == [["b"]]
    assert new(mined(one, hashed, corpus_of(["the answer", "the answer"]), relative=None, fill="random")) == [[]]
    assert new(mined(one, hashed)) == [[]]  # the pool is the groups' own documents
    assert new(mined(one, corpus=corpus_of(["b", "the answer"]), sampling="random")) == [["b"]]
    for what, call in {"nobody who gives scores": lambda: mined(one, sampling="random", margin=0.1), "an empty corpus": lambda: mined(one, hashed, []), "there are no groups": lambda: mined(one.select([]), hashed), "no encoder": lambda: mined(one),
                       "no group has a positive": lambda: mined(nt.make_groups([{"query": "q", "scored": [{"doc": "a", "score": 1.0}]}], "nixietune"), hashed)}.items():
        with pytest.raises(InputError, match=what): call()


@pytest.mark.parametrize("wrong", [dict(number=0), dict(ranks="9-2"), dict(ranks="x"), dict(sampling="best"), dict(relative=1.2), dict(margin=-1), dict(fuse="sum"), dict(fill="zeros"), dict(existing="no"),
                                   dict(against="mean"), dict(metric="manhattan"), dict(temperature=0), dict(number=9, ranks="0-5")])
def test_options_that_cannot_be_meant(wrong):
    with pytest.raises(InputError): mined(make([("a query", ["the answer"])]), hashed, corpus_of(["b"]), **wrong)


def test_too_few_are_counted_and_said(capsys):
    groups = make([("a", ["p"]), ("b", ["p"])])
    out, report = nt.mine_negatives(groups, hashed, corpus_of(["p", "x", "y"]), number=4, relative=None, report=True)
    assert "fewer than 4 for 2 queries, none for 0" in capsys.readouterr().out and report.counts.tolist() == [2, 2]
    out, report = nt.mine_negatives(groups, "bm25", corpus_of(["p", "x", "y"]), number=2, relative=None, report=True, fill="random")
    assert "4 of them are random" in capsys.readouterr().out and {o["miner"] for neg in out["neg"][:] for o in neg} == {"random"}
    assert report.facts["filled"] == 4 and sum(report.refused.values()) + len(report.negatives) - 4 <= report.facts["candidates"]


def test_cross_encoder_reads_every_candidate_that_is_left():
    docs, asked = [f"document {i} " + "long "*(i % 7) for i in range(20)], []
    def judge(pairs):
        asked.extend(pairs)
        return [int(d.split()[1]) for _, d in pairs]
    groups = make([("query 1", [docs[15]]), ("query 2", [docs[8]])])
    out, report = mined(groups, hashed, corpus_of(docs), number=3, ranks=20, relative=None, margin=0.5, cross_encoder=judge, report=True)
    assert len(set(asked)) == len(asked) == 40  # 19 candidates and a positive each
    assert new(out) == [[docs[14], docs[13], docs[12]], [docs[7], docs[6], docs[5]]]
    assert report.negatives["score"].tolist() == [14, 13, 12, 7, 6, 5] and report.negatives["positive"].tolist() == [15]*3 + [8]*3
    with pytest.raises(InputError, match="one number a pair"): mined(groups, hashed, corpus_of(docs), cross_encoder=lambda pairs: [1.0])


def test_only_a_cross_encoder_s_scores_are_logits(tmp_path):
    "A teacher given by its name judges like the loaded one: an encoder's cosines stay what they are."
    model, docs = nt.tiny_model(), [f"document {i}" for i in range(6)]
    model.save_pretrained(str(tmp_path/"teacher"))
    named, loaded = (mined(make([("query 1", [docs[1]])]), "bm25", corpus_of(docs), number=3, ranks=20, relative=None, max_score=2, cross_encoder=o, report=True)[1].negatives["score"].to_numpy() for o in (str(tmp_path/"teacher"), model))
    cosines = np.sort(model.similarity(model.encode(["query 1"]), model.encode(docs)).numpy().ravel())
    assert np.allclose(named, loaded, atol=1e-6) and all(np.isclose(cosines, o, atol=1e-5).any() for o in named)


def test_an_interrupted_mining_goes_on(tmp_path):
    "Vectors and scores that were computed are read again, and the result is that of a run in one piece."
    docs, asked, broken = [f"document {i}" for i in range(20)], [], True
    def judge(pairs):
        if broken and asked: raise KeyboardInterrupt
        asked.extend(pairs)
        return [int(d.split()[1]) for _, d in pairs]
    groups, corpus, model = make([(f"query {i}", [docs[i]]) for i in range(4)]), corpus_of(docs), nt.tiny_model()
    teacher = as_scorer(judge, name="by number")
    mine = lambda **more: mined(groups, model, corpus, number=3, ranks=20, relative=None, margin=0.5, cross_encoder=teacher, **more)
    asked.append("nobody yet")
    with pytest.raises(KeyboardInterrupt): mine(cache=tmp_path)
    broken, stamps = False, {o: o.stat().st_mtime_ns for o in tmp_path.rglob("*.npy")}
    assert [*tmp_path.iterdir()]  # the vectors were kept
    once, n = new(mine(cache=tmp_path)), len(asked)
    assert new(mine(cache=tmp_path)) == once == new(mine()) and len(asked) == 2*n - 1  # the second call asked about nothing, the one without a folder about all
    assert stamps == {o: o.stat().st_mtime_ns for o in stamps}
    with pytest.raises(InputError, match="without a name"): mined(groups, model, corpus, relative=None, margin=0.5, cross_encoder=judge, cache=tmp_path)


def test_scores_stay_out_of_the_groups():
    out = mined(make([("a", ["p"])]), hashed, corpus_of(["p", "x", "y"]), number=2, relative=None)
    assert [(o["score"], o["teacher"], o["miner"]) for o in out[0]["neg"]] == [(None, None, "hashed")]*2


def test_usable_at_once(tmp_path):
    out = mined(nt.toy_groups(10, negatives=0), hashed, nt.toy_corpus(), number=3)
    arrays = index_groups(out, folder=tmp_path/"index").arrays
    assert (np.asarray(arrays.kind) == OWN).sum() == sum(map(len, out["neg"][:])) > 0
    assert nt.write_groups(out, tmp_path/"mined.jsonl").exists()
    with nt.quiet(): assert nt.load_groups(tmp_path/"mined.jsonl")["neg"][:] == out["neg"][:]


def test_prompts_are_honoured():
    model, groups = nt.tiny_model(prompts={"query": "query: ", "document": "passage: "}), nt.toy_groups(4)
    pool = pool_of(groups)
    miner = miners_of(model, pool, progress=False)[0]
    q, d = model.encode(["query: " + groups["query"][0]]), model.encode(["passage: " + pool.texts[1]])
    assert miner.score(np.array([0]), np.array([1]))[0] == pytest.approx(float((q @ d.T)[0, 0]), abs=1e-5)
    own = nt.make_groups([dict(groups[0], prompt="find: "), dict(groups[1])], "nixietune")
    pool = pool_of(own)
    q = model.encode(["find: " + own["query"][0]])
    d = model.encode(["passage: " + pool.texts[1]])
    assert miners_of(model, pool, progress=False)[0].score(np.array([0]), np.array([1]))[0] == pytest.approx(float((q @ d.T)[0, 0]), abs=1e-5)


def test_bm25_ranks_as_bm25s_does():
    import bm25s
    r = random.Random(0)
    docs = list(dict.fromkeys(" ".join(r.choices("abcdefghij", k=r.randint(1, 9))) for _ in range(80)))
    groups = make([(" ".join(r.choices("abcdefghijz", k=3)), [docs[0]]) for _ in range(20)])
    pool = pool_of(groups, corpus_of(docs))
    miner, index = bm25_miner("bm25", pool), bm25s.BM25()
    index.index([o.split() for o in docs], show_progress=False)
    rows = miner.rank(np.arange(len(pool.queries)), 5)
    for row, (_, _, query) in zip(rows, pool.queries):
        scores = index.get_scores(query.split())
        assert row.tolist() == [*(i for i in np.argsort(-scores, kind="stable")[:5] if scores[i] > 0), *[-1]*max(0, 5 - (scores > 0).sum())]
    query, place = np.repeat(np.arange(3), 2), np.array([0, 3, 5, 7, 2, 1])
    assert miner.score(query, place) == pytest.approx([index.get_scores(pool.queries[q][2].split())[t] for q, t in zip(query, place)])


def test_bm25_without_its_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(ImportError, match=r"nixietune\[bm25\]"): mined(make([("a", ["p"])]), "bm25", corpus_of(["p", "x"]))


def test_names_of_miners():
    pool = pool_of(make([("a", ["p"])]), corpus_of(["p", "x"]))
    names = lambda encoder: [o.name for o in miners_of(encoder, pool, progress=False)]
    assert names([hashed, hashed, "bm25"]) == ["hashed", "hashed 2", "bm25"] and names({"mine": hashed}) == ["mine"]
    for bad in ([], 5, [None]):
        with pytest.raises(InputError): names(bad)


def test_memory_is_bounded_by_chunks(monkeypatch):
    "The same result, however many queries at a time."
    groups, corpus = nt.toy_groups(20), nt.toy_corpus()
    whole = new(mined(groups, hashed, corpus, number=4, sampling="softmax", fill="random"))
    monkeypatch.setattr("nixietune.mining.CHUNK", 3)
    assert new(mined(groups, hashed, corpus, number=4, sampling="softmax", fill="random")) == whole


def test_hard_ones_come_oftener():
    "softmax prefers high scores, random does not."
    groups, docs = make([(f"low {i}", ["number 0"]) for i in range(200)]), [f"number {i}" for i in range(51)]
    middle = lambda way, **options: np.mean([int(o.split()[1]) for neg in new(mined(groups, in_order, corpus_of(docs), number=5, sampling=way, relative=None, metric="ip", **options)) for o in neg])
    assert middle("top") == 3 < middle("softmax", temperature=10.0) < 20 < middle("random") < 30


# ---- false negatives

def test_false_negatives_and_relabelling(capsys):
    groups = make([("low 1", ["number 5"], ["number 2", "number 9"]), ("LOW 1", ["number 6"])])
    corpus = corpus_of([f"number {i}" for i in range(12)])
    found = nt.find_false_negatives(groups, in_order, corpus, metric="ip", relative=None, margin=0)
    assert found.frame["doc"][found.frame["query"] == "low 1"].tolist() == [f"number {i}" for i in (0, 1, 2, 3, 4)]
    assert len(nt.find_false_negatives(groups, in_order, corpus, metric="ip", relative=None, margin=0, number=2)) == 4
    assert "6 more for queries that have 2" in capsys.readouterr().out
    assert found.frame["given"].sum() == 1 and "may be answers" in repr(found) and "<table" in found._repr_html_()
    found.frame.loc[found.frame["doc"] == "number 2", "decision"] = "positive"
    found.frame.loc[found.frame["doc"] == "number 1", "decision"] = "drop"
    out = nt.relabel(groups, found)
    assert [[o["doc"] for o in pos] for pos in out["pos"][:]] == [["number 5", "number 2"], ["number 6", "number 2"]]
    assert [[o["doc"] for o in neg] for neg in out["neg"][:]] == [["number 9"], []]
    assert len(nt.relabel(groups, found, "positive")["pos"][0]) == 5  # all but the one that is dropped
    with pytest.raises(InputError): nt.relabel(groups, found, "perhaps")


def test_given_negatives_that_are_answers_elsewhere():
    groups = make([("a", ["p"], ["x"]), ("A?", ["x"])])
    found = nt.find_false_negatives(groups, hashed, corpus_of(["p", "x", "y"]), max_score=9.0, relative=None)
    assert [(o.doc, o.why) for o in found.frame.itertuples() if o.given] == [("x", "a known positive")]


def test_widget():
    groups = make([("low 1", ["number 3"])])
    found = nt.find_false_negatives(groups, in_order, corpus_of([f"number {i}" for i in range(5)]), metric="ip")
    box = found.widget()
    buttons = {o.description: o for o in box.children[1].children}
    for name in ("Make positive", "Drop", "Back", "Keep as negative"): buttons[name].click()
    assert found.frame["decision"].tolist()[:2] == ["positive", "keep"]
    while not buttons["Drop"].disabled: buttons["Drop"].click()
    assert (found.frame["decision"] != "").all() and "3 of 3 decided · Keep as negative: 1 · Make positive: 1 · Drop: 1" in box.children[0].value


def test_ranges():
    assert read_range("10-210") == (10, 210) and read_range(50) == (0, 50) and read_range([2, 9]) == (2, 9)
    assert candidates([partial_miner([[3, 1]])], np.array([0]), 9)["text"].tolist() == [3, 1]


def partial_miner(rows):
    from nixietune.mining import Miner
    return Miner("fixed", partial(lambda rows, some, k: np.array(rows)[:, :k], rows))
