"Mixed models: the sum and nothing but the sum, in little memory, and what cannot be mixed is refused by name."
import json
import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize

import nixietune as nt
from nixietune.adapters import add_head, add_lora, save_adapter
from nixietune.core import InputError
from nixietune.encoder import encode, layout_of
from nixietune.merging import TensorFiles, example_loss, mix_tensor, slerp, weights_from_losses
from nixietune.testing import tiny_model, toy_corpus, toy_groups

torch.set_num_threads(1)
TEXTS = ["a red bird", "a small blue fish that lives near the town", "crimson winged one"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch): monkeypatch.setenv("NIXIETUNE_CACHE", str(tmp_path / "cache"))


def moved(model, seed):
    "Another model of the same base."
    rng, model = torch.Generator().manual_seed(seed), deepcopy(model)
    for o in model.parameters(): o.data += 0.05 * torch.randn(o.shape, generator=rng).to(o.dtype)
    return model


def three(kind="bert", head=True, **more):
    "A base and two models of it, with a head where they can have one."
    base = tiny_model(kind, prompts={"query": "find: ", "document": "text: "}, **more)
    if head and kind != "static": add_head(base, 16)
    return [base, moved(base, 1), moved(base, 2)]


def saved(models, folder):
    "Their folders."
    paths = [folder / name for name in ("base", "first", "second")[:len(models)]]
    for model, path in zip(models, paths): model.save_pretrained(str(path))
    return paths


def direct(models, weights):
    "The sum, by hand, in float64."
    return {name: sum(w * o.state_dict()[name].double() for w, o in zip(weights, models)) for name in models[0].state_dict()}


def agrees(model, expected, tolerance=1e-6):
    found = model.state_dict()
    assert found.keys() == expected.keys()
    return all((found[name].double() - o).abs().max() <= tolerance for name, o in expected.items())


def edited(folder, change, file="model.safetensors"):
    "Change the tensors of a saved model."
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file, metadata={"format": "pt"})


# ---- the sum

@pytest.mark.parametrize("kind", ["bert", "xlm-roberta", "mpnet", "modernbert", "qwen3", "static"])
def test_equals_the_direct_sum(kind, tmp_path):
    "In memory and on disk, heads included, with the weights in their order."
    models, weights = three(kind), [0.2, 0.3, 0.5]
    expected, folders = direct(models, weights), saved(models, tmp_path)
    assert agrees(nt.mix_models(models, weights), expected)
    assert agrees(nt.mix_models(folders, weights), expected)
    on_disk = nt.mix_models_by_layers(folders, weights, tmp_path / "mix")
    assert agrees(SentenceTransformer(str(on_disk), device="cpu"), expected)
    assert not agrees(nt.mix_models(models, weights[::-1]), expected, 1e-3)
    assert agrees(models[0], direct(models[:1], [1]), 0)  # the models are as they were


def test_published_formula(tmp_path):
    "LM-Cocktail: the new state dict is the sum over models of weight * state dict, key by key."
    models, weights = three(head=False), [0.4, 0.6, 0.0]
    merged = {}
    for model, weight in zip(models, weights):
        for name, tensor in model[0].auto_model.state_dict().items(): merged[name] = merged.get(name, 0) + tensor * weight
    found = nt.mix_models(models, weights)[0].auto_model.state_dict()
    assert max((found[name] - o).abs().max() for name, o in merged.items()) < 1e-6


@pytest.mark.parametrize("method", ["linear", "slerp"])
def test_ends_bit_for_bit(method, tmp_path):
    models = three()[:2]
    models[0][0].auto_model.pooler.dense.bias.data[:] = -0.0
    folders = saved(models, tmp_path)
    for weights, end in (([1, 0], models[0]), ([0, 1], models[1])):
        for mix in (nt.mix_models(models, weights, method=method), nt.mix_models(folders, weights, tmp_path / "mix", method=method)):
            for name, o in end.state_dict().items(): assert torch.equal(mix.state_dict()[name].view(torch.int32), o.view(torch.int32)), name


