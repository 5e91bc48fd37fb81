"nixietune mine, score, embed: the commands that other systems print run to their end, reports say what is in the files, and what was interrupted goes on."
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from transformers import BertConfig, BertForSequenceClassification, Qwen3Config, Qwen3ForCausalLM

import nixietune.scoring
from nixietune.cli import main
from nixietune.core import InputError
from nixietune.display import hushed
from nixietune.groups import load_groups
from nixietune.migration import BGE_PROMPT, rules_help, script_command, SCRIPTS, translate
from nixietune.scoring import as_scorer
from nixietune.teachers import load_vectors, open_vectors
from nixietune.testing import tiny_model, toy_corpus, toy_groups

torch.set_num_threads(1)
HN_MINE = """input_file output_file embedder_name_or_path candidate_pool range_for_sampling negative_number use_gpu_for_searching search_batch_size embedder_model_class normalize_embeddings pooling_method
    use_fp16 devices query_instruction_for_retrieval query_instruction_format_for_retrieval examples_for_task examples_instruction_format trust_remote_code cache_dir batch_size embedder_batch_size
    embedder_query_max_length embedder_passage_max_length model_name_or_path"""
ADD_SCORE = """input_file output_file use_fp16 devices trust_remote_code reranker_name_or_path reranker_model_class reranker_peft_path use_bf16 query_instruction_for_rerank
    query_instruction_format_for_rerank passage_instruction_for_rerank passage_instruction_format_for_rerank cache_dir reranker_batch_size reranker_query_max_length reranker_max_length normalize prompt
    cutoff_layers compress_ratio compress_layers"""
SIZE = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, initializer_range=0.3)


def write_lines(path, rows): Path(path).write_text("".join(json.dumps(o) + "\n" for o in rows))
def read_lines(path): return [json.loads(o) for o in Path(path).read_text().splitlines()]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    "A tiny encoder, reranker and language model, with room for 1,024 tokens."
    folder, tokenizer = tmp_path_factory.mktemp("models"), tiny_model()[0].tokenizer
    tiny_model(length=512, max_position_embeddings=514).save_pretrained(str(folder / "tiny"))
    tiny_model("qwen3", length=256, max_position_embeddings=1024).save_pretrained(str(folder / "decoder"))
    torch.manual_seed(1)
    with hushed():
        vocabulary = dict(vocab_size=len(tokenizer), pad_token_id=0)
        BertForSequenceClassification(BertConfig(**SIZE, **vocabulary, max_position_embeddings=1026, num_labels=1)).save_pretrained(folder / "reranker")
        Qwen3ForCausalLM(Qwen3Config(**SIZE, **vocabulary, num_key_value_heads=2, head_dim=8)).save_pretrained(folder / "language")
        for name in ("reranker", "language"): tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture(autouse=True)
