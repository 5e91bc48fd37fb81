"In-context examples: the tokens and vectors of FlagEmbedding's own code, plain sentence-transformers token by token, what a batch draws, training that resumes, and refusals."
import json

import numpy as np
import pytest
import torch
from make_icl_fixture import CASES, EXAMPLES, FIND, FIXTURE, FORMAT, network, ROWS, SUFFIX, tokenizer
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from transformers import TrainerCallback

from nixietune.adapters import add_lora, save_merged
from nixietune.batching import BatchKey, index_groups, Source
from nixietune.checkpoints import last_checkpoint
from nixietune.core import InputError
from nixietune.encoder import encode, set_max_length
from nixietune.evaluation import evaluate
from nixietune.groups import make_groups
from nixietune.icl import evaluate_icl, examples_from, examples_of, InContext, set_examples, with_examples
from nixietune.settings import model_of, read_settings, TRAIN
from nixietune.testing import tiny_model, toy_corpus, toy_groups
from nixietune.training import Trainer, TrainingArguments

torch.set_num_threads(1)
THEIRS = json.loads(FIXTURE.read_text())
INSTRUCTION = FORMAT.replace("{}", "{instruction}", 1).replace("{}", "{query}")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch): monkeypatch.setenv("NIXIETUNE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "The model that FlagEmbedding had, as sentence-transformers saves it."
    folder = tmp_path_factory.mktemp("theirs")
    network().save_pretrained(folder / "hf")
    tokenizer().save_pretrained(folder / "hf")
    model = SentenceTransformer(modules=[Transformer(str(folder / "hf")), Pooling(32, "lasttoken"), Normalize()], device="cpu")
    model.prompts = {"query": FORMAT.replace("{}", FIND, 1).replace("{}", ""), "document": "", "instruction_format": INSTRUCTION}
    model.save_pretrained(str(folder / "model"))
    return str(folder / "model")


def loaded(folder, query=1400, document=128):
    model = SentenceTransformer(folder, device="cpu").eval()
    set_max_length(model, {"query": query, "document": document})
    set_examples(model, suffix=SUFFIX)
    return model


def ids_of(model, texts, role, prompt=None):
    found = model[0].preprocess(texts, prompt=prompt, task=role)
    return [row[mask.bool()].tolist() for row, mask in zip(found["input_ids"], found["attention_mask"])]


def rows_in(batch):
    "The token ids of a batch's texts, queries first."
    found = {}
    for features, here in zip(batch["packs"], np.split(batch["label"]["order"].numpy(), np.cumsum([len(o["cu_seq_lens_q"]) - 1 for o in batch["packs"]])[:-1])):
        ends = features["cu_seq_lens_q"].tolist()
        found |= {int(i): features["input_ids"][0, a:b].tolist() for i, a, b in zip(here, ends, ends[1:])}
    return [found[i] for i in sorted(found)]


# ---- what FlagEmbedding reads

def ours(folder, name):
    "Token ids of the queries of a case with the examples that FlagEmbedding drew, and of its passages."
    rows, options, draws = CASES[name]
    model, groups = loaded(folder, options["query_max_len"]), make_groups(rows, "bge")
    index = index_groups(groups, model=model)
    drawer = InContext(5, options.get("example_query_max_len", 256), options.get("example_passage_max_len", 256))(model, index, groups)
    source, a = Source(model, index, 10**6), index.arrays
    queries = []
    for i, (n, order) in enumerate(draws):
        taken = [drawer.store[drawer.place[a.ptr[o]]] for o in [o for o in order if o != i][:n]]  # as FlagEmbedding does: its own row is taken out, and the first n of the others stay
        queries.append(with_examples(source.stores["query"][a.query[i]], taken, drawer.limit, drawer.head)[0].tolist())
    return queries, {text: source.stores["document"][i].tolist() for i, text in enumerate(index.documents)}


@pytest.mark.parametrize("name", ["all fit", "examples are cut", "a query is cut", "clusters"])
def test_what_flagembedding_trains_on(folder, name):
    "Token for token: examples, suffix, cut queries, categories, and passages that are read as queries."
    queries, passages = ours(folder, name)
    assert queries == THEIRS["training"][name]["queries"]
    texts = [text for o in CASES[name][0] for text in (*o["pos"], *o["neg"])]
    assert [passages[o] for o in texts] == THEIRS["training"][name]["passages"]
    assert any(len(o) > 150 for o in queries) or name == "a query is cut"


def test_where_we_differ_the_budget(folder):
    "FlagEmbedding keeps 512 tokens for a query, so that at query_max_len=512 no example is ever read; here the query has what it needs, and examples the rest."
    queries, theirs = ours(folder, "at 512 there is none")[0], THEIRS["training"]["at 512 there is none"]["queries"]
    bare = ours(folder, "a query is cut")[0]
    assert theirs[1:] == bare[1:] and all(len(a) > len(b) + 150 and a[-len(b) + 1:] == b[1:] and len(a) <= 512 for a, b in zip(queries[1:], theirs[1:]))


def test_where_we_differ_no_round_trip(folder):
    "FlagEmbedding cuts an example by decoding its tokens: half of a letter becomes a replacement character. Here the text is cut, and no letter is halved."
    queries, theirs = ours(folder, "half a letter")[0], THEIRS["training"]["half a letter"]["queries"]
    decode = tokenizer().decode
    assert queries[1:] == theirs[1:] and "\ufffd" in decode(theirs[0]) and "\ufffd" not in decode(queries[0])
    assert len(decode(queries[0])) == len(decode(theirs[0])), "and nothing else"


@pytest.mark.parametrize("kind", ["with", "without"])
def test_what_flagembedding_searches_with(folder, kind, tmp_path):
    "Queries and documents, token for token and number for number: by nixietune, and by plain sentence-transformers from the saved folder."
    model, theirs = loaded(folder, 100, 64), THEIRS["inference"][kind]
    set_examples(model, EXAMPLES if kind == "with" else (), "<instruct>{}\\n<query>{}\\n<response>{}", "\\n<response>")
    queries = [o["query"] for o in ROWS] + ["what eats fish " * 20]
    model.save_pretrained(str(tmp_path / "saved"))
    plain = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    for o in (model, plain): assert ids_of(o, queries, "query", o.prompts["query"]) == theirs["queries"]
    documents = [o["pos"][0] for o in ROWS]
    for found, expected in ((plain.encode_query(queries), theirs["vectors"]), (encode(model, queries, "query", progress=False), theirs["vectors"]),
                            (plain.encode_document(documents), theirs["passages"]), (encode(model, documents, progress=False), theirs["passages"])):
        assert np.abs(found - np.array(expected)).max() < 1e-5
    assert examples_of(plain)["examples"] == (EXAMPLES if kind == "with" else [])


def test_the_same_in_training_and_at_inference(folder):
    "A query behind two examples from its batch has the tokens of the same query behind the same two as set examples."
    queries, _ = ours(folder, "all fit")
    model = loaded(folder)
    set_examples(model, [{"instruct": FIND, "query": o["query"], "response": o["pos"][0]} for o in (ROWS[1], ROWS[2])])
    assert ids_of(model, [ROWS[0]["query"]], "query", model.prompts["query"]) == queries[:1]


def test_one_suffix_everywhere(folder, tmp_path):
    "Backslash and n are a new line, in set_examples, in training and in the saved model."
    model = SentenceTransformer(folder, device="cpu")
    set_examples(model, suffix="\\nResponse:")
    model.save_pretrained(str(tmp_path / "saved"))
    assert examples_of(SentenceTransformer(str(tmp_path / "saved"), device="cpu"))["suffix"] == "\nResponse:"
    assert tokenizer().decode(ids_of(model, ["a"], "query")[0]) == "<s>a\nResponse:</s>"


# ---- what a batch draws

def toy_batch(rows, config=InContext(5), size=64, dialect="bge", **options):
    model = tiny_model("qwen3", length=size)
    set_examples(model, suffix=" ?")
    groups = make_groups(rows, dialect)
    index = index_groups(groups, model=model)
    return model, Source(model, index, 10**6, extend=config(model, index, groups), **options)


def decoded(model, source, key): return [model.tokenizer.decode(o, skip_special_tokens=True) for o in rows_in(source[key])[:len(key.rows)]]


PAIRS = [("tiny winged one", "small bird"), ("ancient feline", "old cat"), ("huge swimmer", "large fish"), ("azure winged one", "blue bird")]


def test_a_draw_depends_on_seed_epoch_step_and_row():
    model, source = toy_batch([{"query": q, "pos": [p]} for q, p in PAIRS])
    key = BatchKey(1, 2, (0, 1, 2, 3), 7)
    assert decoded(model, source, key) == decoded(model, source, key)
    for other in (BatchKey(2, 2, key.rows, 7), BatchKey(1, 3, key.rows, 7), BatchKey(1, 2, key.rows, 8)): assert decoded(model, source, key) != decoded(model, source, other)
    counts = [text.count("?") - 1 for step in range(60) for text in decoded(model, source, BatchKey(0, step, key.rows, 0))]
    assert {*counts} == {0, 1, 2, 3}, "never more than the batch has"


def test_a_positive_is_never_an_example():
    "By text: another row with the same positive, a row that asks with it, and the same query with another positive."
    rows = [("tiny winged one", "small bird"), ("winged one", "small bird"), ("small bird", "tiny horse"), ("tiny winged one", "old bird"), ("ancient feline", "old cat")]
    model, source = toy_batch([{"query": q, "pos": [p]} for q, p in rows])
    seen = {decoded(model, source, BatchKey(0, step, (0, 1, 2, 3, 4), 0))[0] for step in range(40)}
    assert not any("small bird" in o or "old bird" in o or "tiny horse" in o for o in seen) and any("old cat" in o for o in seen)


def test_labels_may_be_shared():
    "In classes and clusters the response is a label: were that of the row left out, it would be known by its absence."
    label = {"pos": ["small"], "neg": ["large"], "type": "symmetric_class"}
    model, source = toy_batch([{"query": q} | label for q, _ in PAIRS], InContext(5, retrieval=False))
    assert any(o.count("small") > 1 for step in range(5) for o in decoded(model, source, BatchKey(0, step, (0, 1, 2, 3), 0)))
    cluster = {"pos": ["old horse"], "neg": ["large cat"], "type": "symmetric_clustering", "category": "town"}
    model, source = toy_batch([{"query": q} | cluster for q, _ in PAIRS], InContext(5, retrieval=False))
    texts = " ".join(text for step in range(5) for text in decoded(model, source, BatchKey(0, step, (0, 1, 2, 3), 0)))
    assert "town" in texts and "old horse" not in texts


def test_who_takes_part():
    "Retrieval where it is asked for, symmetric types always; never another data set's rows."
    sts = [{"query": q, "pos": [{"doc": p}], "type": "symmetric_sts", "dataset": "sts"} for q, p in PAIRS[:2]]
    search = [{"query": q, "pos": [{"doc": p}], "dataset": "search"} for q, p in PAIRS[2:]]
    for retrieval in (True, False):
        model, source = toy_batch(sts + search, InContext(5, retrieval=retrieval), dialect="nixietune")
        texts = [decoded(model, source, BatchKey(0, step, (0, 1, 2, 3), 0)) for step in range(20)]
        both = [{*o} for o in zip(*texts)]
        assert [len(o) for o in both] == [2, 2] + [1 + retrieval]*2
        assert not any("fish" in o or "blue" in o for o in both[0] | both[1]) and not any("small" in o or "cat" in o for o in both[2] | both[3])


def test_symmetric_documents_are_read_as_queries():
    model, source = toy_batch([{"query": "tiny winged one", "pos": ["small bird"], "neg": ["old cat"], "prompt": "red ", "type": "symmetric_sts"}, {"query": "huge swimmer", "pos": ["large fish"]}])
    assert [model.tokenizer.decode(o, skip_special_tokens=True) for o in rows_in(source[BatchKey(0, 0, (0, 1), 0)])[2:]] == ["red small bird ?", "large fish", "red old cat ?"]


def test_counted():
    "A batch of one has no example; a query that leaves no room has none."
    model, source = toy_batch([{"query": q, "pos": [p]} for q, p in PAIRS])
    assert source[BatchKey(0, 0, (2,), 0)]["label"]["counted"] == {"examples": 0, "queries_alone": 1, "examples_left_out": 0}
    model, source = toy_batch([{"query": q, "pos": [p]} for q, p in PAIRS], size=16)
    counted = [source[BatchKey(0, step, (0, 1, 2, 3), 0)] for step in range(10)]
    assert sum(o["label"]["counted"]["examples_left_out"] for o in counted) > 0 and max(len(row) for o in counted for row in rows_in(o)) <= 16
    for o in counted: assert all("?" in model.tokenizer.decode(row) for row in rows_in(o)[:4]), "the query keeps its place"


def test_a_tokenizer_that_looks_across_a_blank_line(capsys):
    "GPT-2's splits two line breaks when a word follows: joined tokens are then other ones than in one piece, which is said."
    from tokenizers import pre_tokenizers
    for across in (False, True):
        model = tiny_model("qwen3", max_position_embeddings=4096)
        model[0].processor = tokenizer()
        if across: model.tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        groups = make_groups([{"query": q, "pos": [p]} for q, p in PAIRS], "bge")
        set_examples(model)
        InContext()(model, index_groups(groups, model=model), groups)
        assert ("3 of 3 joints" in capsys.readouterr().out) == across


def test_settings(folder, tmp_path):
    "What a run file says; backslash and n, as a shell writes them, are a new line in every prompt and format."
    (tmp_path / "task.json").write_text(json.dumps([{"query": "a", "response": "b", "instruct": "c"}]))
    said = {"model": folder, "query_prompt": r"Find.\nQuery: ", "document_prompt": "", "instruction_format": r"Instruct: {instruction}\nQuery: {query}", "suffix": r"\nResponse:", "task_examples": str(tmp_path / "task.json")}
    model = model_of(read_settings(TRAIN, typed=said))
    assert model.prompts["query"] == "Find.\nQuery: " and examples_of(model)["prefix"] == "Instruct: c\nQuery: a\nResponse:b\n\n"
    model.save_pretrained(str(tmp_path / "saved"))
    kept = model_of(read_settings(TRAIN, typed={"model": str(tmp_path / "saved"), "suffix": "auto"}))
    assert examples_of(kept) == examples_of(model)
    trained = model_of(read_settings(TRAIN, typed={"model": str(tmp_path / "saved"), "examples": 3}))
    assert examples_of(trained)["examples"] == [] and examples_of(trained)["suffix"] == "\nResponse:"
    with pytest.raises(InputError, match="together with examples"): model_of(read_settings(TRAIN, typed=said | {"examples": 3}))


# ---- training

def train(folder, resume=False, stop=None, **args):
    model = tiny_model("qwen3", length=96)
    set_examples(model, suffix=" ?")
    add_lora(model, rank=8, alpha=16, dropout=0.1)
    settings = dict(max_steps=8, per_device_train_batch_size=8, learning_rate=1e-3, save_strategy="steps", save_steps=4, seed=3, disable_tqdm=True) | args
    trainer = Trainer(model, TrainingArguments(str(folder), **settings), toy_groups(48), examples=InContext(3), callbacks=[stop] if stop else None)
    trainer.train(resume)
    return trainer, {k: v.clone() for k, v in model.state_dict().items() if "lora" in k}


def equal(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs): control.should_training_stop = state.global_step >= 5


def test_resumed_bit_for_bit_and_two_workers(tmp_path):
    trainer, whole = train(tmp_path / "whole")
    assert trainer.facts["examples"] > 20 and trainer.facts["queries_alone"] == 0
    train(tmp_path / "stopped", stop=Stop())
    assert last_checkpoint(tmp_path / "stopped").endswith("checkpoint-4")
    _, resumed = train(tmp_path / "stopped", resume=True)
    _, workers = train(tmp_path / "workers", dataloader_num_workers=2)
    assert equal(whole, resumed) and equal(whole, workers)


def test_merged_and_loaded(tmp_path):
    "LoRA, merged, saved with examples: plain sentence-transformers reads and computes the same."
    trainer, _ = train(tmp_path / "run")
    model, task = trainer.model, examples_from(toy_groups(48), 2)
    found = evaluate_icl(model, toy_groups(20, seed=1), toy_corpus(), task, progress=False)
    assert {*found} == {"without examples", "with examples"} and examples_of(model)["examples"] == []
    set_examples(model, task)
    save_merged(model, tmp_path / "merged")
    queries = toy_groups(20, seed=1)["query"][:]
    plain = SentenceTransformer(str(tmp_path / "merged"), device="cpu")
    assert ids_of(plain, queries, "query") == ids_of(model, queries, "query") and examples_of(plain)["examples"] == task
    assert np.abs(plain.encode_query(queries) - encode(model, queries, "query", progress=False)).max() < 1e-3
    assert evaluate(model, toy_groups(20, seed=1), toy_corpus(), progress=False).metrics == found["with examples"].metrics


# ---- refused

def test_refused(folder):
    model, few = loaded(folder, 100), [{"query": "a", "response": "b"}]
    with pytest.raises(InputError, match="at most 2,048 tokens together"): set_examples(model, few*400)
    with pytest.raises(InputError, match="once each"): set_examples(model, few, "Instruct: no place")
    with pytest.raises(InputError, match="example 2: .*query, response and perhaps instruct"): set_examples(model, [*few, {"query": "a"}])
    with pytest.raises(InputError, match="a list of dicts"): set_examples(model, "examples.json")
    with pytest.raises(InputError, match="pooling='lasttoken'"): set_examples(tiny_model(), few)
    assert examples_of(model)["examples"] == [] and model[0].query_length == 100, "a refused call changes nothing"
    rows = [{"query": q, "pos": [p]} for q, p in PAIRS]
    with pytest.raises(InputError, match="the shortest has .* tokens, the shortest query"): toy_batch(rows, size=9)
    with pytest.raises(InputError, match="no group takes part"): toy_batch(rows, InContext(retrieval=False))
    with pytest.raises(InputError, match="without a category"): toy_batch([rows[0] | {"type": "symmetric_clustering"}])
    with pytest.raises(InputError, match="query_length is 0"): InContext(query_length=0)
    with pytest.raises(InputError, match="without a suffix"): Trainer(tiny_model("qwen3"), TrainingArguments("x"), toy_groups(8), examples=InContext())
    with pytest.raises(InputError, match="a model with 1 examples"):
        set_examples(model, few)
        Trainer(model, TrainingArguments("x"), toy_groups(8), examples=InContext())


def test_a_tokenizer_that_reads_its_first_word_otherwise():
    "Some put a space before the first word only where nothing stands before it: there, a template would read other tokens."
    from tokenizers import pre_tokenizers
    model = tiny_model("qwen3")
    backend = model.tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    with pytest.raises(InputError, match="is read as .* and not as"): set_examples(model)