def test_the_same_every_time(tmp_path):
    folders = saved(three(), tmp_path)
    for name in "ab": nt.mix_models_by_layers(folders, None, tmp_path / name)
    files = [{p.relative_to(tmp_path / name): p.read_bytes() for p in (tmp_path / name).rglob("*") if p.is_file()} for name in "ab"]
    assert files[0] == files[1] and Path("2_Dense/model.safetensors") in files[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_precision(dtype, tmp_path):
    "Summed in float32 or better, rounded once, kept as the first model has it."
    models = three()
    for model in models[:2]: model.to(dtype)
    expected = sum(w * o.state_dict()["2.linear.weight"].to(torch.promote_types(dtype, torch.float32)) for w, o in zip((0.25, 0.25, 0.5), models)).to(dtype)
    assert torch.equal(nt.mix_models(models, [0.25, 0.25, 0.5]).state_dict()["2.linear.weight"], expected)
    out = nt.mix_models_by_layers(saved(models, tmp_path), [0.25, 0.25, 0.5], tmp_path / "mix")
    assert torch.equal(load_file(out / "2_Dense/model.safetensors")["linear.weight"], expected)
    # ten equal numbers: rounding after each step would drift away from them
    x = torch.full((4,), 1.1, dtype=torch.bfloat16)
    assert torch.equal(mix_tensor("x", [{"x": x}] * 10, [0.1] * 10, "abcdefghij"), x)


def test_slerp():
    "Shoemake's formula by hand, on vectors of any length; at the tiny angles of fine-tuning it is the line."
    rng = np.random.default_rng(0)
    a, b, t = rng.normal(size=30), rng.normal(size=30), 0.3
    angle = np.arccos(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    expected = (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)
    assert np.abs(slerp(torch.tensor(a), torch.tensor(b), t).numpy() - expected).max() < 1e-12
    x = torch.tensor(a, dtype=torch.float32)
    near = x + 1e-5 * torch.tensor(b, dtype=torch.float32)
    assert (slerp(x, near, 0.5) - (x + near) / 2).abs().max() < 1e-6
    for y in (-x, torch.zeros(30)): assert torch.equal(slerp(x, y, 0.25), torch.lerp(x, y, 0.25))
    models = three()[:2]
    mixed = nt.mix_models(models, [0.7, 0.3], method="slerp").state_dict()
    for name, o in mixed.items(): assert torch.equal(o, slerp(*(m.state_dict()[name] for m in models), 0.3)), name
    with pytest.raises(InputError, match="slerp with 3 models"): nt.mix_models(three(), method="slerp")


# ---- what the result is

def test_loads_in_plain_sentence_transformers(tmp_path):
    "Prompts, pooling, normalisation and lengths of the first model; the same vectors; ready to encode."
    models = three(pooling="cls", length=64)
    models[0].max_seq_length = 20
    mixed = nt.mix_models(models, [0.2, 0.3, 0.5], tmp_path / "a")
    assert layout_of(mixed).name == "packed" and not mixed.training and all(o.requires_grad for o in mixed.parameters())
    nt.mix_models(saved(models, tmp_path), [0.2, 0.3, 0.5], tmp_path / "b")
    for name in "ab":
        plain = SentenceTransformer(str(tmp_path / name), device="cpu")
        assert plain.prompts == models[0].prompts and plain[1].pooling_mode == "cls" and isinstance(plain[-1], Normalize) and plain.max_seq_length == 20
        assert np.abs(plain.encode_query(TEXTS) - encode(mixed, TEXTS, "query", progress=False)).max() < 1e-5


def test_prompts_of_the_family_are_kept(tmp_path, capsys):
    "A folder whose name says E5 gets E5's prompts when it is loaded; under a new name nobody would know."
    models = [tiny_model(), tiny_model(seed=1)]
    for name, model in zip(("e5-base", "mine"), models): model.save_pretrained(str(tmp_path / name))
    nt.mix_models_by_layers([tmp_path / "e5-base", tmp_path / "mine"], None, tmp_path / "mix")
    assert SentenceTransformer(str(tmp_path / "mix"), device="cpu").prompts["query"] == "query: "
    said = capsys.readouterr().out
    assert "e5-base holds no prompts; those of its family are saved" in said and "'query': 'query: '" in said and " in e5-base, {} in mine; the mix has the first" in said


def test_names_on_the_hub(tmp_path, monkeypatch):
    "A name becomes a folder, without other formats of its weights, and its family's prompts are kept; what cannot be had is said."
    import huggingface_hub
    first, second = saved([tiny_model(), tiny_model(seed=1)], tmp_path)
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **more: asked.append((name, more["allow_patterns"])) or first)
    out = nt.mix_models_by_layers(["intfloat/e5-base-v2", second], [0.5, 0.5], tmp_path / "mix")
    assert asked[0][0] == "intfloat/e5-base-v2" and "*.safetensors" in asked[0][1] and "*.bin" not in asked[0][1]
    assert SentenceTransformer(str(out), device="cpu").prompts["document"] == "passage: "
    def offline(name, **more): raise OSError("no network")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(InputError, match="intfloat/e5-base-v2: cannot be had from the Hub"): nt.mix_models_by_layers(["intfloat/e5-base-v2", second], None, tmp_path / "mix")


def test_differences_are_said(tmp_path, capsys):
    first, second = tiny_model(pooling="cls", prompts={"query": "q: "}), tiny_model(seed=1, length=64)
    del second[2]
    expected = ["prompts: {'query': 'q: '}", "pooling: cls", "normalisation: yes", "maximum length: 128"]
    nt.mix_models([first, second])
    in_memory = capsys.readouterr().out
    nt.mix_models_by_layers(saved([first, second], tmp_path), None, tmp_path / "mix")
    on_disk = capsys.readouterr().out
    for line in expected: assert line in in_memory and line in on_disk
    nt.mix_models([first, moved(first, 1)])
    assert not capsys.readouterr().out


def test_shards(tmp_path):
    "A sharded first model gives a sharded result; sharded others are read as well."
    models = three(head=False)
    expected, folders = direct(models, [0.2, 0.3, 0.5]), saved(models, tmp_path)
    for i, size in ((0, "20KB"), (2, "30KB")):
        (folders[i] / "model.safetensors").unlink()
        models[i][0].auto_model.save_pretrained(str(folders[i]), max_shard_size=size)
    out = nt.mix_models_by_layers(folders, [0.2, 0.3, 0.5], tmp_path / "mix")
    assert len([*out.glob("model-*.safetensors")]) > 3 and agrees(SentenceTransformer(str(out), device="cpu"), expected)


def test_heads_of_bge_m3(tmp_path, capsys):
    "Files of torch beside the transformer are mixed on disk; what only one model has is left out, in words."
    models = three(head=False)[:2]
    folders, rng = saved(models, tmp_path), torch.Generator().manual_seed(0)
    heads = [{"weight": torch.randn(1, 32, generator=rng), "bias": torch.randn(1, generator=rng)} for _ in folders]
    for folder, head in zip(folders, heads): torch.save(head, folder / "sparse_linear.pt")
    torch.save(heads[0], folders[0] / "colbert_linear.pt")
    out = nt.mix_models_by_layers(folders, [0.3, 0.7], tmp_path / "mix")
    found = torch.load(out / "sparse_linear.pt", weights_only=True)
    assert all((found[name] - 0.3 * heads[0][name] - 0.7 * heads[1][name]).abs().max() < 1e-6 for name in ("weight", "bias"))
    assert not (out / "colbert_linear.pt").exists() and "colbert_linear.pt is in base, not in first: left out" in capsys.readouterr().out
    nt.mix_models(folders, [0.3, 0.7])
    assert "sparse_linear.pt, colbert_linear.pt of" in capsys.readouterr().out


class Runs:
    def __reduce__(self): return os.system, ("touch ran",)


def test_heads_run_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = saved(three(head=False)[:2], tmp_path)
    for folder in folders: torch.save({"weight": Runs()}, folder / "sparse_linear.pt")
    with pytest.raises(Exception, match="(?i)weights.?only"): nt.mix_models_by_layers(folders, None, tmp_path / "mix")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "mix").exists()


