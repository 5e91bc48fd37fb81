"What only a GPU can show. Everything but the kernels themselves also runs on the processor, so that the code below is never left untried."
import numpy as np
import pytest
import torch

from nixietune.batching import index_groups, sampler_of, source_of
from nixietune.encoder import encode, layout_of, make_features, plan_forwards, prepare, to_device
from nixietune.index import search
from nixietune.losses import InfoNCE
from nixietune.planning import choose_layout, kept_bytes, layout_rates, plan
from nixietune.testing import tiny_model, toy_corpus, toy_groups
from nixietune.tokens import attention_kernel, tokenize
from nixietune.training import Trainer, TrainingArguments

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
TEXTS = ["a", "one short text", "a rather longer text that says a little more than the others do", "b c", "d e f g h i j k l m n o p"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch): monkeypatch.setenv("NIXIETUNE_CACHE", str(tmp_path / "cache"))


def vectors_and_gradient(model, layout, precision):
    "Of some texts, with dropout off."
    prepare(model, layout)
    kind, dtype = model.device.type, {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision)
    store = tokenize(model, TEXTS, keep=False)
    out = torch.empty(len(TEXTS), model.get_embedding_dimension(), device=model.device)
    with torch.autocast(kind, dtype=dtype, enabled=dtype is not None):
        for here in plan_forwards(layout_of(model), store.lengths, 24):
            found = model(to_device(make_features(layout_of(model), [store[i] for i in here]), model.device))["sentence_embedding"]
            out = out.index_copy(0, torch.as_tensor(here, device=model.device), found.float())
    model.zero_grad()
    out.sin().sum().backward()
    return out.detach(), torch.cat([o.grad.flatten() for o in model.parameters() if o.grad is not None])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["bert", "roberta", "modernbert", "qwen3"])
@pytest.mark.parametrize("precision, close", [("fp32", 1e-4), ("bf16", 4e-2), ("fp16", 4e-2)])
def test_packed_is_padded(device, kind, precision, close):
    "Vectors and gradients, by whatever kernel the device has for them."
    if precision == "fp16" and device == "cpu": pytest.skip("autocast to fp16 is for GPUs")
    if precision == "bf16" and device == "cuda" and torch.cuda.get_device_capability() < (8, 0): pytest.skip("no bf16 before Ampere")
    model = tiny_model(kind).to(device)
    found = {layout: vectors_and_gradient(model, layout, precision) for layout in ("packed", "bucketed", "padded")}
    for layout in ("packed", "bucketed"):
        for one, other in zip(found[layout], found["padded"]): assert (one - other).norm() <= close * other.norm(), layout


@pytest.mark.cuda
def test_the_kernel_for_each_precision():
    device, new = torch.device("cuda"), torch.cuda.get_device_capability() >= (8, 0)
    assert attention_kernel(device, torch.float32) == "jagged"
    assert attention_kernel(device, torch.float16) == ("varlen" if new else "jagged")
    assert attention_kernel(device, torch.float32, causal=True) == "runs"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("cached", [False, True])
def test_trains(device, cached, tmp_path):
    "Learns the toy problem in the precision of the machine; the layout is chosen, memory and speed are logged."
    model = tiny_model().to(device)
    args = TrainingArguments(str(tmp_path / "run"), learning_rate=5e-3, per_device_train_batch_size=16, num_train_epochs=4, seed=1, logging_steps=1,
        cache_gradients=cached, use_cpu=device == "cpu", precision="fp32" if device == "cpu" else "auto", eval_strategy="epoch", dataloader_num_workers=1)
    trainer = Trainer(model, args, toy_groups(64), dev=toy_groups(20, seed=1), corpus=toy_corpus(), loss=InfoNCE(0.1))
    trainer.train()
    scores = [o for _, o in trainer.history.column("eval_ndcg@10")]
    assert scores[-1] > scores[0] + 0.2 and trainer.history.column("memory_gb") and trainer.args.device.type == device


@pytest.mark.parametrize("device", DEVICES)
def test_plan_and_layout(device, tmp_path):
    "Rates of both ways; the plan shows what was measured."
    model, groups = tiny_model().to(device), toy_groups(40)
    args = TrainingArguments(str(tmp_path / "run"), precision="fp32", per_device_train_batch_size=16, use_cpu=device == "cpu")
    source = source_of(model, index_groups(groups, model=model), args)
    [key] = next(iter(sampler_of(source, args)))
    assert min(layout_rates(model, source, key).values()) > 0
    assert "tokens a second" in choose_layout(model, source, args, measure=True)
    assert kept_bytes(model, source[key]["packs"][0]) > 0 and plan(model, groups, args).seconds > 0


@pytest.mark.cuda
def test_encode_on_the_gpu():
    model = tiny_model()
    here = encode(model, TEXTS, progress=False)
    there = encode(model.to("cuda"), TEXTS, progress=False)
    assert abs(here - there).max() < 1e-4


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", ["torch", "faiss"])
@pytest.mark.parametrize("metric", ["cos", "ip", "l2"])
def test_search_gives_the_same_rows(device, backend, metric):
    "On the device, on it and the processor together, and on the processor."
    q, d = (np.random.default_rng(i).standard_normal((n, 48)).astype("float16") for i, n in enumerate((300, 9000)))
    scores, rows = search(q, d, 30, metric, "torch", ["cpu"])
    for devices in ([device], [device, "cpu"]):
        found = search(q, d, 30, metric, backend, devices)
        np.testing.assert_array_equal(found[0], scores)
        np.testing.assert_array_equal(found[1], rows)


@pytest.mark.parametrize("device", DEVICES)
def test_devices_encode_as_one(device):
    "The model stays where it is; its twins compute."
    model, texts = tiny_model(), toy_corpus()["text"]
    expected = encode(model, texts, progress=False)
    np.testing.assert_allclose(encode(model, texts, progress=False, devices=[device, "cpu"]), expected, atol=1e-5)
    assert model.device.type == "cpu"
