"""What FlagEmbedding's own code reads and computes with in-context examples: writes `fixtures/icl.json`, which `test_icl.py` compares with.

Run it where FlagEmbedding 1.4.2 is installed (it is no requirement of ours): `python tests/make_icl_fixture.py`.
The tokenizer and the weights are made here from formulas, so that the test makes the same ones.
"""
import json
import math
import random
import sys
import tempfile
import zlib
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import torch

FIXTURE = Path(__file__).parent / "fixtures/icl.json"
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<instruct>", "<query>", "<response>"]
MERGES = [("Ċ", "Ċ"), (".", "ĊĊ"), ("h", "e"), ("Ġ", "t"), ("i", "n"), ("Ã", "©")] # a full stop and a blank line become one token, as in large vocabularies
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+" # Qwen's
CONFIG = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64, max_position_embeddings=2048, pad_token_id=0, bos_token_id=1, eos_token_id=2)
FORMAT, SUFFIX = "<instruct>{}\n<query>{}", "\n<response>"
FIND, SAME = "Given a question, retrieve what answers it.", "Find texts of the same topic."
ROWS = [
    {"query": "what eats fish?", "pos": ["The heron eats fish in the reeds."], "neg": ["A cow eats grass."], "prompt": FIND},
    {"query": "how far is the moon", "pos": ["About 384,400 kilometres."], "neg": ["It is made of rock."], "prompt": FIND},
    {"query": "who wrote Emma", "pos": ["Jane Austen wrote it in 1815."], "neg": ["Emma is a name."], "prompt": FIND},
    {"query": "where is the heart", "pos": ["In the chest, a little to the left."], "neg": ["It beats."], "prompt": FIND},
]
CLUSTERS = [o | {"type": "symmetric_clustering", "prompt": SAME, "category": name} for o, name in zip(ROWS, ("animals", "space", "books", "animals"))]
EXAMPLES = [{"instruct": FIND, "query": "what is a heron", "response": "A bird that eats fish."}, {"instruct": FIND, "query": "what is snow", "response": "Frozen water."}]
CASES = { # name -> (rows, arguments, draws: how many examples and in which order the batch is sampled, query by query)
    "all fit": (ROWS, dict(query_max_len=1400), [(2, [1, 2, 3]), (3, [0, 1, 2, 3]), (0, []), (5, [2, 0, 3, 1])]),
    "examples are cut": (ROWS, dict(query_max_len=1400, example_query_max_len=40, example_passage_max_len=9), [(2, [1, 2, 3]), (1, [3, 2]), (2, [0, 1, 3]), (1, [3, 0])]),
    "a query is cut": ([ROWS[0] | {"query": "what eats fish " * 20}, *ROWS[1:]], dict(query_max_len=160), [(0, [])] * 4),
    "clusters": (CLUSTERS, dict(query_max_len=1400), [(1, [2, 1]), (2, [3, 0, 2]), (1, [0, 1]), (3, [0, 1, 2, 3])]),
    "at 512 there is none": (ROWS, dict(query_max_len=512), [(2, [1, 2, 3])] * 4),
    "half a letter": ([o | {"query": o["query"] + " 日本"} for o in ROWS], dict(query_max_len=1400, example_query_max_len=62), [(2, [1, 2, 3]), (0, []), (0, []), (0, [])]),
}


