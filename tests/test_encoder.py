"Every layout gives the vectors and gradients of plain sentence-transformers, computes on no more than it says, and reads old tokens only where they are right."
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from nixietune import encoder, tokens
from nixietune.batching import BatchKey, index_groups, KeySampler, Source
from nixietune.core import InputError
from nixietune.encoder import check_layout, encode, layout_of, load_encoder, make_features, PACKABLE, plan_forwards, prepare, set_max_length
from nixietune.groups import make_groups
from nixietune.steps import Step
from nixietune.testing import tiny_model
from nixietune.tokens import attend, tokenize

torch.set_num_threads(1)  # tiny tensors: a second thread only waits
LENGTHS = (5, 5, 1, 17, 40, 5, 17, 90, 100, 100)  # several equal, some longer than ModernBERT's local attention
UNPACKABLE = ("mpnet", "deberta-v2")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch): monkeypatch.setenv("NIXIETUNE_CACHE", str(tmp_path / "cache"))


def texts_of(lengths, seed=0):
    "A text of so many one-letter tokens for each length, all of them distinct."
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice([*"abcdefghijklmnopqrst"], n)) for n in lengths]


def tiny(kind, **more): return tiny_model(kind, initializer_range=0.1, **more)  # attention must matter, or mixed texts stay unseen


