"""What FlagEmbedding's own fine-tuning model makes of one small batch: writes `fixtures/m3.json`, which `test_m3.py` compares with.

Run it where FlagEmbedding 1.4.2 is installed (it is no requirement of ours): `python tests/make_m3_fixture.py`.
The batch and the weights are made from formulas here, so that the test makes the same ones. The oracle computes in float64.
"""
import json
import math
import sys
import zlib
from importlib.metadata import version
from pathlib import Path

import torch

FIXTURE = Path(__file__).parent / "fixtures/m3.json"
CONFIG = dict(vocab_size=126, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, max_position_embeddings=64,
    hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, pad_token_id=1, type_vocab_size=2, layer_norm_eps=1e-12)
CLS, PAD, UNK, EOS, COLBERT, BIAS = 0, 1, 2, 3, 16, -1.4 # ids as in the tokenizer of `tiny_model("xlm-roberta")`; length of a multi-vector; with it, relu lets some weights through
QUERIES = [[27, 7], [6, 32, 24, 35, 6], [14, UNK, 31], [19, 37]] # words between CLS and EOS; some twice, some unknown
PASSAGES = [
    [[27, 7, 22, 23, 34, 28], [9, 7, 22, 37], [27, 16, 24]],
    [[6, 32, 14], [29, 9, 16, 33, 22, 23, 34, 28, 6], [32, 32, 24]],
    [[31, 14, UNK], [UNK], [14, 39, 36, 19, 31, 14, 7]],
    [[19], [21, 37, 19, 33, 22, 23, 34, 39], [10, 19, 35]],
] # of each query, its positive first
TEACHER = [[2.5, 0.5, -1.0], [1.0, 1.25, 0.0], [3.0, -2.0, 2.0], [0.5, 0.0, 0.75]] # the best is not always the positive
WATCHED = ("model.embeddings.word_embeddings.weight", "model.encoder.layer.0.attention.self.query.weight", "sparse_linear.weight", "sparse_linear.bias",
    "colbert_linear.weight", "colbert_linear.bias") # whose gradients are written down


def values(
    name, # of a parameter, as in FlagEmbedding: "model.embeddings...", "sparse_linear.bias"
    shape, # of that parameter
): # f64 of that shape
    "A parameter that depends on its name and its shape alone."
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    waves = torch.sin(0.1237*i*i + 0.731*i + zlib.crc32(name.encode()) % 1000).view(shape)
    if "LayerNorm" in name: return (1.0 if name.endswith("weight") else 0.0) + 0.1*waves
    if name == "sparse_linear.bias": return torch.full(shape, BIAS, dtype=torch.float64)
    return (1.0 if "word_embeddings" in name else 0.2)*waves


def fill(
    module, # any module
    prefix, # before the names of its parameters
):
    "Give a module the parameters of this test."
    with torch.no_grad():
        for name, o in module.named_parameters(): o.copy_(values(f"{prefix}.{name}", tuple(o.shape)))
    return module


def padded(
    rows, # lists of ids of words
): # input_ids and attention_mask
    "Texts with their ends, padded on the right."
    rows = [torch.tensor([CLS, *row, EOS]) for row in rows]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
    return {"input_ids": ids, "attention_mask": (ids != PAD).long()}


class Tokenizer:
    "What FlagEmbedding's model asks of a tokenizer."
    cls_token_id, pad_token_id, unk_token_id, eos_token_id, padding_side = CLS, PAD, UNK, EOS, "right"


def oracle(**options):
    "FlagEmbedding's model for training, in float64."
    from FlagEmbedding.finetune.embedder.encoder_only.m3.modeling import EncoderOnlyEmbedderM3Model
    from transformers import XLMRobertaConfig, XLMRobertaModel
    parts = {"model": XLMRobertaModel(XLMRobertaConfig(**CONFIG)), "colbert_linear": torch.nn.Linear(32, COLBERT), "sparse_linear": torch.nn.Linear(32, 1)}
    parts = {name: fill(o.double(), name) for name, o in parts.items()}
    return EncoderOnlyEmbedderM3Model(parts, tokenizer=Tokenizer(), sentence_pooling_method="cls", normalize_embeddings=True, unified_finetuning=True, **options).train()


