"Search is exact whatever computes it, and kept vectors are never those of another model."
import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays

from nixietune import embeddings, index
from nixietune.core import InputError, spread
from nixietune.embeddings import embed, model_parts
from nixietune.encoder import encode, set_max_length
from nixietune.evaluation import evaluate
from nixietune.index import search
from nixietune.testing import tiny_model, toy_corpus, toy_groups

torch.set_num_threads(1)
TEXTS = toy_corpus()["text"][:60]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch): monkeypatch.setenv("NIXIETUNE_CACHE", str(tmp_path / "cache"))


# ---- search

def oracle(q, d, k, metric):
    "All scores in double precision, rounded once, and a stable sort."
    q, d = q.astype("float64"), d.astype("float64")
    if metric == "cos":
        q, d = (o / np.where((n := np.sqrt((o * o).sum(1, keepdims=True))) > 0, n, 1) for o in (q, d))
    scores = (-((q[:, None] - d) ** 2).sum(-1) if metric == "l2" else np.einsum("qd,nd->qn", q, d)).astype("float32")
    rows = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, rows, 1), rows


def same(found, expected, close=1e-5):
    "The same scores, and the same rows but among scores that are closer than that; equal scores in document order."
    (scores, rows), (true, order) = found, expected
    scale = np.maximum(1, np.abs(true))
    assert (np.abs(scores - true) <= close * scale).all()
    for got, best, score in zip(rows, order, scores):
        assert len(set(got.tolist())) == len(got)
        gaps = np.abs(np.diff(score)) > 2 * close * max(1, np.abs(score).max())
        edges = np.flatnonzero(gaps) + 1
        for a, b in zip([0, *edges], [*edges]): assert set(got[a:b].tolist()) == set(best[a:b].tolist())
        assert (np.diff(got)[np.diff(score) == 0] > 0).all()


WAYS = [("torch", ["cpu"]), ("torch", ["cpu"] * 3), ("faiss", ["cpu"]), ("faiss", ["cpu"] * 2)]
whole = st.integers(-3, 3).map(float)  # whole numbers: many ties, and sums without rounding


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from(["cos", "ip", "l2"]), st.integers(1, 40), st.integers(1, 3), st.integers(1, 12))
def test_ties_and_all(data, metric, count, dim, k):
    "Small whole numbers: nearly all scores occur several times. For ip and l2 they are exact, and so must be the order."
    d, q = data.draw(arrays("float32", (count, dim), elements=whole)), data.draw(arrays("float32", (2, dim), elements=whole))
    expected = oracle(q, d, k, metric)
    for backend, devices in WAYS:
        found = search(q, d, k, metric, backend, devices)
        if metric == "cos": same(found, expected)
        else: np.testing.assert_array_equal(found[1], expected[1])


@pytest.mark.parametrize("metric", ["cos", "ip", "l2"])
@pytest.mark.parametrize("scale, offset", [(1, 0), (1e-3, 0), (1e3, 0), (1, 50), (0.01, 10)])
@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
def test_like_the_oracle(metric, scale, offset, dtype, monkeypatch):
    "Long and short vectors, some far from the origin, with tiles that do not fit."
    rng = np.random.default_rng(0)
    d, q = ((rng.standard_normal((n, 24)) * scale + offset).astype(dtype) for n in (700, 30))
    expected = oracle(q, d, 20, metric)
    for block, tile in ((100, (7, 33)), (16_384, (1024, 4096))):
        monkeypatch.setattr(index, "BLOCK", block)
        monkeypatch.setattr(index, "TILE", tile)
        for backend, devices in WAYS:
            scores, rows = search(q, d, 20, metric, backend, devices)
            np.testing.assert_allclose(scores, expected[0], rtol=1e-6, atol=1e-6)
            np.testing.assert_array_equal(rows, expected[1])