def learn(model, vectors):
    "The gradient of every weight, for some loss of the vectors."
    model.zero_grad()
    (vectors * torch.randn(vectors.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    return {name: o.grad.clone() for name, o in model.named_parameters() if o.grad is not None}


def plain(kind, texts, **more):
    "Vectors and gradients as sentence-transformers alone computes them."
    model = tiny(kind, **more)
    vectors = model(model.preprocess(texts))["sentence_embedding"]
    return vectors.detach(), learn(model, vectors)


def ours(model, texts, budget=10**6, layout=None):
    "Vectors and gradients through a layout, and the number of forwards."
    layout, store = layout or layout_of(model), tokenize(model, texts, keep=False)
    plan = plan_forwards(layout, store.lengths, budget)
    found = torch.cat([model(make_features(layout, [store[i] for i in here]))["sentence_embedding"] for here in plan])
    vectors = torch.empty_like(found).index_copy(0, torch.from_numpy(np.concatenate(plan)), found)
    return vectors.detach(), learn(model, vectors), len(plan)


def assert_same(found, expected):
    "Forward to 1e-5, gradients to 1e-4 of each; a gradient that is zero but for rounding (a key's bias) is compared with all."
    (vectors, gradients), (vectors_0, gradients_0) = found, expected
    assert (vectors - vectors_0).abs().max() < 1e-5
    assert gradients.keys() == gradients_0.keys()
    rounding = 1e-4 * torch.cat([o.flatten() for o in gradients_0.values()]).norm()
    off = {name: ((gradients[name] - o).norm() / max(o.norm(), rounding)).item() for name, o in gradients_0.items()}
    assert max(off.values()) < 1e-4, off


@pytest.mark.parametrize("kind", PACKABLE)
def test_packed_bucketed_and_padded_are_one(kind):
    texts = texts_of(LENGTHS)
    expected = plain(kind, texts)
    for forward, budget, forwards in (("packed", 10**6, 1), ("packed", 128, 4), ("bucketed", 10**6, 5), ("padded", 10**6, 1)):
        model = tiny(kind)
        assert prepare(model, forward).name == forward
        vectors, gradients, n = ours(model, texts, budget)
        assert n == forwards
        assert_same((vectors, gradients), expected)
        assert np.abs(model.encode(texts) - expected[0].numpy()).max() < 1e-5  # sentence-transformers' own way still works
    assert PACKABLE.keys() >= {"bert", "xlm-roberta", "distilbert", "modernbert", "qwen3"}


@pytest.mark.parametrize("kind, pooling", [("bert", "cls"), ("modernbert", "cls"), ("bert", "lasttoken"), ("qwen3", "mean")])
def test_every_pooling(kind, pooling):
    texts = texts_of(LENGTHS)
    assert_same(ours(tiny(kind, pooling=pooling), texts)[:2], plain(kind, texts, pooling=pooling))


def test_longer_than_local_attention():
    "ModernBERT's window is at work in the test above: widening it changes the vectors of long texts, and of no others."
    texts = texts_of((3, 60))
    narrow, wide = (ours(tiny("modernbert", local_attention=n), texts)[0] for n in (8, 128))
    off = (narrow - wide).abs().amax(1)
    assert off[0] < 1e-6 and off[1] > 1e-4


@pytest.mark.parametrize("kind", UNPACKABLE)
def test_what_cannot_be_packed(kind, capsys):
    with pytest.raises(InputError, match=f"cannot be packed: {kind} .* would see each other; expected forward='auto'"): prepare(tiny(kind), "packed")
    model = tiny(kind)
    assert prepare(model).name == "bucketed"
    said = capsys.readouterr().out
    assert "length-sorted padded batches" in said and kind in said
    texts = texts_of(LENGTHS)
    vectors, gradients, n = ours(model, texts)
    assert n > 1
    assert_same((vectors, gradients), plain(kind, texts))


def test_an_unknown_architecture_is_not_packed(monkeypatch):
    monkeypatch.delitem(PACKABLE, "electra")
    with pytest.raises(InputError, match="electra has not been checked"): prepare(tiny("electra"), "packed")
    assert prepare(tiny("electra")).name == "bucketed"


@pytest.mark.parametrize("kind", ["roberta", "xlm-roberta", "camembert"])
def test_position_offset(kind):
    "RoBERTa's first token has position 2: packed equals sentence-transformers' own `encode`, and the check sees another offset."
    texts, model = texts_of(LENGTHS), tiny(kind)
    expected = tiny(kind).encode(texts)
    assert layout_of(model).first_position == 2
    assert np.abs(encode(model, texts, progress=False) - expected).max() < 1e-5
    check_layout(model)
    encoder._layouts[model] = replace(layout_of(model), first_position=0)
    assert np.abs(encode(model, texts, progress=False) - expected).max() > 1e-3
    with pytest.raises(RuntimeError, match=f"{kind}: packed vectors differ"): check_layout(model)


def test_the_check_sees_mixed_texts(monkeypatch):
    "Attention that forgets the borders between texts does not get past the check before training."
    model = tiny("bert")
    prepare(model, "packed")
    assert check_layout(model) < 1e-5
    forgetful = lambda q, k, v, borders, longest, options: attend(q, k, v, **options).transpose(1, 2)
    monkeypatch.setitem(tokens.KERNELS, "runs", forgetful)
    with pytest.raises(RuntimeError, match="bert: packed vectors differ"): check_layout(model)


class Counter:
    "How many tokens go through the first layer of a model."
    def __init__(self, model):
        self.n = 0
        model[0].auto_model.get_input_embeddings().register_forward_pre_hook(self.count)

    def count(self, module, inputs): self.n += inputs[0].numel()


def mixture(n=400, seed=0):
    "Texts as long as those that people search: many short, few long."
    lengths = np.random.default_rng(seed).lognormal(2.5, 0.8, n).clip(2, 120).astype(int)
    return texts_of(lengths, seed), int(lengths.sum()) + 2 * n  # [CLS] and [SEP]


@pytest.mark.parametrize("forward, most", [("packed", 1.0), ("bucketed", 1.15)])
def test_tokens_computed(forward, most):
    "Counted at the model itself: packed takes the real tokens and no more; bucketed at most 15% more; a padded batch more than twice as many."
    texts, real = mixture()
    model = tiny_model("bert")
    prepare(model, forward)
    counter = Counter(model)
    encode(model, texts, progress=False, tokens_per_forward=1024)
    assert real <= counter.n <= most * real
    assert (counter.n == real) == (forward == "packed")

    groups = make_groups([{"query": q, "pos": [{"doc": d}]} for q, d in zip(texts[:100], texts[100:200])], "nixietune", source="test")
    source, step, counter.n = Source(model, index_groups(groups), budget=1024), Step(model, None), 0
    for (key,) in KeySampler(len(groups), 32):
        batch, before = source[key], counter.n
        label = batch["label"]
        step.vectors(batch["packs"], label["order"])
        assert counter.n - before == label["computed"] <= most * label["real"] and label["padded"] > 1.5 * label["real"]
    lengths = tokenize(model, texts[:200], keep=False).lengths
    assert lengths.sum() <= counter.n <= most * lengths.sum()


PROMPTS = {"query": "a b c d: ", "document": "e f: "}


@pytest.mark.parametrize("kind", ["bert", "qwen3", "mpnet"])
@pytest.mark.parametrize("include_prompt", [True, False])
def test_prompts(kind, include_prompt):
    "Prompts of two lengths, also where pooling leaves them out: packs hold one prompt length each."
    options = dict(prompts=PROMPTS, include_prompt=include_prompt, pooling="mean")
    queries, documents, theirs, model = texts_of(LENGTHS), texts_of(LENGTHS, seed=1), tiny(kind, **options), tiny(kind, **options)
    expected = np.concatenate([theirs.encode_query(queries), theirs.encode_document(documents)])
    found = [encode(model, some, role, progress=False) for role, some in (("query", queries), ("document", documents))]
    assert np.abs(np.concatenate(found) - expected).max() < 1e-5

    groups = make_groups([{"query": q, "pos": [{"doc": d}]} for q, d in zip(queries, documents)], "nixietune", source="test")
    def batch():
        "The packs of all ten groups, their vectors, and how far these are from sentence-transformers'."
        made = Source(model, index_groups(groups, model=model), budget=10**6)[BatchKey(0, 0, tuple(range(10)), 0)]
        vectors = Step(model, None).vectors(made["packs"], made["label"]["order"]).detach().numpy()
        return made, np.abs(vectors - expected).max()
    made, off = batch()
    assert off < 1e-5
    if kind != "bert": return
    if include_prompt: assert len(made["packs"]) == 1
    else:
        assert [o["prompt_length"] for o in made["packs"]] == [1 + 3, 1 + 5]  # documents and queries, with [CLS]
        encoder._layouts[model] = replace(layout_of(model), one_prompt=False)
        made, off = batch()
        assert len(made["packs"]) == 1 and off > 1e-2  # what the rule is there for


def test_padding_on_the_left():
    "A decoder's tokenizer pads on the left: the same vectors, by sentence-transformers, in buckets and in packs."
    texts, found = texts_of(LENGTHS), {}
    for forward in ("packed", "bucketed", "padded", "theirs"):
        model = tiny("qwen3")
        model[0].tokenizer.padding_side = "left"
        if forward != "theirs": assert prepare(model, forward).side == "left"
        found[forward] = model.encode(texts) if forward == "theirs" else encode(model, texts, progress=False)
    assert max(np.abs(o - found["theirs"]).max() for o in found.values()) < 1e-5


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": 3}, {"window": 3, "causal": True}, {"softcap": 1.0, "causal": True}], ids=str)
def test_attention_dropout_keeps_the_mean(options):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, 6, 4) for _ in range(3))
    draws = torch.cat([attend(q.expand(500, -1, -1, -1), k.expand(500, -1, -1, -1), v.expand(500, -1, -1, -1), dropout=0.3, **options)
                       for _ in range(8)])
    error = draws.std(0) / len(draws)**0.5
    assert error.max() > 0.005  # it does drop
    assert ((draws.mean(0) - attend(q, k, v, **options)[0]).abs() < 5 * error + 1e-6).all()