def tokenizer():
    "Bytes and a few merges, split as Qwen splits; `<s>` before and `</s>` behind every text."
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    words = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in MERGES)]
    made = Tokenizer(models.BPE(vocab={o: i for i, o in enumerate(words)}, merges=MERGES, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SPLIT), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(o, special=True, normalized=False) for o in SPECIAL])
    made.post_processor = processors.TemplateProcessing("<s> $A </s>", "<s> $A $B </s>", [("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>", model_max_length=2048, padding_side="left",
        extra_special_tokens=SPECIAL[4:], clean_up_tokenization_spaces=False, model_input_names=["input_ids", "attention_mask"])


def network():
    "A decoder whose weights depend on their names and shapes alone."
    from transformers import Qwen2Config, Qwen2Model
    model = Qwen2Model(Qwen2Config(vocab_size=len(tokenizer()), **CONFIG)).eval()
    with torch.no_grad():
        for name, o in model.named_parameters():
            i = torch.arange(math.prod(o.shape), dtype=torch.float64)
            waves = torch.sin(0.1237*i*i + 0.731*i + zlib.crc32(name.encode()) % 1000).view(o.shape)
            o.copy_((1.0 if "norm" in name else 0.0) + (1.0 if "embed" in name else 0.2)*waves)
    return model


def batch(rows, options, draws):
    "The token ids that FlagEmbedding trains on, of queries and of passages."
    from FlagEmbedding.finetune.embedder.decoder_only.icl.dataset import DecoderOnlyEmbedderICLSameDatasetTrainDataset as Dataset
    usual = dict(query_instruction_format=FORMAT, query_instruction_for_retrieval=None, passage_instruction_for_retrieval=None, passage_instruction_format="{}{}", knowledge_distillation=False, train_group_size=2,
        shuffle_ratio=0.0, passage_max_len=128, example_query_max_len=256, example_passage_max_len=256, retrieval_use_examples=True, icl_suffix_str=SUFFIX)
    made, tok = object.__new__(Dataset), tokenizer()
    made.args, made.tokenizer, made.shuffle_ratio = SimpleNamespace(**(usual | options)), tok, 0.0
    made.suffix, made.prefix = (tok(o, add_special_tokens=False)["input_ids"] for o in (SUFFIX + tok.eos_token, tok.bos_token))
    wanted = iter(draws)
    now = []
    def choice(some):
        if len(some) < 6: return some[0]  # the only positive
        now[:] = [next(wanted)]
        return now[0][0]
    def sample(some, n):
        if len(some) < 4: return some[:n]  # negatives
        assert n == len(now[0][1]), (n, now)
        return list(now[0][1])
    kept = random.choice, random.sample
    random.choice, random.sample = choice, sample
    try: queries, passages, _ = made._create_batch_data({name: [o[name] for o in rows] for name in rows[0]})
    finally: random.choice, random.sample = kept
    return {"queries": tok(queries, truncation=True, max_length=made.args.query_max_len)["input_ids"], "passages": tok(passages, truncation=True, max_length=made.args.passage_max_len)["input_ids"]}


def inference(examples, length):
    "The token ids of queries and all vectors, as `ICLLLMEmbedder` makes them."
    from FlagEmbedding.inference.embedder.decoder_only.icl import ICLLLMEmbedder
    with tempfile.TemporaryDirectory() as folder:
        network().save_pretrained(folder)
        tokenizer().save_pretrained(folder)
        model = ICLLLMEmbedder(folder, use_fp16=False, devices="cpu", query_instruction_for_retrieval=FIND, query_instruction_format=FORMAT, examples_for_task=examples, query_max_length=length, passage_max_length=64)
        queries = [o["query"] for o in ROWS] + ["what eats fish " * 20]
        seen = []
        found = []
        hook = model.model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
        for text in queries:
            seen.clear()
            found.append(model.encode_queries([text], batch_size=1)[0])
            found[-1] = (seen[-1]["input_ids"][0][seen[-1]["attention_mask"][0].bool()].tolist(), digits(found[-1].tolist()))
        hook.remove()
        passages = digits(model.encode_corpus([o["pos"][0] for o in ROWS]).tolist())
    return {"queries": [ids for ids, _ in found], "vectors": [vector for _, vector in found], "passages": passages}


def digits(x):
    "Numbers with 7 digits."
    return [digits(o) for o in x] if isinstance(x, (list, tuple)) else float(f"{x:.7g}")


def main():
    tok = tokenizer()
    assert tok.decode(tok(ROWS[0]["query"] + ".\n\n<query>", add_special_tokens=False)["input_ids"]) == ROWS[0]["query"] + ".\n\n<query>"
    found = {"made by": "python tests/make_icl_fixture.py", "versions": {o: version(o) for o in ("FlagEmbedding", "torch", "transformers")}}
    found |= {"training": {name: batch(*case) for name, case in CASES.items()}, "inference": {"with": inference(EXAMPLES, 100), "without": inference(None, 100)}}
    FIXTURE.parent.mkdir(exist_ok=True)
    FIXTURE.write_text(json.dumps(found, separators=(",", ":")).replace('"},"', '"},\n"').replace('},"', '},\n"') + "\n")


if __name__ == "__main__": sys.exit(main())