def test_adapters_of_one_base(tmp_path):
    "Folders of adapters alone: the base and each one's share of its difference, rows of special tokens included; the factors are not mixed."
    nt.tiny_model("gemma2").save_pretrained(str(tmp_path / "base"))
    def learned(seed):
        model, rng = add_lora(nt.load_encoder(tmp_path / "base"), rank=2, tokens=["<query>"], seed=seed), torch.Generator().manual_seed(seed)
        for o in model.parameters():
            if o.requires_grad: o.data += 0.2*torch.randn(o.shape, generator=rng)
        return model
    models = [learned(seed) for seed in (1, 2)]
    folders = [save_adapter(o, tmp_path / f"adapter{i}") for i, o in enumerate(models)]
    base, one, two = (dict(o.named_parameters()) for o in (nt.load_encoder(tmp_path / "base"), *(nt.merge_adapter(o) for o in models)))
    for mixed in (nt.mix_models(folders, [0.3, 0.7]), nt.mix_models(folders, [0.3, 0.7], tmp_path / "mix")):
        for name, o in mixed.named_parameters():
            n = len(base[name])  # rows of the base; the new one has no difference from it
            assert torch.allclose(o[:n], base[name] + 0.3*(one[name][:n] - base[name]) + 0.7*(two[name][:n] - base[name]), atol=1e-5), name
            assert torch.allclose(o, 0.3*one[name] + 0.7*two[name], atol=1e-5), name