@pytest.mark.parametrize("order", ["ascending", "descending"])
def test_tiles_where_all_are_better_or_none(order, monkeypatch):
    monkeypatch.setattr(index, "BLOCK", 64)
    monkeypatch.setattr(index, "TILE", (4, 64))
    d = np.linspace(0.1, 1, 1000)[::1 if order == "ascending" else -1, None] * np.ones((1, 4))
    q = np.ones((6, 4))
    for metric in ("ip", "l2"): np.testing.assert_array_equal(search(q, d, 9, metric)[1], oracle(q, d, 9, metric)[1])


def test_many_queries_go_in_parts(monkeypatch):
    rng = np.random.default_rng(0)
    q, d = rng.standard_normal((50, 8)), rng.standard_normal((200, 8))
    expected = search(q, d, 5)
    monkeypatch.setattr(index, "MANY", 7)
    for one, other in zip(search(q, d, 5), expected): np.testing.assert_array_equal(one, other)


def test_memory_mapped(tmp_path):
    "What is mapped read-only is read, and not changed."
    d = np.random.default_rng(0).standard_normal((300, 16)).astype("float16")
    np.save(tmp_path / "d.npy", d)
    mapped = np.load(tmp_path / "d.npy", mmap_mode="r")
    for metric in ("cos", "ip", "l2"):
        for one, other in zip(search(d[:9], mapped, 5, metric), search(d[:9], d, 5, metric)): np.testing.assert_array_equal(one, other)


def test_faiss_on_a_gpu_gets_the_device(monkeypatch):
    "The plumbing of faiss-gpu, which needs a GPU to be run: the processor's function stands in for the GPU's."
    import faiss
    asked = []
    def knn_gpu(resources, q, d, k, metric, device):
        asked.append(device)
        return faiss.knn(q, d, k, metric=metric)
    monkeypatch.setattr(faiss, "StandardGpuResources", lambda: "resources", raising=False)
    monkeypatch.setattr(faiss, "knn_gpu", knn_gpu, raising=False)
    monkeypatch.setattr(index, "device_list", lambda devices: devices)
    q, d = np.random.default_rng(0).standard_normal((2, 40, 8))
    np.testing.assert_array_equal(search(q, d, 5, backend="faiss", devices=["cuda:0", "cuda:3"])[1], search(q, d, 5, backend="torch", devices=["cpu"])[1])
    assert sorted(asked) == [0, 3]


@pytest.mark.parametrize("kind, much, little", [("ivf", dict(cells=16, probes=16), dict(cells=30, probes=1)), ("hnsw", dict(depth=400), dict(links=4, build=8, depth=16))])
@pytest.mark.parametrize("metric", ["cos", "ip", "l2"])
def test_indexes_say_what_they_miss(kind, much, little, metric, capsys):
    "The recall that is said is the true one; scores are exact."
    rng = np.random.default_rng(0)
    d, q = rng.standard_normal((3000, 16)).astype("float32"), rng.standard_normal((60, 16)).astype("float32")
    scores, rows = search(q, d, 10, metric)
    said = {}
    for name, given in (("much", much), ("little", little)):
        found, at = search(q, d, 10, metric, approximate=kind, **given)
        said[name] = float(capsys.readouterr().out.split("recall@10 is ")[1].split()[0])
        true = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(at.tolist(), rows.tolist())])
        assert abs(said[name] - true) < 0.001
        true_scores = oracle(q, d, 3000, metric)
        table = np.empty((60, 3000), "float32")
        np.put_along_axis(table, true_scores[1], true_scores[0], 1)
        np.testing.assert_allclose(found, np.take_along_axis(table, at, 1), rtol=1e-5, atol=1e-6)
    assert said["much"] > 0.95 > said["little"]


def test_too_few_are_searched_exactly(capsys):
    "One probe of many cells holds fewer than k documents: those queries are answered exactly, and it is said."
    rng = np.random.default_rng(0)
    d, q = rng.standard_normal((2000, 8)), rng.standard_normal((20, 8))
    scores, rows = search(q, d, 100, approximate="ivf", cells=50, probes=1)
    assert (rows >= 0).all() and np.isfinite(scores).all() and "fewer than 100 documents found for 20 of 20 queries" in capsys.readouterr().out
    np.testing.assert_array_equal(rows, search(q, d, 100)[1])