def test_dropout_is_off_in_eval():
    model = tiny("bert", attention_probs_dropout_prob=0.5)  # nothing but attention drops
    texts, expected = texts_of(LENGTHS), plain("bert", texts_of(LENGTHS))[0]
    draw = lambda: ours(model, texts)[0]
    assert (draw() - expected).abs().max() < 1e-5
    model.train()
    assert (draw() - draw()).abs().max() > 1e-3
    assert np.abs(encode(model, texts, progress=False) - expected.numpy()).max() < 1e-5  # `encode` evaluates
    assert model.training


def never(*args, **kwargs): raise AssertionError("tokenised again")


def test_tokens_are_kept(capsys, monkeypatch):
    model, texts = tiny_model(), texts_of(LENGTHS)
    first = [o.tolist() for o in tokenize(model, texts, "document")]
    assert capsys.readouterr().out == "tokenising 10 documents\n"
    again = tiny_model(seed=1)  # other weights, the same tokenizer
    monkeypatch.setattr(again, "preprocess", never)
    assert [o.tolist() for o in tokenize(again, texts, "document")] == first
    assert capsys.readouterr().out == ""
    with pytest.raises(AssertionError, match="tokenised again"): tokenize(again, texts, "query")


def edit(folder, name, change):
    file = folder / name
    settings = json.loads(file.read_text())
    change(settings)
    file.write_text(json.dumps(settings))


