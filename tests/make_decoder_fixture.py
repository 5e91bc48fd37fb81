"""What FlagEmbedding's decoder-only fine-tuning makes of one small batch: writes `fixtures/decoders.json`, which `test_decoders.py` compares with.

Run it where FlagEmbedding 1.4.2 is installed (it is no requirement of ours): `python tests/make_decoder_fixture.py`.
The weights are made from formulas and the tokenizer from a list of words here, so that the test makes the same ones. The oracle computes in float32: with padding, Gemma 2 in float64 is NaN there.
"""
import json
import math
import sys
import tempfile
import zlib
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import torch

FIXTURE = Path(__file__).parent / "fixtures/decoders.json"
CONFIG = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48, max_position_embeddings=64)
KINDS = {"Qwen2": CONFIG, "Gemma2": CONFIG | dict(head_dim=8, sliding_window=8, query_pre_attn_scalar=16, attn_logit_softcapping=3.0)}
WORDS = "\n : . a that lives near the red blue small old bird fish horse sea town wood Instruct Query Find animal which is asked for crimson azure swimmer winged one steed ocean".split(" ")
TOKENS = ["<instruct>", "<query>"]
FORMATS = ["<instruct>{}\n<query>{}", "Instruct: {}\nQuery: {}"]
INSTRUCTION = "Find the animal which is asked for."
QUERIES = ["crimson winged one", "azure swimmer near the ocean", "steed"]
PASSAGES = [
    ["a small red bird that lives near the wood", "a red fish", "the old bird that lives near the sea"],
    ["a blue fish that lives near the sea", "blue", "a small fish that lives near the town and the unknown"],
    ["an old horse", "a horse that lives near the town . the town is old", "a bird"],
] # of each query, its positive first
TEACHER = [[2.5, 0.5, -1.0], [1.0, 1.25, 0.0], [3.0, -2.0, 2.0]] # the best is not always the positive
TARGETS = ["q_proj", "v_proj", "down_proj"]
RANK, ALPHA = 4, 8


def values(
    name, # of a parameter in the transformer
    shape, # of that parameter
): # f64 of that shape; rows that are added below leave those above as they are
    "A parameter that depends on its name and its shape alone."
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    waves = torch.sin(0.1237*i*i + 0.731*i + zlib.crc32(name.encode()) % 1000).view(shape)
    return waves if "embed_tokens" in name else 0.3*waves


def fill(
    network, # a transformer, or one with LoRA
):
    "Give a transformer the parameters of this test."
    with torch.no_grad():
        for name, o in network.named_parameters(): o.copy_(values(name.removeprefix("base_model.model.").replace(".base_layer", ""), tuple(o.shape)))
    return network


def write_folder(
    kind, # a key of `KINDS`
    folder, # to write
) -> str: # the folder
    "A language model as it comes: weights, and a tokenizer that puts nothing around a text."
    import transformers
    from tokenizers import models, pre_tokenizers, Regex, Tokenizer
    vocabulary = {o: i for i, o in enumerate(["<unk>", "<pad>", "<s>", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|\w+|[^\w\s]"), "removed", invert=True)
    named = dict(bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **named).save_pretrained(folder)
    config = getattr(transformers, f"{kind}Config")(vocab_size=len(vocabulary), pad_token_id=1, bos_token_id=2, eos_token_id=3, **KINDS[kind])
    fill(getattr(transformers, f"{kind}Model")(config)).save_pretrained(folder)
    return str(folder)


def digits(x):
    "Numbers with 7 digits."
    return [digits(o) for o in x] if isinstance(x, (list, tuple)) else float(f"{x:.7g}")


def oracle(folder, tokens):
    "FlagEmbedding's own tokenizer and model, read from a folder, in float32."
    from FlagEmbedding.finetune.embedder.decoder_only.base.runner import DecoderOnlyEmbedderRunner
    from FlagEmbedding.finetune.embedder.decoder_only.base.arguments import DecoderOnlyEmbedderModelArguments
    run = DecoderOnlyEmbedderRunner.__new__(DecoderOnlyEmbedderRunner)
    run.model_args = DecoderOnlyEmbedderModelArguments(model_name_or_path=folder, use_lora=False, additional_special_tokens=tokens)
    run.training_args = SimpleNamespace(output_dir=f"{folder}/out", negatives_cross_device=False, temperature=0.02, sub_batch_size=None, kd_loss_type="kl_div", use_mrl=False, mrl_dims=[],
        sentence_pooling_method="last_token", normalize_embeddings=True, gradient_checkpointing=False, fix_position_embedding=False)
    tokenizer, model = run.load_tokenizer_and_model()
    fill(model.model)
    return tokenizer, model


def batch(tokenizer, texts):
    "As FlagEmbedding's collator makes it."
    return tokenizer.pad(tokenizer(texts, truncation=True, max_length=64, return_tensors=None), padding=True, return_tensors="pt")


def numbers(kind):
    "Vectors in both formats, losses of one step, and vectors with a merged adapter."
    from FlagEmbedding.abc.inference import AbsEmbedder
    from peft import get_peft_model, LoraConfig, TaskType
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for format, tokens in zip(FORMATS, (TOKENS, None)):
            tokenizer, model = oracle(write_folder(kind, folder), tokens)
            queries = [AbsEmbedder.get_detailed_instruct(format, INSTRUCTION, o) for o in QUERIES]
            q, p = batch(tokenizer, queries), batch(tokenizer, sum(PASSAGES, []))
            found[format] = {"ids": tokenizer(queries)["input_ids"], "queries": digits(model.eval().encode(q).tolist()), "passages": digits(model.encode(p).tolist()), "losses": {}}
            model.train()
            for loss in ("kl_div", "m3_kd_loss"):
                model.kd_loss_type = loss
                found[format]["losses"][loss] = digits(model(q, p, teacher_scores=sum(TEACHER, [])).loss.item())
            found[format]["losses"]["none"] = digits(model(q, p).loss.item())
        lora = LoraConfig(task_type=TaskType.FEATURE_EXTRACTION, inference_mode=False, r=RANK, target_modules=TARGETS, lora_alpha=ALPHA, lora_dropout=0.1)
        model.model = fill(get_peft_model(model.model, lora)).merge_and_unload()
        found["merged"] = digits(model.eval().encode(q).tolist())
    return found


def main():
    versions = {o: version(o) for o in ("FlagEmbedding", "torch", "transformers", "peft")}
    with torch.no_grad(): found = {kind: numbers(kind) for kind in KINDS}
    FIXTURE.write_text(json.dumps({"made by": "python tests/make_decoder_fixture.py", "versions": versions} | found) + "\n")


if __name__ == "__main__": sys.exit(main())