def test_adapters_are_merged_first(tmp_path):
    "A loaded model with an adapter, and a folder of one: both as if they had been merged by hand."
    base = tiny_model()
    base.save_pretrained(str(tmp_path / "base"))
    base = nt.load_encoder(str(tmp_path / "base"))
    tuned = add_lora(deepcopy(base), rank=4)
    for o in tuned.parameters():
        if o.requires_grad: o.data += 0.2 * torch.randn(o.shape, generator=torch.Generator().manual_seed(o.numel()))
    save_adapter(tuned, tmp_path / "adapter")
    merged = nt.merge_adapter(deepcopy(tuned))
    expected = direct([base, merged], [0.3, 0.7])
    assert not agrees(base, direct([merged], [1]), 1e-2)
    for models in ([base, tuned], [tmp_path / "base", tmp_path / "adapter"]): assert agrees(nt.mix_models(models, [0.3, 0.7]), expected)
    assert agrees(nt.mix_models([tmp_path / "base", tmp_path / "adapter"], [0.3, 0.7], tmp_path / "mix"), expected)
    assert any("lora" in name for name, _ in tuned.named_parameters())  # the given model is as it was


def cross_encoder(folder, seed):
    "A tiny reranker, as transformers saves it."
    from transformers import BertConfig, BertForSequenceClassification
    torch.manual_seed(seed)
    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=1)
    BertForSequenceClassification(config).save_pretrained(str(folder))
    return folder


def test_rerankers_and_decoders(tmp_path):
    from transformers import Qwen3Config, Qwen3ForCausalLM
    folders = [cross_encoder(tmp_path / str(i), i) for i in range(2)]
    model = nt.mix_models(folders, [0.3, 0.7], model_type="reranker")
    states = [load_file(o / "model.safetensors") for o in folders]
    for name, o in model.state_dict().items(): assert (o - 0.3 * states[0][name] - 0.7 * states[1][name]).abs().max() < 1e-6
    with pytest.raises(InputError, match="holds a BertForSequenceClassification"): nt.mix_models(folders, model_type="decoder")
    with pytest.raises(InputError, match="no modules.json"): nt.mix_models(folders, output_path=tmp_path / "mix")
    config = Qwen3Config(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=8, intermediate_size=16, tie_word_embeddings=True)
    for i in range(2): Qwen3ForCausalLM(config).save_pretrained(str(tmp_path / f"decoder{i}"))
    decoder = nt.mix_models([tmp_path / "decoder0", tmp_path / "decoder1"], model_type="decoder")
    assert decoder.lm_head.weight is decoder.model.embed_tokens.weight  # saved once, mixed once, tied again
    name = "model.embed_tokens.weight"
    expected = sum(load_file(tmp_path / f"decoder{i}/model.safetensors")[name] for i in range(2)) / 2
    assert (decoder.state_dict()[name] - expected).abs().max() < 1e-6


