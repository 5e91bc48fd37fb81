"Scores of teachers: each equals what its library says pair by pair, nothing else in the groups changes, and an interrupted scoring goes on."
import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from datasets import load_from_disk
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SparseEncoder

import nixietune as nt
from nixietune.auditing import items_of
from nixietune.core import InputError
from nixietune.display import hushed, quiet
from nixietune.scoring import (as_scorer, bi_encoder, blend, bm25_scorer, cross_encoder, load_language_model, on_scale, prompted, query_likelihood,
    score_groups, Scorer, teacher_summary, yes_logit)
from nixietune.teachers import join_vectors, teacher_vectors
from nixietune.testing import tiny_model, toy_groups

torch.set_num_threads(1)
TEMPLATE, LIKELY = ("{query}", "near", "{document} :"), ("{document}", "that", "{query}")
ANSWERS = dict(yes="red", no="blue")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch): monkeypatch.setenv("NIXIETUNE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def pairs():
    rows = toy_groups(12, negatives=3).to_list()
    found = [(o["query"], item["doc"]) for o in rows for item in o["pos"] + o["neg"]]
    return [(q, d if i % 5 else "red") for i, (q, d) in enumerate(found)] + [("crimson", found[0][1] * 3)]


SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, max_position_embeddings=130, initializer_range=0.3)
KINDS = {"cross": ("BertForSequenceClassification", "BertConfig", SMALL | {"num_labels": 1}),
         "three": ("BertForSequenceClassification", "BertConfig", SMALL | {"num_labels": 3}),
         "qwen": ("Qwen3ForCausalLM", "Qwen3Config", SMALL | {"num_key_value_heads": 2, "head_dim": 8}),
         "gpt2": ("GPT2LMHeadModel", "GPT2Config", dict(n_embd=32, n_layer=2, n_head=4, n_positions=130, initializer_range=0.3)),
         "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", SMALL | {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8, "final_logit_softcapping": 5.0}),
         "masked": ("BertForMaskedLM", "BertConfig", SMALL), "bare": ("BertModel", "BertConfig", SMALL)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "Makes random models of transformers, each once."
    root, tokenizer = tmp_path_factory.mktemp("models"), tiny_model()[0].tokenizer
    def one(kind):
        path, (make, config, settings) = root / kind, KINDS[kind]
        if not path.exists():
            torch.manual_seed(1)
            with hushed():
                getattr(transformers, make)(getattr(transformers, config)(vocab_size=len(tokenizer), pad_token_id=0, **settings)).save_pretrained(path)
                tokenizer.save_pretrained(path)
        return str(path)
    return one


@pytest.fixture(scope="module")
def reranker(folder):
    with hushed(): return CrossEncoder(folder("cross"), device="cpu")


# ---- cross-encoders

@pytest.mark.parametrize("budget", [20, 200, None])
def test_cross_encoder_is_predict(reranker, folder, pairs, budget):
    raw = np.array([reranker.predict(o, activation_fn=torch.nn.Identity()) for o in pairs])
    assert np.ptp(raw) > 0.5 and np.allclose(cross_encoder(reranker, tokens_per_forward=budget)(pairs), raw, atol=1e-5)
    assert np.allclose(as_scorer(folder("cross"))(pairs), raw, atol=1e-5)
    assert np.allclose(on_scale(raw, np.arange(len(raw)), "sigmoid"), reranker.predict(pairs), atol=1e-5)  # that is what it ends with


def test_cross_encoder_cut(reranker, pairs):
    short = cross_encoder(reranker, max_length=9)
    assert np.allclose(short(pairs), reranker.predict(pairs, activation_fn=torch.nn.Identity(), processing_kwargs={"text": {"max_length": 9, "truncation": True}}), atol=1e-5)
    assert short.cut["pairs"] == sum(len(reranker.tokenizer(*o)["input_ids"]) > 9 for o in pairs) > 10
    assert reranker.max_seq_length == 128


def test_cross_encoder_with_several_numbers(folder):
    with hushed(), pytest.raises(InputError, match="3 numbers a pair"): as_scorer(folder("three"))