def folder(models, tmp_path, monkeypatch):
    "A folder as a user has it, with FlagEmbedding's file names."
    (tmp_path / "user").mkdir()
    monkeypatch.setenv("NIXIETUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path / "user")
    for name in ("tiny", "decoder", "reranker", "language"): os.symlink(models / name, name)
    write_lines("toy_finetune_data.jsonl", ({"query": o["query"], "pos": [i["doc"] for i in o["pos"]], "neg": [i["doc"] for i in o["neg"]]} for o in toy_groups(80, negatives=3)))
    return tmp_path / "user"


def files(): return sorted(str(o) for o in Path().rglob("*"))
def documents(rows): return list(dict.fromkeys(d for row in rows for d in row["pos"] + row["neg"]))


@pytest.mark.parametrize("name, names", [("mine", HN_MINE), ("score", ADD_SCORE), ("embed", "train_data_path ckpt_path distill_train_data_path save_text")])
def test_no_argument_is_forgotten(name, names):
    "Each has a rule, which leads to an option of ours or has a reason, and is in the help."
    rules, own = SCRIPTS[name].rules, {o.name for o in SCRIPTS[name].options}
    assert {*names.split()} == {*rules}
    for theirs, rule in rules.items(): assert rule.to in own or rule.note and not rule.to, theirs
    assert all(f"  {o} " in rules_help(name) for o in names.split()) and "…" not in rules_help(name)


@pytest.mark.parametrize("said", [
    "--model_name_or_path tiny --input_file toy_finetune_data.jsonl --output_file toy_finetune_data_minedHN.jsonl --range_for_sampling 2-200 --use_gpu_for_searching",
    "--input_file toy_finetune_data.jsonl --output_file toy_finetune_data_minedHN.jsonl --range_for_sampling 2-200 --negative_number 15 --use_gpu_for_searching --embedder_name_or_path tiny"])
def test_printed_mining(said, capsys):
    "Both generations of hn_mine: 15 negatives by chance from places 2 to 200 of the model's ranking, those of the file replaced."
    assert main(["mine", *said.split()]) == 0
    out, errors = capsys.readouterr()
    assert "read as arguments of hn_mine.py: input_file is groups" in errors and "sampling='random'" in errors and "negatives a query:" in out
    before, after = read_lines("toy_finetune_data.jsonl"), read_lines("toy_finetune_data_minedHN.jsonl")
    pool, model = documents(before), SentenceTransformer("tiny", device="cpu")
    queries, texts = (model.encode(o, normalize_embeddings=True) for o in ([o["query"] for o in before], pool))
    ranks = np.argsort(np.argsort(-(queries @ texts.T), axis=1, kind="stable"), axis=1)
    known = {}
    for o in before: known.setdefault(o["query"], set()).update(o["pos"])
    for old, new, rank in zip(before, after, ranks):
        assert (new["query"], new["pos"], [*new]) == (old["query"], old["pos"], ["query", "pos", "neg"])
        assert len(new["neg"]) == len(set(new["neg"])) == 15 and not known[new["query"]] & {*new["neg"]}
        assert all(1 <= rank[pool.index(o)] for o in new["neg"])  # places of the fast search may differ by one where scores are equal
    hardness = [np.mean([rank[pool.index(o)] for o in new["neg"]]) for new, rank in zip(after, ranks)]
    assert abs(np.mean(hardness) - len(pool)/2) < len(pool)/10, "by chance, not the hardest"
    assert main(["mine", *said.split()]) == 0 and read_lines("toy_finetune_data_minedHN.jsonl") == after


def test_printed_scoring(folder, capsys):
    "add_reranker_score.py with the processor twice in place of two GPUs: the logits, whatever the grouping."
    said = "--input_file toy_finetune_data.jsonl --output_file toy_finetune_data_score.jsonl --reranker_name_or_path reranker --devices cuda:0 cuda:1 --cache_dir ./cache/model --reranker_query_max_length 512 --reranker_max_length 1024"
    if not torch.cuda.is_available():
        before = files()
        assert main(["score", *said.split()]) == 2 and "cuda:0" in capsys.readouterr().err and files() == before
    assert main(["score", *said.replace("cuda:0 cuda:1", "cpu cpu").split()]) == 0
    assert "with both" in capsys.readouterr().out
    model = CrossEncoder("reranker", device="cpu", max_length=1024)
    for row in read_lines("toy_finetune_data_score.jsonl")[:20]:
        for side in ("pos", "neg"): assert row[f"{side}_scores"] == pytest.approx(model.predict([(row["query"], o) for o in row[side]], activation_fn=torch.nn.Identity()), abs=1e-4)
    assert not [o for o in os.listdir() if o.startswith(".")]
    settings = translate("score", {"reranker_model_class": "decoder-only-base", "normalize": "True", "use_fp16": "True", "reranker_batch_size": "4", "compress_ratio": "1"})
    assert [settings[o] for o in ("how", "scale", "precision", "tokens_per_forward", "prompt", "max_length", "query_length")] == ["yes", "sigmoid", "auto", 2048, BGE_PROMPT, 512, 384]


def test_extraction(capsys):
    "create_distill_data.py's places: the text of each query beside its documents, the vectors in the same order; RAG-Retrieval's training reads both."
    assert main(["embed", "toy_finetune_data.jsonl", "tiny", "teacher1.mmap", "1"]) == 0
    texts = [o["query"] for o in read_lines("toy_finetune_data.jsonl.text.jsonl")]
    rows = read_lines("toy_finetune_data.jsonl")
    assert texts == list(dict.fromkeys(t for o in rows for t in (o["query"], *o["pos"], *o["neg"])))
    found = np.fromfile("teacher1.mmap", "float32").reshape(len(texts), -1)
    np.testing.assert_allclose(found, SentenceTransformer("tiny", device="cpu").encode(texts, normalize_embeddings=True), atol=1e-5)
    assert main(["embed", "--groups", "toy_finetune_data.jsonl", "--model", "tiny", "tiny", "--output", "two.mmap", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["dimensions"] == 2*found.shape[1]
    assert load_vectors("two.mmap", "toy_finetune_data.jsonl.text.jsonl", 2*found.shape[1]).shape == (len(texts), 2*found.shape[1])
    given = translate("rag-retrieval", dict(train_type="distill", train_dataset="toy_finetune_data.jsonl.text.jsonl", train_dataset_vec="teacher1.mmap", teatch_emebedding_dim=found.shape[1]))
    assert given["teachers"] == ["teacher1.mmap"]


def test_mine_as_json(folder):
    "In a process: one line of JSON on standard output, which says what is in the file; nothing heavy for the help."
    command = [Path(sys.executable).with_name("nixietune"), "mine", "--groups", "toy_finetune_data.jsonl", "--output", "mined.jsonl", "--model", "tiny", "--number", "3", "--existing", "replace", "--relative", "0", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)
    assert done.returncode == 0 and done.stdout.count("\n") == 1, done.stderr
    found, rows = json.loads(done.stdout), read_lines("mined.jsonl")
    assert found["dialect"] == "bge" and found["groups"] == len(rows) == 80 and found["output"] == "mined.jsonl"
    assert {int(k): v for k, v in found["queries_by_negatives"].items()}.keys() == {len(o["neg"]) for o in rows}
    assert found["refused"]["a known positive"] >= 1 and "80 groups, read as bge" in done.stderr


def test_spellings(capsys):
    for flags in ("--write-as nixietune --output a.jsonl --max-length 16", "--write_as=nixietune --output b.jsonl --max_length=16"):
        assert main(["mine", "--groups", "toy_finetune_data.jsonl", "--relative", "0", "--model", "tiny", "bm25", *flags.split()]) == 0
    assert Path("a.jsonl").read_text() == Path("b.jsonl").read_text()
    assert {o["miner"] for row in load_groups("a.jsonl") for o in row["neg"]} == {"tiny", None}  # of the toy problem's texts none has a word of its query
    Path("mine.yaml").write_text("groups: toy_finetune_data.jsonl\nmodel: tiny\noutput: c.jsonl\nmax_length: 16\nrelative: 0\nsampling: random\n")
    assert main(["mine", "mine.yaml", "--model", "tiny", "bm25", "--write-as", "nixietune", "--sampling", "top"]) == 0 and Path("c.jsonl").read_text() == Path("a.jsonl").read_text()


def test_candidate_pool():
    "Only the texts of the pool are searched; an instruction goes before the query, in its format."
    write_lines("pool.jsonl", ({"text": o} for o in toy_corpus()["text"][:60]))
    said = "--input_file toy_finetune_data.jsonl --output_file out.jsonl --candidate_pool pool.jsonl --range_for_sampling 0-30 --embedder_name_or_path tiny --pooling_method cls --normalize_embeddings True"
    assert main(["mine", *said.split()]) == 0
    assert {d for o in read_lines("out.jsonl") for d in o["neg"]} <= {*toy_corpus()["text"][:60]}
    settings = translate("mine", {"query_instruction_for_retrieval": "Find", "query_instruction_format_for_retrieval": r"{}\n{}", "pooling_method": "last_token", "embedder_query_max_length": "64"})
    assert [settings[o] for o in ("query_prompt", "pooling", "query_length", "max_length")] == ["Find\n", "lasttoken", 64, 512]


def test_dialects(capsys):
    "What the input's dialect has no place for is said, and scores are not lost."
    write_lines("rag.jsonl", ({"query": o["query"], "pos": o["pos"], "neg": o["neg"], "prompt_for_query": "q: "} for o in read_lines("toy_finetune_data.jsonl")))
    assert main("mine --groups rag.jsonl --model tiny --relative 0 --output mined.jsonl".split()) == 0
    assert [*read_lines("mined.jsonl")[0]] == ["query", "pos", "neg", "prompt_for_query"] and "neg.miner (80 groups)" in capsys.readouterr().out
    assert main("score --groups rag.jsonl --model tiny --output scored.jsonl".split()) == 0
    assert "rag has no place for a teacher's scores: written as nixietune" in capsys.readouterr().out
    assert all(o["teacher"] is not None for row in load_groups("scored.jsonl") for o in row["pos"] + row["neg"])


def test_several_teachers():
    "The weighted mean, as `blend` has it, of a cross-encoder that reads 64 tokens and BM25."
    flags = "--groups toy_finetune_data.jsonl --model reranker bm25 --weights 1 3 --max-length 64 --output scored.jsonl --scores kept.scores"
    assert main(["score", *flags.split()]) == 0 and Path("kept.scores").exists()
    groups = load_groups("toy_finetune_data.jsonl")
    pairs = [(row["query"], o["doc"]) for row in groups for o in row["pos"]]
    with hushed(): one = as_scorer("reranker", max_length=64)(pairs)
    from nixietune.groups import corpus_of
    words = nixietune.scoring.bm25_scorer(corpus_of(groups))(pairs)
    assert [o["teacher"] for row in load_groups("scored.jsonl") for o in row["pos"]] == pytest.approx(((one + 3*words)/4).tolist(), abs=1e-4)


def test_language_models(monkeypatch):
    "How the model is asked, and what it is told of lengths."
    assert main("score --groups toy_finetune_data.jsonl --model language --how likelihood --max-length 64 --output likely.jsonl".split()) == 0
    assert all(o < 0 for row in read_lines("likely.jsonl") for o in row["pos_scores"])
    asked = {}
    def instead(name, template, **more):
        asked.update(more, name=name, template=template)
        return as_scorer(lambda pairs: np.zeros(len(pairs)), name="instead")
    monkeypatch.setattr(nixietune.scoring, "yes_logit", instead)
    assert main("score --input_file toy_finetune_data.jsonl --output_file yes.jsonl --reranker_name_or_path language --reranker_model_class decoder-only-base --trust_remote_code True".split()) == 0
    assert asked == dict(name="language", template=("A: {query}", "\n", "B: {document}", "\n", BGE_PROMPT), adapter=None, max_length=512, query_length=384, trust_remote_code=True)


def many(n=700):
    "Rows of distinct texts."
    words = toy_corpus()["text"]
    return [{"query": f"{words[i % len(words)]} {words[i // len(words)]}", "pos": [f"{words[(i + 1) % len(words)]} {words[-1 - i // len(words)]}"], "neg": [words[(i + 2) % len(words)]]} for i in range(n)]


def test_scoring_goes_on(monkeypatch, capsys):
    "Stopped after the first piece, exit code 130 and no output; the same command scores what is left, and the file is that of one run."
    write_lines("many.jsonl", many())
    read, whole = [], CrossEncoder.predict
    def predict(self, pairs, **how):
        if stop and sum(read) > 1024: raise KeyboardInterrupt
        read.append(len(pairs))
        return whole(self, pairs, **how)
    monkeypatch.setattr(CrossEncoder, "predict", predict)
    command, stop = "score --groups many.jsonl --model reranker --max-length 32 --output".split(), True
    assert main([*command, "scored.jsonl"]) == 130 and not Path("scored.jsonl").exists() and Path(".scored.jsonl.scores").exists()
    capsys.readouterr()
    read.clear(); stop = False
    assert main([*command, "scored.jsonl"]) == 0 and "were scored before" in capsys.readouterr().out
    assert 0 < sum(read) < 700 and not Path(".scored.jsonl.scores").exists()
    read.clear()
    assert main([*command, "again.jsonl"]) == 0 and sum(read) == 1400
    for one, two in zip(read_lines("scored.jsonl"), read_lines("again.jsonl")): assert one["pos_scores"] + one["neg_scores"] == pytest.approx(two["pos_scores"] + two["neg_scores"], abs=1e-5)


@pytest.mark.parametrize("output", ["vectors", "vectors.mmap"])
def test_embedding_goes_on(monkeypatch, capsys, output):
    "Of 4,800 texts and more, those that were read before the interruption are not read again; nothing is left beside the output."
    write_lines("many.jsonl", many(2400))
    import nixietune.teachers as module
    whole, count = module.encode, []
    def encode(model, texts, *args, **how):
        if stop and sum(count) > 1000: raise KeyboardInterrupt
        count.append(len(texts))
        return whole(model, texts, *args, **how)
    monkeypatch.setattr(module, "encode", encode)
    command, stop, before = f"embed --groups many.jsonl --model tiny --output {output}".split(), True, files()
    assert main(command) == 130 and not Path(output).exists()
    read, stop = sum(count), False
    capsys.readouterr()
    count.clear()
    assert main([*command, "--json"]) == 0
    out, errors = capsys.readouterr()
    n = json.loads(out)["vectors"]
    assert "going on after" in errors and sum(count) <= n - read + 6  # and three more to compare
    assert n >= 4800 and {o.split("/")[0] for o in {*files()} - {*before}} == {output}
    if output == "vectors": assert len(open_vectors(output)) == n
    else: assert Path(output).stat().st_size == n*json.loads(out)["dimensions"]*4


def test_mining_with_examples(folder, capsys):
    "hn_mine for a model that reads examples: they change the ranking, and the format that it leaves out is that of its model class."
    Path("task.json").write_text(json.dumps([{"instruct": "Find it.", "query": "tiny winged one", "response": "a small bird"}]*3))
    said = "mine --input_file toy_finetune_data.jsonl --range_for_sampling 0-5 --negative_number 5 --embedder_name_or_path decoder --embedder_model_class decoder-only-icl --query_instruction_for_retrieval Find."
    assert main([*said.split(), "--output_file", "with.jsonl", "--examples_for_task", "task.json"]) == 0
    assert "examples_for_task is task_examples" in capsys.readouterr().err
    assert main([*said.split(), "--output_file", "without.jsonl"]) == 0
    assert main([*said.split(), "--output_file", "spelled.jsonl", "--examples_for_task", Path("task.json").read_text(), "--examples_instruction_format", r"<instruct>{}\n<query>{}\n<response>{}"]) == 0
    found = {name: [{*o["neg"]} for o in read_lines(f"{name}.jsonl")] for name in ("with", "without", "spelled")}
    assert found["with"] == found["spelled"] != found["without"]


@pytest.mark.parametrize("said, found", [
    ("mine --model tiny --output x.jsonl", "no groups"),
    ("mine --groups toy_finetune_data.jsonl --model tiny", "no output"),
    ("mine --groups toy_finetune_data.jsonl --output x.jsonl", "no encoder"),
    ("mine --groups toy_finetune_data.jsonl --model tiny --output toy_finetune_data.jsonl --overwrite", "is what is read"),
    ("mine --groups toy_finetune_data.jsonl --model tiny --output tiny", "is a folder"),
    ("mine --groups toy_finetune_data.jsonl --model tiny --output x.jsonl --ranks 9-2", "'2-200'"),
    ("mine --groups toy_finetune_data.jsonl --model tiny --output x.jsonl --number 0", "number is 0"),
    ("mine --groups toy_finetune_data.jsonl --model tiny --output x.jsonl --write-as trec", "no dialect 'trec'"),
    ("mine --groups toy_finetune_data.jsonl --model tiny --output x.jsonl --devices cuda:77", "devices of this machine"),
    ("mine --groups toy_finetune_data.jsonl --model tiny --output x.csv", "not written as"),
    ("mine --input_file toy_finetune_data.jsonl --output_file x.jsonl --embedder_name_or_path tiny --search_batch_size 128", "never reads it"),
    ("mine --input_file toy_finetune_data.jsonl --output_file x.jsonl --embedder_name_or_path decoder --examples_for_task web", "no such file"),
    ("mine --input_file toy_finetune_data.jsonl --output_file x.jsonl --embedder_name_or_path tiny --embedder_model_class decoder-only-icl", "pooling='lasttoken'"),
    ("mine --input_file toy_finetune_data.jsonl --output_file x.jsonl --embedder_name_or_path tiny --embedder_model_class decoder-only-pseudo_moe", "the model says what it is"),
    ("mine --input_file toy_finetune_data.jsonl --output_file x.jsonl --embedder_name_or_path tiny --batch_size 3000", "packs of so many tokens"),
    ("mine --input_file toy_finetune_data.jsonl --output_file x.jsonl --embedder_name_or_path tiny --negativ_number 3", "no argument 'negativ_number'"),
    ("score --groups toy_finetune_data.jsonl --output x.jsonl", "no model"),
    ("score --groups toy_finetune_data.jsonl --output x.jsonl --model language", "a language model"),
    ("score --groups toy_finetune_data.jsonl --output x.jsonl --model tiny bm25 --weights 1", "1 weights for 2 teachers"),
    ("score --groups toy_finetune_data.jsonl --output x.jsonl --model reranker --prompt Well?", "prompt does nothing here"),
    ("score --groups toy_finetune_data.jsonl --output x.jsonl --model reranker --corpus toy_finetune_data.jsonl", "corpus does nothing here"),
    ("score --input_file toy_finetune_data.jsonl --output_file x.jsonl --reranker_name_or_path reranker --reranker_peft_path tiny", "adapter does nothing here"),
    ("score --groups toy_finetune_data.jsonl --output x.jsonl --model reranker --scale log", "normalize='log'"),
    ("score --groups toy_finetune_data.jsonl --output x.jsonl --model reranker --write-as rag", "rag has no place"),
    ("score --groups toy_finetune_data.jsonl --output x.jsonl --model tiny --max-length 64", "max_length for SentenceTransformer"),
    ("score --input_file toy_finetune_data.jsonl --output_file x.jsonl --reranker_name_or_path reranker --cutoff_layers 28", "plain transformers cannot load"),
    ("score --input_file toy_finetune_data.jsonl --output_file x.jsonl --reranker_name_or_path reranker --reranker_model_class decoder-only-layerwise", "plain transformers cannot load"),
    ("embed --groups toy_finetune_data.jsonl --model bm25 --output x", "bm25 has no vectors"),
    ("embed --groups toy_finetune_data.jsonl --model tiny --output x --texts y.jsonl", "texts without a .mmap file"),
    ("embed --groups toy_finetune_data.jsonl --model tiny --output x.mmap --dtype float16", "'float32' for a .mmap file"),
])
def test_refused(said, found, capsys):
    "Exit code 2, one message, and not a file more than before."
    before = files()
    assert main(said.split()) == 2
    errors = capsys.readouterr().err
    assert found in errors[errors.index("nixietune: "):], errors
    assert files() == before


def test_what_is_there_stays(capsys):
    Path("x.jsonl").write_text("mine\n")
    assert main("mine --groups toy_finetune_data.jsonl --model tiny --output x.jsonl".split()) == 2 and "is there already" in capsys.readouterr().err
    assert Path("x.jsonl").read_text() == "mine\n"
    assert main("mine --groups toy_finetune_data.jsonl --model tiny --output x.jsonl --overwrite".split()) == 0 and len(read_lines("x.jsonl")) == 80


def test_whose_words():
    "A command is a script's by one argument that only the script has."
    assert script_command("score", ["--devices", "cpu", "--prompt", "x"]) is None and script_command("embed", ["run.yaml"]) is None
    assert script_command("mine", ["--groups", "a", "--negative-number", "3"]) == {"groups": "a", "negative_number": "3"}
    with pytest.raises(InputError, match="no system"): translate("none", {})


@pytest.mark.parametrize("name", ["mine", "score", "embed", "train", "evaluate", "config", "demo"])
def test_help(name):
    "It can be printed, and nothing heavy is imported for it."
    code = f"""
import sys
from nixietune.cli import main
try: main([{name!r}, '--help'])
except SystemExit as done: assert not done.code
assert not {{'torch', 'numpy', 'transformers', 'datasets', 'pandas'}} & {{*sys.modules}}"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: nixietune {name}") and (name not in SCRIPTS or SCRIPTS[name].name in done.stdout)