def test_names_of_lm_cocktail(tmp_path):
    "The calls of its manual, word for word but for the models."
    models, examples = three(), [{"query": "winged one", "pos": ["a red bird"], "neg": ["a blue fish", "an old cat"]}, {"query": "swimmer", "pos": ["a fish"], "neg": ["a cat", "a horse"]}]
    folders = [str(o) for o in saved(models, tmp_path)]
    mixed = nt.mix_models(model_names_or_paths=folders, model_type="encoder", weights=[0.5, 0.3, 0.2], output_path=str(tmp_path / "a"))
    assert agrees(mixed, direct(models, [0.5, 0.3, 0.2])) and (tmp_path / "a/modules.json").is_file()
    nt.mix_models_by_layers(model_names_or_paths=folders, model_type="encoder", weights=[0.5, 0.3, 0.2], output_path=str(tmp_path / "b"))
    by_data = nt.mix_models_with_data(model_names_or_paths=folders, model_type="encoder", example_data=examples, temperature=5.0, max_input_length=512, neg_number=2, output_path=str(tmp_path / "c"))
    assert agrees(SentenceTransformer(str(tmp_path / "c"), device="cpu"), {name: o.double() for name, o in by_data.state_dict().items()})


# ---- what is refused

def test_weights_are_checked(tmp_path):
    models = three()
    folders = saved(models, tmp_path)
    wrong = [([0.3, 0.3, 0.3], "sum to 0.9"), ([0.4, 0.4, 0.4], "sum to 1.2"), ([0.5, 0.5], "2 weights for 3 models"), ([1.5, -0.5, 0], "a weight of -0.5"),
             ([0.5, 0.5, float("nan")], "a weight of nan"), ([True, False, False], "a weight of True"), ("encoder", "weights='encoder'"), (0.5, "weights=0.5")]
    for weights, what in wrong:
        for mix in (lambda: nt.mix_models(models, weights), lambda: nt.mix_models_by_layers(folders, weights, tmp_path / "mix")):
            with pytest.raises(InputError, match=what): mix()
    assert not (tmp_path / "mix").exists()
    assert agrees(nt.mix_models(models), direct(models, [1 / 3] * 3)) and agrees(nt.mix_models(models, np.array([0.2, 0.3, 0.5])), direct(models, [0.2, 0.3, 0.5]))


@pytest.mark.parametrize("what, match", [
    (dict(models=None), "no models"), (dict(models="base"), "is no list"), (dict(models=[tiny_model()]), r"1 model\(s\) to mix"),
    (dict(models=[tiny_model(), 3]), "a int"), (dict(models=[tiny_model()] * 2, method="ties"), "method='ties'"),
    (dict(models=[tiny_model()] * 2, model_type="encoder-decoder"), "model_type='encoder-decoder'"),
    (dict(models=[tiny_model()] * 2, model_names_or_paths=["a", "b"]), "models and model_names_or_paths"),
    (dict(models=["./nowhere", "./nobody"]), "no such folder"), (dict(models=["./nowhere", "./nobody"], output_path="out"), "no such folder"),
    (dict(models=[tiny_model()] * 2, model_type="decoder"), "a loaded model"),
])
def test_arguments_are_checked(what, match, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=match): nt.mix_models(**what)
    assert not [*tmp_path.glob("*")]


def test_other_architectures(tmp_path):
    "One error each, which names the tensor and both models."
    base = tiny_model()
    others = {"shape": (tiny_model(intermediate_size=32), r"intermediate.dense.(weight|bias) has shape \[64.*\] in {0} and \[32.*\] in {1}"),
              "layers": (tiny_model(num_hidden_layers=3), r"encoder.layer.2\S+ is in {1}, not in {0}"), "family": (tiny_model("roberta"), "model_type is 'bert' in {0} and 'roberta' in {1}"),
              "attention": (tiny_model(num_attention_heads=2), "num_attention_heads is 4 in {0} and 2 in {1}"), "head": (add_head(tiny_model(), 16), r"2\S*linear.bias is in {1}, not in {0}")}
    base.save_pretrained(str(tmp_path / "base"))
    for name, (model, match) in others.items():
        model.save_pretrained(str(tmp_path / name))
        with pytest.raises(InputError, match=match.format("model 1", "model 2")): nt.mix_models([base, model])
        with pytest.raises(InputError, match=match.format("base", name)): nt.mix_models_by_layers([tmp_path / "base", tmp_path / name], None, tmp_path / "mix")
        assert not (tmp_path / "mix").exists()