def lowercase_off(settings): settings["normalizer"]["lowercase"] = False
def swap_words(settings):
    vocabulary = settings["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]


@pytest.mark.parametrize("what", ["prompts", "maximum length", "model's maximum length", "texts", "tokenizer", "vocabulary"])
def test_tokens_are_made_anew_and_why(what, tmp_path, capsys):
    tiny_model().save_pretrained(str(tmp_path / "model"))
    load = lambda: load_encoder(tmp_path / "model", prompts={})
    model, texts, options = load(), texts_of(LENGTHS), {"role": "document", "prompts": "a b: "}
    if what == "maximum length": options["max_length"] = 50
    before = tokenize(model, texts, **options)
    capsys.readouterr()
    if what == "prompts": options["prompts"] = "b a: "
    elif what == "maximum length": options["max_length"] = 20
    elif what == "model's maximum length": set_max_length(model, 20)
    elif what == "texts": texts = texts_of(LENGTHS, seed=1)
    else:
        edit(tmp_path / "model", "tokenizer.json", lowercase_off if what == "tokenizer" else swap_words)
        model = load()
    after = tokenize(model, texts, **options)
    name = {"vocabulary": "tokenizer", "model's maximum length": "maximum length"}.get(what, what)
    assert ("(other texts)" if what == "texts" else f"other {name} than in the run before") in capsys.readouterr().out
    assert before.path != after.path


def test_a_static_model_cuts_by_its_tokenizer():
    "There truncation is a rule of the tokenizer, not a left-over of the last call."
    model, texts = tiny_model("static"), texts_of(LENGTHS)
    before = tokenize(model, texts)
    model[0].tokenizer.enable_truncation(4)
    assert tokenize(model, texts).lengths.max() == 4 < before.lengths.max()
    assert np.abs(encode(model, texts, progress=False) - model.encode(texts)).max() < 1e-6


@pytest.mark.parametrize("kind, limit", [("bert", 130), ("modernbert", 130), ("roberta", 128), ("xlm-roberta", 128), ("mpnet", 128)])
def test_as_long_as_there_are_positions(kind, limit):
    "RoBERTa and MPNet count positions from 2, so two of them hold no token; a longer text is refused before it breaks."
    model, text = tiny(kind), texts_of((300,))
    set_max_length(model, limit)
    assert np.abs(encode(model, text, progress=False) - model.encode(text)).max() < 1e-5
    with pytest.raises(InputError, match=f"at most {limit}"): set_max_length(model, limit + 1)


def test_truncated_vectors():
    "A model that is asked for fewer dimensions gives them here, too."
    model, texts = tiny("bert"), texts_of(LENGTHS)
    model.truncate_dim = 8
    assert encode(model, texts, progress=False).shape == model.encode(texts).shape == (len(texts), 8)


def test_e5_gets_its_prompts(tmp_path, capsys):
    folder = tmp_path / "e5-tiny"
    tiny_model().save_pretrained(str(folder))
    capsys.readouterr()
    model = load_encoder(folder)
    said = capsys.readouterr().out
    assert "'query: '" in said and "'passage: '" in said and "prompts={}" in said
    asked = texts_of((3,))
    expected = tiny_model().encode([f"query: {asked[0]}"])
    assert np.abs(encode(model, asked, "query", progress=False) - expected).max() < 1e-5
    assert np.abs(model.encode_query(asked) - expected).max() < 1e-5  # plain sentence-transformers sees them, too

    without = load_encoder(folder, prompts={})
    assert "query: " not in capsys.readouterr().out
    assert np.abs(encode(without, asked, "query", progress=False) - tiny_model().encode(asked)).max() < 1e-5
    (tmp_path / "e5-experiments").mkdir()
    folder.rename(tmp_path / "e5-experiments/mine")
    assert not any(load_encoder(tmp_path / "e5-experiments/mine").prompts.values())  # a model's name is its own, not its folder's
    tiny_model().save_pretrained(str(folder))
    capsys.readouterr()
    own = load_encoder(folder, prompts={"query": "a: "})
    assert own.prompts == {"query": "a: ", "document": ""} and "query: " not in capsys.readouterr().out


def test_a_store_that_another_process_is_writing(tmp_path):
    "Its folder begins with a dot, and its files are half there."
    half = tmp_path / ".abc.1234.tmp"
    half.mkdir()
    (half / "parts.json").write_text("")
    assert len(tokenize(tiny_model(), ["a red bird"], folder=tmp_path)) == 1