def digits(x):
    "Numbers with 7 digits."
    return [digits(o) for o in x] if isinstance(x, (list, tuple)) else float(f"{x:.7g}")


def scores():
    "The four matrices, at temperature 1; and that this batch keeps clear of what FlagEmbedding does with padding."
    model, q, p = oracle(temperature=1.0), padded(QUERIES), padded(sum(PASSAGES, []))
    with torch.no_grad():
        (q_dense, q_sparse, q_colbert), (p_dense, p_sparse, p_colbert) = model.encode(q), model.encode(p)
        found = {"dense": model.compute_dense_score(q_dense, p_dense), "sparse": model.compute_sparse_score(q_sparse, p_sparse),
            "colbert": model.compute_colbert_score(q_colbert, p_colbert, q_mask=q["attention_mask"])}
        found["ensemble"] = model.ensemble_score(q_dense, p_dense, *(found[o] for o in ("dense", "sparse", "colbert")))
        tokens = torch.einsum("qin,pjn->qipj", q_colbert, p_colbert).masked_fill(~p["attention_mask"][:, 1:].bool(), -torch.inf)
        best = tokens.amax(-1)[q["attention_mask"][:, 1:].bool()]
        weights = model.sparse_linear(model.model(**p).last_hidden_state)[(p["input_ids"] > EOS)]
    assert best.min() > 0.01, f"{best.min()}: vectors of padding are 0, and would be the best token"
    assert 0.2 < (weights > 0).double().mean() < 0.8, "relu leaves some weights and takes others"
    assert 0.1 < (found["sparse"] > 0).double().mean() < 0.8, "some texts share a token that counts"
    return {name: digits(o.tolist()) for name, o in found.items()}


def loss(forwards=1, queries=4, teacher=False, alone=False, **options):
    "The loss of each of some forwards in a row, and the lengths of the gradients of the last one."
    model, found = oracle(**options), []
    for _ in range(forwards):
        model.zero_grad()
        out = model(padded(QUERIES[:queries]), padded(sum(PASSAGES[:queries], [])), teacher_scores=sum(TEACHER, []) if teacher else None, no_in_batch_neg_flag=alone)
        out.loss.backward()
        found.append(out.loss.item())
    named = dict(model.named_parameters())
    return {"losses": digits(found), "gradients": digits([named[name].grad.norm().item() for name in WATCHED])}


KINDS = {"contrast": {}, "kl_div": dict(teacher=True, kd_loss_type="kl_div"), "m3_kd_loss": dict(teacher=True, kd_loss_type="m3_kd_loss")}


def main():
    matrices = scores()
    runs = {f"{kind} {temperature}{' self-distilled' if taught else ''}": loss(temperature=temperature, use_self_distill=taught, **more)
        for kind, more in KINDS.items() for temperature in (0.02, 0.1) for taught in (False, True)}
    runs["from the second step on"] = loss(2, temperature=0.1, use_self_distill=True, self_distill_start_step=0)
    runs["own passages only"] = loss(queries=3, alone=True, temperature=0.1)  # no more queries than passages each: with 4, FlagEmbedding ends in an IndexError
    versions = {o: version(o) for o in ("FlagEmbedding", "torch", "transformers")}
    FIXTURE.parent.mkdir(exist_ok=True)
    head = {"made by": "python tests/make_m3_fixture.py", "versions": versions, "watched": list(WATCHED)}
    lines = [f"{json.dumps(name)}: {json.dumps(o)}" for name, o in (head | matrices).items()]
    lines.append('"runs": {\n' + ",\n".join(f"  {json.dumps(name)}: {json.dumps(o)}" for name, o in runs.items()) + "\n}")
    FIXTURE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__": sys.exit(main())