def test_other_vocabularies(tmp_path):
    "Of another size, and of the same size in another order, which the shapes do not show."
    base, longer, swapped = tiny_model(), tiny_model(), tiny_model()
    longer[0].tokenizer.add_tokens(["[NEW]"])
    longer[0].auto_model.resize_token_embeddings(len(longer[0].tokenizer))
    folders = saved([base, longer, swapped], tmp_path)
    text = (folders[2] / "tokenizer.json").read_text()
    vocabulary = json.loads(text)
    words = vocabulary["model"]["vocab"]
    words["bird"], words["fish"] = words["fish"], words["bird"]
    (folders[2] / "tokenizer.json").write_text(json.dumps(vocabulary))
    for other, match in ((1, "vocabularies differ: [0-9]+ tokens in base, [0-9]+ in first"), (2, "'(bird|fish)' has number [0-9]+ in base, [0-9]+ in second")):
        for path in (None, tmp_path / "mix"):
            with pytest.raises(InputError, match=match): nt.mix_models([folders[0], folders[other]], output_path=path)


def test_whole_numbers(tmp_path, capsys):
    "Equal or refused; positions that only an old checkpoint holds may be missing elsewhere."
    models = three(head=False)[:2]
    folders = saved(models, tmp_path)
    edited(folders[0], lambda o: o.update(position_ids=torch.arange(5)))
    for i in (0, 1):
        out = nt.mix_models_by_layers([folders[i], folders[1 - i]], None, tmp_path / "mix")
        assert ("position_ids" in TensorFiles(out)) is (i == 0)
        assert f"position_ids, whole numbers, is in base, not in first: {'left out' if i else 'kept'}" in capsys.readouterr().out
    edited(folders[1], lambda o: o.update(position_ids=torch.arange(5)))
    assert TensorFiles(nt.mix_models_by_layers(folders, None, tmp_path / "mix"))["position_ids"].tolist() == [0, 1, 2, 3, 4]
    edited(folders[1], lambda o: o.update(position_ids=torch.arange(1, 6)))
    with pytest.raises(InputError, match="position_ids, which holds int64, differs between base and first"): nt.mix_models_by_layers(folders, None, tmp_path / "mix")
    edited(folders[1], lambda o: o.update(position_ids=torch.ones(5)))
    with pytest.raises(InputError, match="position_ids"): nt.mix_models_by_layers(folders[::-1], None, tmp_path / "mix")


def test_tied_weights():
    "One tensor under two names is mixed once, and stays one."
    models = three()[:2]
    for o in models: o[2].linear.tied = o[2].linear.weight
    mixed = nt.mix_models(models, [0.3, 0.7])
    assert mixed[2].linear.tied is mixed[2].linear.weight and agrees(mixed, direct(models, [0.3, 0.7]))
    models[1][2].linear.tied = torch.nn.Parameter(models[1][2].linear.weight + 1)
    with pytest.raises(InputError, match="are one tensor in model 1, and differ in model 2"): nt.mix_models(models)


