"What we lean on in sentence-transformers, transformers, accelerate and torch that their manuals do not promise: when a new version changes it, one of these says what."
import inspect

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers.sentence_transformer.model_card import SentenceTransformerModelCardCallback
from sentence_transformers.sentence_transformer.modules import Pooling, StaticEmbedding
from transformers import AttentionInterface, AttentionMaskInterface, Trainer as TransformersTrainer, TrainerCallback

from nixietune.adapters import add_lora
from nixietune.batching import BatchKey
from nixietune.encoder import prompt_of
from nixietune.losses import InfoNCE
from nixietune.testing import tiny_model, toy_groups
from nixietune.training import Trainer, TrainingArguments

torch.set_num_threads(1)  # tiny tensors: a second thread only waits
PACKED = {"input_ids": torch.tensor([[2, 3, 4, 5, 6]]), "position_ids": torch.tensor([[0, 1, 0, 1, 2]]),
          "cu_seq_lens_q": torch.tensor([0, 2, 5], dtype=torch.int32), "cu_seq_lens_k": torch.tensor([0, 2, 5], dtype=torch.int32),
          "max_length_q": 3, "max_length_k": 3}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch): monkeypatch.setenv("NIXIETUNE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def trainer(tmp_path):
    args = TrainingArguments(str(tmp_path / "run"), learning_rate=1e-3, per_device_train_batch_size=8, num_train_epochs=2, precision="fp32",
                             save_strategy="steps", save_steps=3, logging_steps=1)
    return Trainer(tiny_model(), args, toy_groups(24), loss=InfoNCE(0.1))


def parameters(function): return inspect.signature(function).parameters.keys()


def test_the_first_module():
    "Names on sentence-transformers' Transformer that load_encoder, prepare, set_max_length and recipe use."
    first = tiny_model()[0]
    missing = [o for o in ("auto_model", "tokenizer", "model_forward_params", "query_length", "document_length", "get_config_dict") if not hasattr(first, o)]
    assert missing == [], "Transformer lost these"
    assert first.model_forward_params is None or isinstance(first.model_forward_params, set), "the filter of forward arguments is another type"
    assert first.auto_model.config.model_type == "bert"
    assert hasattr(first.tokenizer.backend_tokenizer, "to_str") and first.tokenizer.padding_side == "right"
    assert {"offsets", "input_ids"} == tiny_model("static").preprocess(["a b", "c"]).keys(), "static embeddings take other features"
    assert isinstance(tiny_model("static")[0], StaticEmbedding) and not hasattr(tiny_model("static")[0], "query_length")


def test_preprocess():
    "`preprocess` takes prompt, task and max_length, pads with a mask, and says how long the prompt is."
    model = tiny_model()
    made = model.preprocess(["a b", "c"], prompt="d e: ", task="query", max_length=5)
    assert {"input_ids", "attention_mask", "prompt_length"} <= made.keys()
    assert made["prompt_length"] == 1 + 3, "the prompt's length does not count [CLS] and no [SEP]"
    assert made["attention_mask"].tolist() == [[1] * 5] * 2, "max_length does not cut"
    for role, length in (("query", 4), ("document", 6)):
        setattr(model[0], f"{role}_length", length)
        assert model.preprocess(["a b c d e f g h"], task=role)["input_ids"].shape[1] == length, f"{role}_length does not cut"
    model.max_seq_length = 7
    assert model.preprocess(["a b c d e f g h"])["input_ids"].shape[1] == 7 and model[0].tokenizer.model_max_length == 7


@pytest.mark.parametrize("prompts", [{"query": "a: "}, {"passage": "b: "}, {"corpus": "c: ", "passage": "b: "}, {"query": "a: ", "document": "d: "},
                                     {"document": "", "passage": "b: "}, {"other": "e: "}], ids=str)
@pytest.mark.parametrize("default", [None, "other"])
def test_which_prompt(prompts, default):
    "`prompt_of` is the choice of `encode_query` and `encode_document`."
    model = tiny_model(prompts=prompts)
    model.default_prompt_name = default if default in model.prompts else None
    for role, encode in (("query", model.encode_query), ("document", model.encode_document)):
        assert np.abs(encode(["a b c"]) - model.encode([prompt_of(model, role) + "a b c"], prompt="")).max() < 1e-6, (role, prompt_of(model, role))


@pytest.mark.parametrize("kind", ["bert", "distilbert", "modernbert", "qwen3"])
def test_borders_reach_the_attention(kind):
    "A registered attention is called by name in every layer, with borders, without a mask, and gives [1, T, heads, d] back."
    seen = []
    def attention(module, query, key, value, attention_mask, **kwargs):
        seen.append((attention_mask, kwargs))
        return torch.zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None
    AttentionInterface.register("contract", attention)
    AttentionMaskInterface.register("contract", lambda *args, attention_mask=None, **kwargs: attention_mask)
    model = tiny_model(kind)
    model[0].auto_model.set_attn_implementation("contract")
    features = model[0](dict(PACKED))
    assert len(seen) == model[0].auto_model.config.num_hidden_layers, "the registered attention is not called in every layer"
    assert features["token_embeddings"].shape == (1, 5, 32)
    for mask, kwargs in seen:
        assert mask is None, "a packed input gets a mask"
        assert torch.equal(kwargs["cu_seq_lens_q"], PACKED["cu_seq_lens_q"]) and kwargs["max_length_q"] == 3, "borders do not arrive"
        assert {"dropout", "scaling"} <= kwargs.keys(), "dropout and scaling go by other names"
    if kind == "modernbert": assert {o[1].get("sliding_window") for o in seen} > {None}, "local attention says nothing of its window"


def test_padded_input_makes_a_mask():
    "The mask function of an attention is asked with `attention_mask`, and `sdpa_mask` and sdpa's forward take what we hand on."
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask
    assert {"batch_size", "q_length", "kv_length", "attention_mask", "mask_function"} <= parameters(sdpa_mask)
    assert {"dropout", "scaling"} <= parameters(sdpa_attention_forward)
    asked = []
    def mask(*args, attention_mask=None, **kwargs):
        asked.append(attention_mask)
        return sdpa_mask(*args, attention_mask=attention_mask, **kwargs)
    AttentionInterface.register("contract-mask", sdpa_attention_forward)
    AttentionMaskInterface.register("contract-mask", mask)
    model = tiny_model()
    features = model.preprocess(["a b c", "d"])
    expected = model(dict(features))["sentence_embedding"]
    model[0].auto_model.set_attn_implementation("contract-mask")
    assert torch.allclose(model(dict(features))["sentence_embedding"], expected, atol=1e-6)
    assert asked and asked[0].shape == (2, 5)


def test_attention_names_are_not_saved(tmp_path):
    model = tiny_model()
    model[0].auto_model.set_attn_implementation("contract-mask" if "contract-mask" in AttentionInterface().valid_keys() else "eager")
    model.save_pretrained(str(tmp_path / "model"))
    assert "contract" not in "".join(o.read_text() for o in (tmp_path / "model").rglob("*.json"))


@pytest.mark.parametrize("mode", ["mean", "cls", "lasttoken", "max", "weightedmean", "mean_sqrt_len_tokens"])
@pytest.mark.parametrize("prompt_length", [0, 1])
def test_pooling_of_packs(mode, prompt_length):
    "Pooling takes `cu_seq_lens_q` and an int `prompt_length`: the same vectors as with a mask."
    tokens = torch.randn(1, 5, 4)
    pooling = Pooling(4, mode, include_prompt=False)
    more = {"prompt_length": prompt_length} if prompt_length else {}
    found = pooling({"token_embeddings": tokens, "cu_seq_lens_q": PACKED["cu_seq_lens_q"], **more})["sentence_embedding"]
    padded = torch.zeros(2, 3, 4)
    padded[0, :2], padded[1] = tokens[0, :2], tokens[0, 2:]
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    expected = pooling({"token_embeddings": padded, "attention_mask": mask, **more})["sentence_embedding"]
    assert torch.allclose(found, expected, atol=1e-6)


def test_the_trainers_doors():
    "Methods that our trainer overrides are still called by these names, with these arguments."
    assert list(parameters(SentenceTransformerTrainer.collect_features)) == ["self", "inputs"]
    assert list(parameters(TransformersTrainer.get_batch_samples)) == ["self", "epoch_iterator", "num_batches", "device"]
    assert list(parameters(SentenceTransformerTrainer.compute_loss)) == ["self", "model", "inputs", "return_outputs", "num_items_in_batch"]
    assert list(parameters(SentenceTransformerTrainer.add_model_card_callback)) == ["self", "default_args_dict"]
    assert TransformersTrainer.loss_is_scaled_for_ga is None, "the switch for losses that are scaled already is gone"
    assert SentenceTransformerModelCardCallback.on_init_end is not TrainerCallback.on_init_end, "the card's examples come from elsewhere"
    assert {"add_tags", "set_losses"} <= set(dir(tiny_model().model_card_data))


def test_how_the_trainer_calls_us(trainer, monkeypatch):
    "Batches reach `collect_features` as they were made; the loss gets (features, labels); queries are counted for each step."
    seen = {"features": [], "totals": [], "rows": []}
    collect, compute = trainer.collect_features, trainer.compute_loss
    def collect_features(inputs):
        assert inputs.keys() == {"packs", "label", "key", "budget"}, "the trainer changed the batch"
        seen["features"].append(inputs["label"]["q_id"].shape[0])
        return collect(inputs)
    def compute_loss(model, inputs, return_outputs=False, num_items_in_batch=None):
        seen["totals"].append(num_items_in_batch)
        return compute(model, inputs, return_outputs, num_items_in_batch)
    monkeypatch.setattr(trainer, "collect_features", collect_features)
    monkeypatch.setattr(trainer, "compute_loss", compute_loss)
    monkeypatch.setattr(trainer.source.__class__, "__getitem__", lambda self, key, get=trainer.source.__class__.__getitem__:
                        (seen["rows"].append(key), get(self, key))[1])
    trainer.train()
    assert seen["features"] == [8] * 6 and seen["totals"] == [8] * 6
    assert all(isinstance(key, BatchKey) for key in seen["rows"]), "keys do not arrive whole"
    epochs = [key.epoch for key in seen["rows"]]
    assert epochs == [0] * 3 + [1] * 3, "set_epoch does not reach the sampler"
    for epoch in (0, 1): assert sorted(i for key in seen["rows"] if key.epoch == epoch for i in key.rows) == list(range(24))


def test_the_objective_is_in_the_optimizer(trainer):
    "The trainer optimises the parameters of its loss module, weight decay and all."
    trainer.loss.objective.extra = torch.nn.Parameter(torch.ones(3))
    held = {id(o) for group in trainer.create_optimizer().param_groups for o in group["params"]}
    assert {id(o) for o in trainer.loss.parameters() if o.requires_grad} <= held


def test_a_checkpoint_ends_with_its_state(trainer, tmp_path):
    "Its seal is the last file of a checkpoint, after transformers' own last one."
    trainer.train()
    files = {o.name: o.stat().st_mtime_ns for o in (tmp_path / "run/checkpoint-3").rglob("*") if o.is_file()}
    assert sorted(files, key=files.get)[-2:] == ["trainer_state.json", "complete.json"]
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth"} <= files.keys()


def test_variable_length_kernel():
    "What the packed path calls on a GPU of the Ampere generation or later."
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    assert list(parameters(varlen.varlen_attn))[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert {"scale", "window_size"} <= parameters(varlen.varlen_attn)


def test_loading_is_by_folder(tmp_path, monkeypatch):
    "A folder loads without a word to a hub, weights in float32 where we ask for it."
    import socket
    tiny_model().half().save_pretrained(str(tmp_path / "model"))
    monkeypatch.setattr(socket.socket, "connect", lambda *args: pytest.fail("asked the network"))
    for dtype in (torch.float32, torch.float16):
        model = SentenceTransformer(str(tmp_path / "model"), device="cpu", model_kwargs={"dtype": dtype})
        assert {o.dtype for o in model.parameters()} == {dtype}


def test_adapters():
    "What `_strip` and `restore_adapter` touch: peft's layers and wrappers, and transformers' notes on them."
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper
    model = add_lora(tiny_model(), rank=2, modules_to_save=["embeddings.LayerNorm"])
    network = model[0].auto_model
    assert network._hf_peft_config_loaded and [*network.peft_config] == model.active_adapters() == ["default"]
    layers = [o for o in network.modules() if isinstance(o, BaseTunerLayer)]
    assert len(layers) == 12 and {type(o.get_base_layer()) for o in layers} == {torch.nn.Linear} and "safe_merge" in parameters(layers[0].merge)
    [saved] = [o for o in network.modules() if isinstance(o, ModulesToSaveWrapper)]
    assert saved.active_adapters == ["default"] and saved.modules_to_save["default"] is not saved.original_module
    assert {o.split(".")[-3] for o, p in network.named_parameters() if p.requires_grad and "modules_to_save" not in o} == {"lora_A", "lora_B"}
    network.delete_adapter("default")
    assert not hasattr(network, "peft_config") and not network._hf_peft_config_loaded