# ---- language models

def alone(folder, rows):
    "Logits of each row by itself, from the model as transformers loads it."
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode(): return [model(torch.tensor(row)[None]).logits[0].double() for row in rows]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["qwen", "gpt2", "gemma2"])
def test_language_models_are_direct_forwards(folder, pairs, kind, side):
    with quiet(), hushed(): model, tokenizer, _ = load_language_model(folder(kind))
    tokenizer.padding_side = side
    red, blue = map(tokenizer.convert_tokens_to_ids, ("red", "blue"))
    logits = alone(folder(kind), [tokenizer(f"{q} near {d} :")["input_ids"][:-1] for q, d in pairs])  # without [SEP]
    for budget in (30, None):
        both = yes_logit(model, TEMPLATE, **ANSWERS, tokenizer=tokenizer, tokens_per_forward=budget)(pairs)
        assert np.allclose(both, [o[-1, red] - o[-1, blue] for o in logits], atol=1e-4)
        assert np.allclose(yes_logit(model, TEMPLATE, yes="red", tokenizer=tokenizer, tokens_per_forward=budget)(pairs), [o[-1, red] for o in logits], atol=1e-4)
    rows = [tokenizer(f"{d} that {q}")["input_ids"][:-1] for q, d in pairs]
    asked = [len(tokenizer(q, add_special_tokens=False)["input_ids"]) for q, _ in pairs]
    wanted = [np.mean([o.log_softmax(-1)[i - 1, row[i]] for i in range(len(row) - n, len(row))]) for o, row, n in zip(alone(folder(kind), rows), rows, asked)]
    assert len(set(asked)) > 1 and np.ptp(wanted) > 0.1
    assert np.allclose(query_likelihood(model, LIKELY, tokenizer=tokenizer, tokens_per_forward=40)(pairs), wanted, atol=1e-4)


def test_the_document_is_cut_and_the_question_stays():
    tokenizer = tiny_model()[0].tokenizer
    words = "small red bird"
    rows, asked, cut = prompted(tokenizer, [(words, words * 9), (words * 9, "red"), (words, "red")], TEMPLATE, 12, 6)
    texts = [tokenizer.decode(row) for row in rows]
    assert [len(row) for row in rows] == [12, 10, 7] and cut.tolist() == [True, True, False]
    assert all(o.startswith("[CLS] small red bird") and o.endswith(":") for o in texts)
    assert tokenizer.decode(prompted(tokenizer, [(words, "red")], ("[CLS] {query}", "{document}"), 12, 6)[0][0]) == "[CLS] small red bird red"  # not twice
    braces = prompted(tokenizer, [("{document}", "{query} {0}")], TEMPLATE, 40, 20)[0][0]
    assert tokenizer.unk_token_id in braces  # texts with braces are texts


def test_bad_prompts(folder):
    with pytest.raises(InputError, match="room for a document"): yes_logit(folder("qwen"), TEMPLATE, yes="red", max_length=8)([("red bird", "a"), ("small red bird near sea", "a")])
    with pytest.raises(InputError, match="'Yes' is 3 tokens.*a word of one token"): yes_logit(folder("qwen"), TEMPLATE)
    with pytest.raises(InputError, match="{query} and {document}, once each"): yes_logit(folder("qwen"), "{query}", yes="red")
    with pytest.raises(InputError, match="last part '{query}'"): query_likelihood(folder("qwen"), "{document} {query}")