def test_broken_folders(tmp_path):
    folders = saved(three(head=False)[:2], tmp_path)
    file = folders[1] / "model.safetensors"
    whole = file.read_bytes()
    for content, match in ((b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is no safetensors file"), (whole[:-100], "ends before")):
        file.write_bytes(content)
        with pytest.raises(InputError, match=match): nt.mix_models_by_layers(folders, None, tmp_path / "mix")
    file.rename(folders[1] / "pytorch_model.bin")
    with pytest.raises(InputError, match="pytorch_model.bin without safetensors"): nt.mix_models_by_layers(folders, None, tmp_path / "mix")
    with pytest.raises(InputError, match="no output_path"): nt.mix_models_by_layers(folders)
    assert not (tmp_path / "mix").exists()


# ---- memory

LIMITED = """
import resource, sys
import torch
from nixietune.merging import mix_models_by_layers
def used(): return int(next(o for o in open("/proc/self/status") if o.startswith("VmData")).split()[1])*1024
folder, tensor = sys.argv[1], int(sys.argv[2])
mix_models_by_layers([f"{folder}/small0", f"{folder}/small1"], [.5, .5], f"{folder}/warm")  # whatever is imported and kept is there now
resource.setrlimit(resource.RLIMIT_DATA, (used() + 5*tensor//2, resource.RLIM_INFINITY))
mix_models_by_layers([f"{folder}/{i}" for i in range(4)], [.1, .2, .3, .4], f"{folder}/mix")
print("mixed")
try: three = [torch.ones(tensor//4) for _ in range(3)]
except RuntimeError: print("three do not fit")
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_of_two_tensors(tmp_path):
    "A process that has room for two and a half tensors mixes four models of sixteen each."
    size, names = 2**21, [f"t{i}" for i in range(16)]
    tensors = {str(i): torch.full((size,), float(i)) for i in range(4)} | {f"small{i}": torch.full((8,), float(i)) for i in range(2)}
    for folder, o in tensors.items():
        (tmp_path / folder).mkdir()
        save_file({name: o.clone() for name in names}, tmp_path / folder / "model.safetensors", metadata={"format": "pt"})
        (tmp_path / folder / "modules.json").write_text(json.dumps([{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]))
    done = subprocess.run([sys.executable, "-c", LIMITED, str(tmp_path), str(4 * size)], capture_output=True, text=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "1000000"})  # what is freed is given back at once
    assert done.stdout.split("\n")[:2] == ["mixed", "three do not fit"], done.stderr[-3000:]
    found = TensorFiles(tmp_path / "mix")
    assert len(found) == 16 and all(torch.allclose(found[name], torch.tensor(0.2 + 0.6 + 1.2)) for name in ("t0", "t15"))


# ---- shares from examples

def by_hand(model, rows, batch_size, temperature=0.05):
    "LM-Cocktail's loss for encoders: rows of (query, positive, negatives), targets at i*(1 + negatives), all documents of the batch."
    total = 0.0
    for start in range(0, len(rows), batch_size):
        batch = rows[start:start + batch_size]
        q = torch.tensor(encode(model, [o[0] for o in batch], "query", progress=False))
        d = torch.tensor(encode(model, [doc for _, pos, neg in batch for doc in (pos, *neg)], progress=False))
        q, d = (torch.nn.functional.normalize(o, dim=-1) for o in (q, d))
        target = torch.arange(len(batch)) * (1 + len(batch[0][2]))
        total += float(torch.nn.functional.cross_entropy(q @ d.T / temperature, target, reduction="sum"))
    return total / len(rows)


def test_loss_and_weights_of_the_paper():
    "With the model's own pooling and prompts: the published loss, and softmax(-loss/temperature)."
    models, animals = three(), ["bird", "fish", "horse", "cat", "sea", "wood", "town", "old"]
    rows = [(f"red {a}", f"a {a} that lives near the {b}", [f"a {a} near", f"{b} small", f"{b} {a} green"]) for a, b in zip(animals, animals[1:])]
    groups = nt.make_groups([{"query": q, "pos": [p, "not looked at"], "neg": n} for q, p, n in rows], source="rows")
    losses = [example_loss(model, groups, 2, 3) for model in models]
    assert np.abs(np.array(losses) - [by_hand(model, rows, 2) for model in models]).max() < 1e-5
    weights = np.exp(-np.array(losses) / 0.5)
    assert np.abs(weights_from_losses(losses, 0.5) - weights / weights.sum()).max() < 1e-12
    assert agrees(nt.mix_models_with_data(models, groups, temperature=0.5, neg_number=3), direct(models, weights / weights.sum()))
    assert weights_from_losses([1.0, 2.0], 1e-3)[0] > 0.999 and abs(weights_from_losses([1.0, 2.0], 1e6)[0] - 0.5) < 1e-6


def test_examples():
    "The same negatives for all models and every time; lengths are put back; what is said is said once; wrong ones are refused."
    model, groups = tiny_model(), toy_groups(6, negatives=4)
    assert example_loss(model, groups, neg_number=2) == example_loss(deepcopy(model), groups, neg_number=2) != example_loss(model, groups, neg_number=2, seed=3)
    model.max_seq_length = 16
    same = nt.mix_models_with_data([model, model], groups, max_input_length=3)
    assert model.max_seq_length == same.max_seq_length == 16 and model[0].query_length is None
    for wrong, what in ((dict(groups=None), "no examples"), (dict(groups=groups, example_data=groups), "groups and example_data"), (dict(groups=groups, temperature=0), "temperature is 0"),
                        (dict(groups=groups, model_type="decoder"), "model_type='decoder'")):
        with pytest.raises(InputError, match=what): nt.mix_models_with_data([model, model], **wrong)
    with pytest.raises(InputError, match="a loss of nan"): weights_from_losses([1.0, float("nan")])


def test_too_few_negatives_are_said(capsys):
    nt.mix_models_with_data([tiny_model(), tiny_model(seed=1)], toy_groups(6, negatives=1))
    assert capsys.readouterr().out.count("every group has 1 of its own negatives; at most 7") == 1


# ---- the sweep

def test_sweep():
    "Its ends are the models; the best is by the rule; the model that comes out is the best one; the given ones are as they were."
    base, tuned, corpus = tiny_model(), moved(tiny_model(), 1), toy_corpus()
    target, probe = toy_groups(40, seed=1), toy_groups(30, seed=2)
    sweep = nt.merge_sweep(base, tuned, (0.5, 1, 0.25), (target, corpus), {"other": (probe, corpus)}, floor=0.005)
    assert [o["share"] for o in sweep.rows] == [0, 0.25, 0.5, 1]
    measured = lambda model, groups: nt.evaluate(model, groups, corpus, progress=False).metrics["ndcg@10"]
    for row, model in zip((sweep.rows[0], sweep.rows[-1]), (base, tuned)):
        assert abs(row["target"] - measured(model, target)) < 1e-9 and abs(row["other"] - measured(model, probe)) < 1e-9
    kept = [o for o in sweep.rows if o["other"] >= sweep.rows[0]["other"] - 0.005 - 1e-9]
    best = next(o for o in sweep.rows if o["share"] == sweep.best)
    assert best in kept and best["target"] == max(o["target"] for o in kept)
    assert agrees(sweep.model, direct([base, tuned], [1 - sweep.best, sweep.best])) and measured(sweep.model, target) == pytest.approx(best["target"], abs=1e-9)
    assert not agrees(base, direct([tuned], [1]), 1e-3)
    assert "best" in repr(sweep) and "nDCG@10" in sweep._repr_html_() and json.loads(json.dumps(sweep.summary()))["best"] == sweep.best
    ax = sweep.plot()
    assert [o.get_text() for o in ax.get_legend().get_texts()] == ["target", "other"] and ax._repr_png_().startswith(b"\x89PNG")


def test_sweep_keeps_the_floor():
    "A tuned model that is better on the target and worse on the probe wins with a low floor only."
    corpus, groups, others = toy_corpus(), toy_groups(40, seed=1), toy_groups(40, seed=2)
    models = [moved(tiny_model(), seed) for seed in range(8)]
    scores = [[nt.evaluate(model, o, corpus, progress=False).metrics["ndcg@10"] for o in (groups, others)] for model in models]
    gain, loss, i, j = max(((scores[j][0] - scores[i][0], scores[i][1] - scores[j][1], i, j) for i in range(8) for j in range(8)), key=lambda o: min(o[:2]))
    base, tuned = models[i], models[j]
    assert gain > 0 and loss > 0.001  # or this test would show nothing
    sweep = lambda floor: nt.merge_sweep(base, tuned, (1,), (groups, corpus), {"others": (others, corpus)}, floor=floor)
    assert sweep(loss + 0.001).best == 1 and sweep(loss - 0.001).best == 0


@pytest.mark.parametrize("what, match", [
    (dict(target=None), "target is missing"), (dict(target=toy_groups(4)), "target is no pair"), (dict(alphas=(0, 2)), "alpha=2"), (dict(floor=-1), "floor is -1"),
    (dict(probes={"share": (1, 2)}), "a probe called 'share'"), (dict(method="ties"), "method='ties'"),
])
def test_sweep_is_checked(what, match):
    with pytest.raises(InputError, match=match): nt.merge_sweep(tiny_model(), tiny_model(), **{"target": (toy_groups(4), toy_corpus())} | what)