@pytest.mark.parametrize("options, wrong", [
    (dict(metric="l1"), "one of cos, ip, l2"), (dict(approximate="lsh"), "one of ivf, hnsw"), (dict(probes=3), "only with approximate="),
    (dict(approximate="ivf", depth=3), "one of cells, probes"), (dict(approximate="ivf", probes=0), "1 or more"),
    (dict(approximate="ivf", backend="torch"), "'auto' or 'faiss'"), (dict(devices=[]), "at least one device"), (dict(devices=["cuda:77"]), "devices of this machine")])
def test_refused(options, wrong):
    with pytest.raises(InputError, match=wrong): search(np.eye(3), np.eye(3), 1, **options)


@pytest.mark.parametrize("options", [dict(backend="faiss"), dict(approximate="hnsw")])
def test_without_faiss(options, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(ImportError, match="faiss is needed for search with .*nixietune.cpu"): search(np.eye(3), np.eye(3), 1, **options)


# ---- devices

@pytest.mark.parametrize("kind", ["bert", "modernbert", "qwen3", "mpnet", "static"])
def test_two_devices_encode_as_one(kind):
    model = tiny_model(kind).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    np.testing.assert_allclose(encode(model, TEXTS, progress=False, devices=["cpu", "cpu"], tokens_per_forward=64),
                               encode(model, TEXTS, progress=False, tokens_per_forward=64), atol=1e-6)
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_two_devices_evaluate_as_one():
    model = tiny_model()
    one, two = (evaluate(model, toy_groups(40), toy_corpus(), devices=o, progress=False) for o in (None, ["cpu", "cpu"]))
    assert one.metrics == two.metrics and (one.run.rows == two.run.rows).all()


def test_an_error_on_a_device_is_the_callers():
    "It arrives, and what has not begun is not begun."
    done = []
    def work(i):
        if i == 3: raise InputError("no")
        time.sleep(0.01)
        done.append(i)
    with pytest.raises(InputError): list(spread(range(1000), [work, work]))
    assert len(done) < 20


# ---- kept embeddings

def shards(folder): return sorted(Path(folder).glob("*/*.npy"))


CHANGES = {
    "weights": lambda m: m[0].auto_model.embeddings.LayerNorm.weight.data.mul_(1.0001),
    "a buffer": lambda m: m.register_buffer("more", torch.ones(1)),
    "pooling": lambda m: setattr(m[1], "pooling_mode", "cls"),
    "does pooling see the prompt": lambda m: setattr(m[1], "include_prompt", False),
    "no normalisation": lambda m: m.__delitem__(2),
    "maximum length": lambda m: set_max_length(m, 7),
    "dimension": lambda m: setattr(m, "truncate_dim", 8),
    "epsilon": lambda m: setattr(m[0].auto_model.embeddings.LayerNorm, "eps", 1e-3),
    "lower case": lambda m: setattr(m[0], "do_lower_case", True),
    "vocabulary": lambda m: m.tokenizer.add_tokens(["feline"]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_reads_nothing_old(change, tmp_path):
    model = tiny_model()
    embed(model, TEXTS, cache=tmp_path, progress=False)
    CHANGES[change](model)
    found = embed(model, TEXTS, cache=tmp_path, progress=False)
    assert len(shards(tmp_path)) == 2
    np.testing.assert_array_equal(found, encode(model, TEXTS, progress=False))


def test_an_adapter_and_its_scale_count(tmp_path):
    from peft import LoraConfig, TaskType
    model = tiny_model()
    keys = [model_parts(model, "document")]
    model.add_adapter(LoraConfig(task_type=TaskType.FEATURE_EXTRACTION, r=2, target_modules=["query"], init_lora_weights=False))
    keys.append(model_parts(model, "document"))
    layer = next(o for o in model.modules() if hasattr(o, "scaling") and isinstance(o.scaling, dict))
    layer.scaling["default"] *= 2
    keys.append(model_parts(model, "document"))
    model.disable_adapters()
    keys.append(model_parts(model, "document"))
    assert all(a != b for i, a in enumerate(keys) for b in keys[:i])


@pytest.mark.parametrize("kind", ["bert", "modernbert", "qwen3", "deberta-v2", "static"])
def test_use_changes_no_key(kind, tmp_path):
    "Training mode, encoding, the layout and where it was loaded from are no change; a saved and loaded model is the same."
    from nixietune.encoder import load_encoder, prepare
    from sentence_transformers import SentenceTransformer
    model = tiny_model(kind, prompts={"query": "ask: "})
    before = model_parts(model, "query")
    encode(model.train(), TEXTS, "query", progress=False)
    if kind != "static": prepare(model, "bucketed")
    model.encode(TEXTS[:2])
    assert model_parts(model, "query") == before
    for name in ("one", "two"): model.save_pretrained(str(tmp_path / name))
    assert model_parts(load_encoder(str(tmp_path / "one")), "query") == model_parts(load_encoder(str(tmp_path / "two"), forward="bucketed"), "query")
    if kind != "static": assert model_parts(SentenceTransformer(str(tmp_path / "one"), device="cpu"), "query")["weights"] == before["weights"]


def test_roles_prompts_and_types_are_apart(tmp_path):
    model = tiny_model(prompts={"query": "ask: ", "document": ""})
    vectors = {o: embed(model, TEXTS, o, cache=tmp_path, progress=False) for o in ("query", "document")}
    other = embed(model, TEXTS, "query", prompts="find: ", cache=tmp_path, progress=False)
    each = embed(model, TEXTS, "query", prompts=["ask: "] * 30 + ["find: "] * 30, cache=tmp_path, progress=False)
    np.testing.assert_array_equal(each, np.concatenate([vectors["query"][:30], other[30:]]))
    half = embed(model, TEXTS, cache=tmp_path, dtype="float16", progress=False)
    assert half.dtype == np.float16 and len({o.parent for o in shards(tmp_path)}) == 3
    for role, found in vectors.items(): np.testing.assert_allclose(found, encode(model, TEXTS, role, progress=False), atol=1e-6)
    assert len(shards(tmp_path)) == 4  # two prompts share the queries' folder; `each` encoded nothing


def test_a_new_text_adds_only_itself(tmp_path, monkeypatch):
    model, asked = tiny_model(), []
    monkeypatch.setattr(embeddings, "encode", lambda model, texts, *args, **kw: asked.append(texts) or encode(model, texts, *args, **kw))
    embed(model, TEXTS, cache=tmp_path, progress=False)
    found = embed(model, ["new", TEXTS[3], "new", ""], cache=tmp_path, progress=False)
    assert asked == [TEXTS, ["new", ""]]
    np.testing.assert_array_equal(found[0], found[2])
    embed(model, [], cache=tmp_path, progress=False)
    assert len(asked) == 2


def test_out_is_memory_mapped(tmp_path):
    model = tiny_model()
    found = embed(model, TEXTS, cache=tmp_path / "cache", out=tmp_path / "corpus.npy", progress=False)
    assert isinstance(found, np.memmap)
    np.testing.assert_array_equal(found, embed(model, TEXTS, cache=tmp_path / "cache", progress=False))


def slow_embed(folder, every=0.0):
    "Encodes five texts at a time, slowly."
    torch.set_num_threads(1)
    def slow(*args, **kw):
        time.sleep(0.15)
        return encode(*args, **kw)
    embeddings.encode = slow
    embed(tiny_model(), TEXTS, cache=folder, piece=5, every=every, progress=False)


def test_killed_and_going_on(tmp_path):
    "SIGKILL in the middle: what was written is used, and the vectors are to the last bit those of a run without a break."
    child = multiprocessing.get_context("fork").Process(target=slow_embed, args=(tmp_path / "killed",))
    child.start()
    while len(shards(tmp_path / "killed")) < 4: time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    before = shards(tmp_path / "killed")
    assert 4 <= len(before) < 12
    found = embed(tiny_model(), TEXTS, cache=tmp_path / "killed", piece=5, progress=False)
    assert sum(len(np.load(o, mmap_mode="r")) for o in shards(tmp_path / "killed")) == len(TEXTS) and set(before) < set(shards(tmp_path / "killed"))
    np.testing.assert_array_equal(found, embed(tiny_model(), TEXTS, cache=tmp_path / "whole", piece=5, progress=False))


def test_stopped_by_hand_loses_nothing(tmp_path, monkeypatch):
    "The stop button: what was encoded since the last write is written, too."
    asked = []
    def stops(model, texts, *args, **kw):
        if len(asked) == 3: raise KeyboardInterrupt
        asked.append(texts)
        return encode(model, texts, *args, **kw)
    monkeypatch.setattr(embeddings, "encode", stops)
    with pytest.raises(KeyboardInterrupt): embed(tiny_model(), TEXTS, cache=tmp_path, piece=10, every=1e9, progress=False)
    assert [len(np.load(o)) for o in shards(tmp_path)] == [30]


def test_two_processes_at_once(tmp_path):
    children = [multiprocessing.get_context("fork").Process(target=slow_embed, args=(tmp_path,)) for _ in range(2)]
    for o in children: o.start()
    for o in children: o.join()
    assert [o.exitcode for o in children] == [0, 0] and len({o.parent for o in shards(tmp_path)}) == 1
    np.testing.assert_allclose(embed(tiny_model(), TEXTS, cache=tmp_path, progress=False), encode(tiny_model(), TEXTS, progress=False), atol=1e-6)
    assert not [o for o in tmp_path.rglob("*.tmp")]


@pytest.mark.parametrize("harm", [lambda data: data[:len(data) // 2], lambda data: b"", lambda data: b"no numpy file"])
def test_a_damaged_shard_is_encoded_again(harm, tmp_path, capsys):
    model = tiny_model()
    first = embed(model, TEXTS, cache=tmp_path, progress=False)
    shard, = shards(tmp_path)
    shard.write_bytes(harm(shard.read_bytes()))
    np.testing.assert_array_equal(embed(model, TEXTS, cache=tmp_path, progress=False), first)
    assert "is damaged" in capsys.readouterr().out


def test_what_is_cut_is_counted_once(tmp_path, capsys):
    model = tiny_model()
    set_max_length(model, 6)
    embed(model, TEXTS + ["a"], cache=tmp_path, piece=7, devices=["cpu", "cpu"], progress=False)
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and f"{len(TEXTS)} of {len(TEXTS) + 1} texts fill the maximum length of 6 tokens" in said


def test_too_large_for_half_precision(tmp_path):
    model = tiny_model("static")
    with torch.no_grad(): model[0].embedding.weight.mul_(1e6)
    with pytest.raises(InputError, match="beyond 65,504"): embed(model, TEXTS, cache=tmp_path, dtype="float16", progress=False)
    assert not shards(tmp_path)


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"): embed(tiny_model(), TEXTS, cache=tmp_path / "file")


def test_evaluate_reads_the_cache(tmp_path, monkeypatch):
    model, asked = tiny_model(), []
    monkeypatch.setattr(embeddings, "encode", lambda model, texts, *args, **kw: asked.append(len(texts)) or encode(model, texts, *args, **kw))
    runs = [evaluate(model, toy_groups(40), toy_corpus(), cache=tmp_path, progress=False) for _ in range(2)]
    assert asked == [40, 180] and runs[0].metrics == runs[1].metrics == evaluate(model, toy_groups(40), toy_corpus(), progress=False).metrics
    with pytest.raises(InputError, match="a cache for a function"): evaluate(lambda texts, role: np.ones((len(texts), 2)), toy_groups(4), toy_corpus(), cache=tmp_path)