def test_lora(folder, pairs, tmp_path):
    from peft import get_peft_model, LoraConfig
    with hushed(): plain = transformers.AutoModelForCausalLM.from_pretrained(folder("qwen"), dtype=torch.float32)
    torch.manual_seed(2)
    tuned = get_peft_model(plain, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"))
    tuned.save_pretrained(tmp_path / "adapter")
    teacher, tokenizer = yes_logit(folder("qwen"), TEMPLATE, **ANSWERS, adapter=tmp_path / "adapter"), tiny_model()[0].tokenizer
    red, blue = map(tokenizer.convert_tokens_to_ids, ("red", "blue"))
    with torch.inference_mode(): wanted = [(lambda o: o[red] - o[blue])(tuned.eval()(torch.tensor([tokenizer(f"{q} near {d} :")["input_ids"][:-1]])).logits[0, -1]).item() for q, d in pairs]
    assert np.allclose(teacher(pairs), wanted, atol=1e-4)
    assert np.abs(teacher(pairs) - yes_logit(folder("qwen"), TEMPLATE, **ANSWERS)(pairs)).max() > 0.1
    assert "with adapter" in teacher.name
    (tmp_path / "adapter" / "adapter_model.safetensors").rename(tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(InputError, match="no adapter_model.safetensors"): yes_logit(folder("qwen"), TEMPLATE, **ANSWERS, adapter=tmp_path / "adapter")
    with pytest.raises(InputError, match="which it would change"): yes_logit(plain, TEMPLATE, tokenizer=tokenizer, adapter=tmp_path / "adapter")


# ---- what is no teacher

@pytest.mark.parametrize("config, kind", [
    ({"architectures": ["LayerWiseMiniCPMForCausalLM"], "start_layer": 8, "head_multi": True}, "layerwise reranker .LayerWiseMiniCPMForCausalLM"),
    ({"architectures": ["CostWiseGemmaForCausalLM"], "model_type": "cost_wise_gemma", "layer_wise": True, "start_layer": 8}, "lightweight reranker"),
    ({"architectures": ["GemmaForCausalLM"], "auto_map": {"AutoModelForCausalLM": "gemma_model.CostWiseGemmaForCausalLM"}}, "lightweight reranker")])
def test_layers_in_the_middle_are_refused(tmp_path, config, kind):
    (tmp_path / "config.json").write_text(json.dumps(config))
    for make in (as_scorer, yes_logit, query_likelihood):
        with pytest.raises(InputError, match=kind): make(str(tmp_path))


def test_nothing_foreign_runs(folder, tmp_path):
    "No pickle is opened and no code of a model's folder is imported."
    shutil.copytree(folder("cross"), tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    torch.save({}, tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(InputError, match="cannot be loaded"): as_scorer(tmp_path / "pickled")
    shutil.copytree(folder("qwen"), tmp_path / "own")
    config = json.loads((tmp_path / "own" / "config.json").read_text()) | {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.Model"}}
    (tmp_path / "own" / "config.json").write_text(json.dumps(config))
    (tmp_path / "own" / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(InputError, match="cannot be loaded"): yes_logit(tmp_path / "own", TEMPLATE, **ANSWERS)
    assert not (tmp_path / "ran").exists()


def test_names_that_are_no_teacher(folder, tmp_path):
    with pytest.raises(InputError, match="yes_logit.name, template."): as_scorer(folder("qwen"))
    with pytest.raises(InputError, match="no reranker .BertModel"): as_scorer(folder("bare"))
    with pytest.raises(InputError, match="no such folder"): as_scorer(tmp_path / "nothing")
    with pytest.raises(InputError, match="by itself"): as_scorer(torch.nn.Linear(1, 1))
    with pytest.raises(InputError, match="int is no teacher"): as_scorer(3)
    with pytest.raises(InputError, match="options only for"): as_scorer(len, max_length=3)


@pytest.mark.parametrize("gives, problem", [
    (lambda n: np.ones(n - 1), "shape"), (lambda n: np.ones((n, 2)), "shape"), (lambda n: 1.0, "shape"), (lambda n: ["a"] * n, "gives list"),
    (lambda n: [None] * n, "no finite"), (lambda n: [1.0] * (n - 1) + [np.nan], "1 score of"), (lambda n: torch.full((n,), torch.inf), "no finite")])
def test_wrong_answers(tmp_path, gives, problem):
    groups = toy_groups(6)
    with pytest.raises(InputError, match=problem): score_groups(groups, as_scorer(lambda pairs: gives(len(pairs)), name="wrong"), path=tmp_path / "scores")
    assert not (tmp_path / "scores").exists()


# ---- embeddings, BM25, blends

def test_embedding_models(folder, pairs, tmp_path):
    with hushed(): models = [tiny_model(prompts={"query": "red: ", "document": "blue: "}), SparseEncoder(folder("masked"), device="cpu"), MultiVectorEncoder(folder("bare"), device="cpu")]
    for model in models:
        one = [model.similarity_pairwise(model.encode_query([q]), model.encode_document([d])).item() for q, d in pairs]
        assert np.ptp(one) > 1e-3 and np.allclose(bi_encoder(model)(pairs), one, rtol=1e-4, atol=1e-5), type(model)
        model.save_pretrained(str(tmp_path / type(model).__name__))
        assert np.allclose(as_scorer(tmp_path / type(model).__name__)(pairs), one, rtol=1e-4, atol=1e-5)


def test_vectors_on_disk(tmp_path):
    groups, model = toy_groups(6), tiny_model()
    teacher_vectors(groups, model, tmp_path / "vectors")
    direct, by_path = score_groups(groups, model), score_groups(groups, tmp_path / "vectors")
    assert np.allclose(*(items_of(o)[0]["teacher"] for o in (direct, by_path)), atol=1e-5)


def test_bm25_formula():
    "Lucene's: idf = ln(1 + (N - n + 0.5)/(n + 0.5)), times tf/(tf + k1 (1 - b + b length/mean length))."
    texts = ["red red bird", "blue bird near the sea", "old horse", "small fish"]
    tokens = [o.split() for o in texts]
    def by_hand(query, words):
        n = {w: sum(w in o for o in tokens) for w in query.split()}
        return sum(np.log(1 + (4 - n[w] + 0.5) / (n[w] + 0.5)) * words.count(w) / (words.count(w) + 1.2 * (1 - 0.5 + 0.5 * len(words) / np.mean([len(o) for o in tokens]))) for w in n)
    found = bm25_scorer(texts, k1=1.2, b=0.5)([("red bird", o) for o in texts])
    assert np.allclose(found, [by_hand("red bird", o) for o in tokens], atol=1e-5) and found[0] > found[1] > found[2] == found[3] == 0


def test_blend_and_scales():
    a, b = (Scorer(lambda pairs, k=k: [k * len(d) + len(q) for q, d in pairs], str(k)) for k in (1, -3))
    given = [("red", "a"), ("red", "abc"), ("blue", "ab"), ("red", "abcde"), ("blue", "ab")]
    assert np.allclose(blend([(a, 1), (b, 3)])(given), (a(given) + 3 * b(given)) / 4)
    z = on_scale(a(given), [0, 0, 1, 0, 1], "query")
    assert np.allclose(z, [-np.sqrt(1.5), 0, 0, np.sqrt(1.5), 0])
    hybrid = blend([(a, 1), (b, 3)], normalize="query")
    assert hybrid.whole_queries and np.allclose(hybrid(given), (z - 3 * z) / 4, atol=1e-6)
    assert blend([(hybrid, 1)]).whole_queries and not blend([(a, 1)]).whole_queries
    for wrong in ([], [a], [(a, 0)], [(a, -1)], a):
        with pytest.raises(InputError): blend(wrong)
    with pytest.raises(InputError, match="normalize='softmax'"): blend([(a, 1)], normalize="softmax")


# ---- into the groups

def rows():
    "Groups with everything that a record can hold."
    item = lambda i, **more: {"doc": f"document {i}", **more}
    return [{"query": "a", "query_id": "7", "pos": [item(1, score=2.5, doc_id="d1"), item(2)], "neg": [item(3, teacher=9.0, miner="m", score=0.0)], "prompt": "p: "},
            {"query": "a", "pos": [item(1)], "neg": []}, {"query": "b", "pos": [item(4)], "neg": [item(1, score=-1.0), item(1)], "dataset": "other", "type": "t", "instruction": "find"}] + \
           [{"query": f"q{i}", "pos": [item(i, score=i / 7)], "neg": [item(i + 1), item(i + 2, teacher=0.5)], "category": "c"} for i in range(9, 2500, 3)]


def without_teacher(groups): return [o | {side: [item | {"teacher": None} for item in o[side]] for side in ("pos", "neg", "scored")} for o in groups.to_list()]


def length(pairs): return [len(q) + 0.25 * int(d.split()[-1]) for q, d in pairs]


def test_only_teacher_changes(tmp_path):
    groups = nt.make_groups(rows(), "nixietune")
    groups.info.description = "mine"
    scored = score_groups(groups.select(range(len(groups) - 1, -1, -1)), length, piece=100)
    assert without_teacher(scored)[::-1] == without_teacher(groups) and scored.features == groups.features
    assert all(item["teacher"] == length([(o["query"], item["doc"])])[0] for o in scored.to_list() for side in ("pos", "neg", "scored") for item in o[side])
    assert scored.info.description == "mine\nteacher scores: length, raw" and groups.info.description == "mine"
    again = score_groups(scored, lambda pairs: [0.0] * len(pairs), normalize="sigmoid")
    assert again.info.description == "mine\nteacher scores: <lambda>, sigmoid" and {*items_of(again)[0]["teacher"]} == {0.5}
    scored.select([3, 1]).save_to_disk(str(tmp_path / "saved"))
    assert load_from_disk(str(tmp_path / "saved")).info.description == scored.info.description
    assert nt.load_groups(nt.write_groups(scored, tmp_path / "scored.jsonl"))["pos"][:] == scored["pos"][:]


def test_documents_that_are_only_scored():
    groups = nt.make_groups([{"query": "a", "pos": ["document 1", "document 2"], "scores": [0.1, 0.2]}])
    assert groups["scored"][0] and [o["teacher"] for o in score_groups(groups, length)["scored"][0]] == [1.25, 1.5]


def test_each_pair_once():
    asked = []
    def teacher(pairs): asked.extend(pairs); return length(pairs)
    score_groups(nt.make_groups(rows(), "nixietune"), teacher, piece=50)
    assert len(asked) == len(set(asked)) and asked.count(("a", "document 1")) == 1


def test_overwrite(capsys):
    groups = nt.make_groups(rows(), "nixietune")
    first = score_groups(groups.select([0, 1]), length)
    mixed = nt.make_groups(first.to_list() + groups.select([2, 3]).to_list(), "nixietune")
    capsys.readouterr()
    kept = score_groups(mixed, lambda pairs: [7.0] * len(pairs), overwrite=False)
    assert "2 groups keep" in (said := capsys.readouterr().out) and "1 teacher score of before replaced, in groups that had only some" in said
    assert [{o["teacher"] for o in row["pos"] + row["neg"]} for row in kept.to_list()][2:] == [{7.0}] * 2 and kept["pos"][:2] == first["pos"][:]
    assert kept.info.description.endswith("raw; older ones in 2 groups")
    assert score_groups(first, lambda pairs: 1 / 0, overwrite=False) is first
    score_groups(mixed, length)
    assert "teacher scores of before replaced" in capsys.readouterr().out


def test_instructions(capsys):
    seen = []
    def teacher(pairs): seen.extend(pairs); return [1.0] * len(pairs)
    groups = nt.make_groups(rows()[:3], "nixietune")
    score_groups(groups, teacher)
    assert "1 group with an instruction that the teacher does not see" in capsys.readouterr().out and {q for q, _ in seen} == {"a", "b"}
    seen.clear()
    score_groups(groups, teacher, query_format="{}\\n{}", query_instruction="search", document_instruction="doc", document_format="{instruction}: {document}")
    assert {q for q, _ in seen} == {"search\na", "find\nb"} and all(d.startswith("doc: document") for _, d in seen)
    assert "does not see" not in capsys.readouterr().out
    for wrong in ("{query}", "{instruction}", "{other}{query}", "{", "plain"):
        with pytest.raises(InputError, match="a place for"): score_groups(groups, teacher, query_format=wrong)


def test_normalized_by_query():
    "Over all distinct documents of a query, whatever groups they stand in."
    scored = score_groups(nt.make_groups(rows()[:3], "nixietune"), length, normalize="query").to_list()
    values = {o["doc"]: o["teacher"] for row in scored[:2] for o in row["pos"] + row["neg"]}
    assert values["document 1"] == scored[1]["pos"][0]["teacher"] == pytest.approx(-np.sqrt(1.5)) and sum(values.values()) == pytest.approx(0)


def test_bad_calls():
    groups = toy_groups(4)
    with pytest.raises(InputError, match="no groups"): score_groups(groups.select([]), length)
    with pytest.raises(InputError, match="normalize='z'"): score_groups(groups, length, normalize="z")
    with pytest.raises(InputError, match="piece is 0"): score_groups(groups, length, piece=0)


# ---- interrupted

class Falling:
    "A teacher that counts what it is asked, and gives up after some pairs."
    def __init__(self, after=float("inf")): self.asked, self.after = [], after

    def __call__(self, pairs):
        if len(self.asked) + len(pairs) > self.after: raise KeyboardInterrupt
        self.asked += pairs
        return [len(q) + 0.01 * len(d) for q, d in pairs]


def test_goes_on(tmp_path):
    more, path = toy_groups(32, negatives=2), tmp_path / "folder" / "scores"
    groups = more.select(range(30))
    first, second = Falling(after=50), Falling()
    with pytest.raises(KeyboardInterrupt): score_groups(groups, as_scorer(first, name="t"), path=path, piece=12)
    with open(path, "ab") as file: file.write(b"torn")
    scored = score_groups(groups, as_scorer(second, name="t"), path=path, piece=12)
    assert 0 < len(first.asked) <= 50 and len(first.asked) + len(second.asked) == len({*first.asked, *second.asked}) == 90
    assert scored.to_list() == score_groups(groups, as_scorer(Falling(), name="t")).to_list()
    third = Falling()
    assert score_groups(groups, as_scorer(third, name="t"), path=path, normalize="sigmoid") and not third.asked  # raw scores are kept
    grown, other = Falling(), Falling()
    score_groups(more, as_scorer(grown, name="t"), path=path)
    assert len(grown.asked) == 6
    score_groups(groups, as_scorer(other, name="another"), path=path)
    assert len(other.asked) == 90


def test_what_depends_on_its_neighbours_is_asked_again(tmp_path):
    rows = [{"query": "a", "pos": [{"doc": "document 1"}], "neg": [{"doc": "document 2"}]}, {"query": "b", "pos": [{"doc": "document 1"}], "neg": [{"doc": "document 3"}]}]
    more = [rows[0] | {"neg": [*rows[0]["neg"], {"doc": "document 9"}]}, rows[1]]
    calls = Falling()
    hybrid = blend([(as_scorer(calls, name="t"), 1)], normalize="query")
    score_groups(nt.make_groups(rows, "nixietune"), hybrid, path=tmp_path / "scores")
    calls.asked.clear()
    grown = score_groups(nt.make_groups(more, "nixietune"), hybrid, path=tmp_path / "scores")
    assert {q for q, _ in calls.asked} == {"a"} and len(calls.asked) == 3
    assert grown.to_list() == score_groups(nt.make_groups(more, "nixietune"), hybrid).to_list()


def test_other_weights_are_another_teacher(tmp_path, capsys):
    groups = toy_groups(8)
    for seed, known in ((1, False), (1, True), (2, False)):
        scored = score_groups(groups, tiny_model(seed=seed), path=tmp_path / "scores")
        assert ("were scored before" in capsys.readouterr().out) == known
    assert np.allclose(items_of(scored)[0]["teacher"], items_of(score_groups(groups, tiny_model(seed=2)))[0]["teacher"])


def test_files_that_are_none(tmp_path):
    (tmp_path / "mine.txt").write_text("a letter")
    for path, problem in ((tmp_path / "mine.txt", "holds something else"), (tmp_path, "is a folder")):
        with pytest.raises(InputError, match=problem): score_groups(toy_groups(4), as_scorer(length, name="t"), path=path)
    assert (tmp_path / "mine.txt").read_text() == "a letter"
    with pytest.raises(InputError, match="without a name"): score_groups(toy_groups(4), length, path=tmp_path / "new")


# ---- what it thinks of the data

def test_summary(capsys):
    item = lambda n: {"doc": f"document {n}"}
    groups = nt.make_groups([
        {"query": "a", "pos": [item(1), item(9)], "neg": [item(5)]}, {"query": "b", "pos": [item(1), item(2)], "neg": [item(3), item(0)]},
        {"query": "c", "pos": [item(3)], "neg": []}, {"query": "d", "pos": [item(4)], "neg": [item(4)], "dataset": "two"}], "nixietune", source="one")
    scored = score_groups(groups, length)
    said = capsys.readouterr().out
    assert "one: careful: in 50.0% of 2 groups with both, the teacher ranks every positive below a negative" in said
    one, two, every = teacher_summary(scored).rows
    assert (one["scored"], one["with both"], one["positive below"]) == (8, 2, 0.5) and (two["positive below"], every["positive below"]) == (0, pytest.approx(1 / 3))
    assert one["spread 50%"] == pytest.approx((2 + 0.75) / 2)
    assert "two: careful: in half of the groups and more, the teacher gives all documents the same score" in said
    empty = teacher_summary(groups).rows[-1]
    assert (empty["scored"], empty["positive below"], empty["spread 50%"]) == (0, None, None)


# ---- vectors

def test_vectors_go_on(tmp_path, monkeypatch, capsys):
    import nixietune.teachers as module
    groups, texts, whole = toy_groups(10), [], teacher_vectors(toy_groups(10), tiny_model(), tmp_path / "whole", piece=4)
    encode = module.encode
    def broken(*args, **kwargs):
        texts.extend(args[1])
        if len(texts) > 14: raise KeyboardInterrupt
        return encode(*args, **kwargs)
    monkeypatch.setattr(module, "encode", broken)
    with pytest.raises(KeyboardInterrupt): teacher_vectors(groups, tiny_model(), tmp_path / "teacher", piece=4)
    assert not (tmp_path / "teacher").exists()
    def counting(*args, **kwargs): texts.extend(args[1]); return encode(*args, **kwargs)
    monkeypatch.setattr(module, "encode", counting)
    texts.clear()
    shutil.copytree(tmp_path / ".teacher.unfinished", tmp_path / ".other.unfinished")
    vectors = teacher_vectors(groups, tiny_model(), tmp_path / "teacher", piece=6)
    assert "going on after 10 of" in capsys.readouterr().out and len(texts) == 3 + len(whole) - 10
    assert np.array_equal(vectors[:], whole[:]) and not (tmp_path / ".teacher.unfinished").exists()
    monkeypatch.setattr(module, "encode", encode)
    other = teacher_vectors(groups, tiny_model(seed=5), tmp_path / "other", piece=4)
    assert "begun anew" in capsys.readouterr().out
    assert np.array_equal(other[:], teacher_vectors(groups, tiny_model(seed=5), tmp_path / "fresh", piece=4)[:])


def test_joined_vectors(tmp_path):
    texts = ["red bird", "blue fish", "old horse"]
    a, b = (teacher_vectors(order, tiny_model(seed=i), tmp_path / str(i), dtype=dtype) for i, order, dtype in ((1, texts, "float32"), (2, texts[::-1], "float16")))
    both = join_vectors([a, tmp_path / "2"], tmp_path / "both", dtype="float16")
    found = both[both.rows_of(texts, "query")]
    for part, one in ((found[:, :32], a), (found[:, 32:], b)): assert np.allclose(part, one[one.rows_of(texts, "document")], atol=2e-3)
    assert np.load(tmp_path / "both" / "vectors.npy").dtype == np.float16 and json.loads((tmp_path / "both" / "about.json").read_text())["dim"] == 64
    for given, problem in (([a], "two teachers or more"), ([a, teacher_vectors(texts[:2], tiny_model(), tmp_path / "less")], "other texts than the first")):
        with pytest.raises(InputError, match=problem): join_vectors(given, tmp_path / "new")
    with pytest.raises(InputError, match="is there already"): join_vectors([a, b], tmp_path / "both")
