"The commands that other systems print run here, and every argument of theirs has a place or a reason."
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from sentence_transformers import SentenceTransformer
from tokenizers.processors import TemplateProcessing

from nixietune.adapters import adapter_tokens, add_tokens, load_adapter
from nixietune.cli import main
from nixietune.configs import config_text
from nixietune.core import InputError
from nixietune.encoder import encode, load_encoder
from nixietune.icl import examples_of
from nixietune.losses import InfoNCE, M3KD
from nixietune.m3 import heads_of, load_m3
from nixietune.migration import read_command, rules_of, SYSTEMS, translate
from nixietune.settings import arguments_of, objective_of, read_loss, read_settings, TRAIN
from nixietune.testing import tiny_model, toy_groups

torch.set_num_threads(1)
FLAG = """model_name_or_path config_name tokenizer_name cache_dir trust_remote_code use_fast_tokenizer token train_data cache_path train_group_size query_max_len passage_max_len
    pad_to_multiple_of max_example_num_per_dataset query_instruction_for_retrieval query_instruction_format knowledge_distillation passage_instruction_for_retrieval passage_instruction_format
    shuffle_ratio same_dataset_within_batch small_threshold drop_threshold negatives_cross_device temperature fix_position_embedding sentence_pooling_method normalize_embeddings sub_batch_size
    kd_loss_type use_mrl mrl_dims colbert_dim unified_finetuning use_self_distill fix_encoder self_distill_start_step peft_model_path use_lora lora_rank lora_alpha lora_dropout target_modules
    use_flash_attn use_slow_tokenizer from_peft modules_to_save raw_peft additional_special_tokens save_merged_lora_model only_merge_lora_model example_query_max_len example_passage_max_len
    retrieval_use_examples icl_suffix_str normlized use_inbatch_neg overwrite_output_dir warmup_ratio"""
RAG = """model_name_or_path train_type train_dataset train_dataset_vec shuffle neg_nums query_max_len passage_max_len teatch_emebedding_dim teacher_emebedding_dim output_dir save_on_epoch_end
    num_max_checkpoints epochs lr batch_size seed warmup_proportion temperature mixed_precision gradient_accumulation_steps log_with log_interval use_mrl mrl_dims all_gather gradient_checkpointing
    val_dataset eval_steps save_steps"""
NIXIE = """model_name_or_path train_dataset eval_dataset train_split eval_split train_samples eval_samples streaming seq_len target num_negatives triplet_margin query_prefix document_prefix
    infonce_negative_mode infonce_temperature eval_metrics eval_zero"""


@pytest.mark.parametrize("system, names", [("flagembedding", FLAG), ("rag-retrieval", RAG), ("nixietune", NIXIE)])
def test_no_argument_is_forgotten(system, names):
    "Each has a rule; each rule leads to a setting of ours, to training arguments, or has a reason."
    rules, own = SYSTEMS[system].rules, {o.name for o in TRAIN}
    assert set(names.split()) <= rules.keys()
    from nixietune.settings import field_names
    for name, rule in rules.items():
        assert all(o in own | field_names() for o in rule.to.split(", ") if o), (name, rule.to)
        assert rule.to or rule.note, name
    assert all(name in str(rules_of(system)) for name in names.split())


@pytest.fixture
def folder(tmp_path, monkeypatch):
    "A tiny model, and rows as FlagEmbedding's examples have them: folders, files, scores, tasks."
    monkeypatch.setenv("NIXIETUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    tiny_model(length=512, max_position_embeddings=514).save_pretrained("tiny")
    rows = [{"query": o["query"], "pos": [i["doc"] for i in o["pos"]], "neg": [i["doc"] for i in o["neg"]]} for o in toy_groups(80, negatives=4)]
    scored = [o | {"pos_scores": [90.0], "neg_scores": [80.0, 70.0, 60.0, 50.0], "prompt": "Find it. ", "type": "normal"} for o in rows[:30]]
    said = [o | {"prompt": "Same? ", "type": "symmetric_sts"} for o in rows[30:50]]
    classes = [{"query": o["query"], "pos": [o["query"].split()[-1]], "neg": [w for w in ("tiny", "huge", "ancient") if w != o["query"].split()[-1]], "type": "symmetric_class"} for o in rows[50:]]
    for name, some in {"retrieval/a": scored[:15], "retrieval/b": scored[15:], "sts/sts": said, "classification-no_in_batch_neg/c": classes, "toy_finetune_data": rows}.items():
        path = tmp_path / f"example_data/{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(o) + "\n" for o in some))
    shutil.copy("example_data/toy_finetune_data.jsonl", "toy_finetune_data.jsonl")
    return tmp_path


def figures(output): return json.loads(Path(output, "metrics.json").read_text())


def test_the_old_command(folder, capsys):
    "`baai_general_embedding.finetune.run`, as its manual prints it, but for fp16: there is no GPU."
    said = """--output_dir out --model_name_or_path tiny --train_data ./toy_finetune_data.jsonl --learning_rate 1e-3 --num_train_epochs 5 --per_device_train_batch_size 16 --dataloader_drop_last True
        --normlized True --temperature 0.02 --query_max_len 64 --passage_max_len 256 --train_group_size 2 --negatives_cross_device --logging_steps 10 --query_instruction_for_retrieval""".split() + [""]
    assert main(["flagembedding", *said]) == 0
    facts = figures("out")["facts"]["training"]
    assert facts["loss"] == ["InfoNCE(temperature=0.02, in_batch=True, positives='each', similarity='cos')"] and facts["steps"] == 5*4 and facts["learning_rate"] == 1e-3
    model = SentenceTransformer("out/model")
    assert model[1].pooling_mode == "cls" and model.prompts["query"] == "" and model[0].query_length == 64
    if not torch.cuda.is_available():
        assert main(["flagembedding", *said, "--fp16", "--overwrite_output_dir"]) == 2
        assert "fp16 without a GPU" in capsys.readouterr().err


def test_the_new_command(folder, capsys):
    "The standard model's, as its manual prints it, but for fp16 and DeepSpeed."
    said = """--model_name_or_path tiny --cache_dir ./cache/model --train_data ./example_data/retrieval ./example_data/sts/sts.jsonl ./example_data/classification-no_in_batch_neg --cache_path ./cache/data
        --train_group_size 8 --query_max_len 512 --passage_max_len 512 --pad_to_multiple_of 8 --query_instruction_format {}{} --knowledge_distillation False --output_dir ./test_encoder_only_base
        --overwrite_output_dir --learning_rate 1e-5 --num_train_epochs 2 --per_device_train_batch_size 2 --dataloader_drop_last True --warmup_ratio 0.1 --gradient_checkpointing --logging_steps 1
        --save_steps 1000 --negatives_cross_device --temperature 0.02 --sentence_pooling_method cls --normalize_embeddings True --kd_loss_type kl_div""".split()
    instruction = ["--query_instruction_for_retrieval", "Represent this sentence for searching relevant passages: "]
    assert main(["flagembedding", *said, *instruction]) == 0
    assert SentenceTransformer("test_encoder_only_base/model").prompts["query"] == instruction[1]
    assert Path("cache/data").is_dir() and "no_in_batch_neg" in capsys.readouterr().out
    if not torch.cuda.is_available():
        assert main(["flagembedding", *said, "--deepspeed", "../ds_stage0.json"]) == 2
        assert "deepspeed without a GPU" in capsys.readouterr().err


def test_the_command_of_bge_m3(folder, capsys):
    "As its manual prints it, with two kinds of teachers' scores, but for fp16 and DeepSpeed: three heads, which lie beside the model in its own files."
    said = """--model_name_or_path tiny --cache_dir ./cache/model --train_data ./example_data/retrieval ./example_data/sts/sts.jsonl ./example_data/classification-no_in_batch_neg --cache_path ./cache/data
        --train_group_size 8 --query_max_len 512 --passage_max_len 512 --pad_to_multiple_of 8 --knowledge_distillation True --same_dataset_within_batch True --small_threshold 0 --drop_threshold 0
        --output_dir ./m3_sd --overwrite_output_dir --learning_rate 1e-5 --num_train_epochs 2 --per_device_train_batch_size 2 --dataloader_drop_last True --warmup_ratio 0.1 --gradient_checkpointing
        --logging_steps 1 --save_steps 1000 --negatives_cross_device --temperature 0.02 --sentence_pooling_method cls --normalize_embeddings True --kd_loss_type m3_kd_loss --unified_finetuning True
        --use_self_distill True --fix_encoder False --self_distill_start_step 0""".split()
    assert main(["flagembedding", *said]) == 0
    assert "the mix teaches each of them from step 2 on" in capsys.readouterr().out
    assert {*figures("m3_sd")["facts"]["heads"]} == {"dense", "lexical", "multi", "mix"}
    assert {*heads_of(load_m3("m3_sd/model"))} == {"lexical", "multi"} and torch.load("m3_sd/model/sparse_linear.pt", weights_only=True)["weight"].shape == (1, 32)


def test_the_command_of_bge_en_icl(folder, capsys):
    "As its manual prints it, but for fp16 and DeepSpeed: examples from the batch, categories of clusters, and a suffix that the merged model keeps."
    tiny_model("qwen3", length=2048, max_position_embeddings=4096).save_pretrained("decoder")
    rows = [{"query": o["query"], "pos": [o["query"]], "neg": [i["doc"] for i in o["neg"]], "prompt": "Find the topic. ", "type": "symmetric_clustering", "category": o["query"].split()[-1]} for o in toy_groups(16, negatives=4, seed=1)]
    Path("example_data/clustering-no_in_batch_neg").mkdir()
    Path("example_data/clustering-no_in_batch_neg/k.jsonl").write_text("".join(json.dumps(o) + "\n" for o in rows))
    said = """--model_name_or_path decoder --cache_dir ./cache/model --use_lora True --lora_rank 32 --lora_alpha 64 --target_modules q_proj k_proj v_proj o_proj gate_proj down_proj up_proj --save_merged_lora_model True
        --train_data ./example_data/retrieval ./example_data/sts/sts.jsonl ./example_data/classification-no_in_batch_neg ./example_data/clustering-no_in_batch_neg --cache_path ./cache/data --train_group_size 8
        --query_max_len 2048 --passage_max_len 512 --pad_to_multiple_of 8 --knowledge_distillation True --same_dataset_within_batch True --small_threshold 0 --drop_threshold 0 --example_query_max_len 256
        --example_passage_max_len 256 --retrieval_use_examples True --output_dir ./icl_sd --overwrite_output_dir --learning_rate 1e-4 --num_train_epochs 1 --per_device_train_batch_size 2 --dataloader_drop_last True
        --warmup_ratio 0.1 --gradient_checkpointing --logging_steps 1 --save_steps 1000 --negatives_cross_device --temperature 0.02 --sentence_pooling_method last_token --normalize_embeddings True --kd_loss_type kl_div""".split()
    said += ["--query_instruction_for_retrieval", "Given a query, retrieve passages that are relevant to the query.", "--query_instruction_format", r"<instruct>{}\n<query>{}", "--icl_suffix_str", r"\n<response>", "--additional_special_tokens", "<instruct>", "<query>", "<response>"]
    assert main(["flagembedding", *said]) == 0
    facts = figures("icl_sd")["facts"]["training"]
    assert facts["examples"] > 20 and facts["queries_alone"] < facts["steps"] and "0 to 5 examples" in capsys.readouterr().out
    model = SentenceTransformer("icl_sd/model")
    assert examples_of(model)["suffix"] == "\n<response>" and model[0].query_length == 2048 and model.prompts["query"].endswith("query.\n<query>")
    assert model[0].preprocess(["a"], task="query")["input_ids"].shape[1] > model[0].preprocess(["a"], task="document")["input_ids"].shape[1]


def test_what_icl_arguments_mean():
    "One of them says that it is that trainer; its defaults are FlagEmbedding's, and one suffix is for training and search."
    found = translate("flagembedding", {"retrieval_use_examples": "False", "example_query_max_len": "32"})
    assert [found[o] for o in ("examples", "example_query_length", "example_document_length", "retrieval_examples", "suffix")] == [5, 32, 96, False, "\nResponse:"]
    assert translate("flagembedding", {})["examples"] == 0
    found = translate("mine", {"embedder_model_class": "decoder-only-icl", "examples_for_task": "task.json"})
    assert (found["suffix"], found["task_examples"], found["task_examples_format"]) == ("auto", "task.json", "<instruct>{}\n<query>{}\n<response>{}")


def test_the_command_of_gemma(folder, capsys):
    "bge-multilingual-gemma2's, as its manual prints it, but for fp16 and DeepSpeed, on a folder as it comes with a language model: one plain model at the end, which sentence-transformers alone reads."
    bare = tiny_model("gemma2", max_position_embeddings=514, length=512)
    bare.tokenizer.backend_tokenizer.post_processor = TemplateProcessing("[CLS] $A", "[CLS] $A $B", [("[CLS]", bare.tokenizer.bos_token_id)])
    for o in (bare[0].auto_model, bare.tokenizer): o.save_pretrained("gemma")
    said = """--model_name_or_path gemma --cache_dir ./cache/model --use_lora True --lora_rank 32 --lora_alpha 64 --target_modules q_proj k_proj v_proj o_proj gate_proj down_proj up_proj
        --additional_special_tokens <instruct> <query> --save_merged_lora_model True --train_data ./example_data/retrieval ./example_data/sts/sts.jsonl ./example_data/classification-no_in_batch_neg
        --cache_path ./cache/data --train_group_size 8 --query_max_len 512 --passage_max_len 512 --pad_to_multiple_of 8 --knowledge_distillation True --same_dataset_within_batch True --small_threshold 0
        --drop_threshold 0 --output_dir ./gemma_sd --overwrite_output_dir --learning_rate 1e-3 --num_train_epochs 1 --per_device_train_batch_size 2 --dataloader_drop_last True --warmup_ratio 0.1
        --gradient_checkpointing --logging_steps 1 --save_steps 1000 --negatives_cross_device --temperature 0.02 --sentence_pooling_method last_token --normalize_embeddings True --kd_loss_type m3_kd_loss""".split()
    asked = ["--query_instruction_for_retrieval", "Given a query, retrieve passages that are relevant to the query.", "--query_instruction_format", r"<instruct>{}\n<query>{}"]
    assert main(["flagembedding", *said, *asked]) == 0
    out = capsys.readouterr().out
    assert "texts end in [SEP]" in out and "2 new tokens" in out and "the rows of <instruct>, <query>" in out
    plain, ours = SentenceTransformer("gemma_sd/model", device="cpu"), load_encoder("gemma_sd/model")
    assert plain.prompts["query"] == "<instruct>Given a query, retrieve passages that are relevant to the query.\n<query>" and plain[1].pooling_mode == "lasttoken"
    ids = plain.preprocess(["a red bird"], prompt=plain.prompts["query"])["input_ids"][0].tolist()
    assert [ids[o] for o in (0, 1, -1)] == [plain.tokenizer.convert_tokens_to_ids(o) for o in ("[CLS]", "<instruct>", "[SEP]")] and plain.tokenizer.convert_tokens_to_ids("<query>") in ids
    assert np.abs(plain.encode_query(["a red bird"]) - encode(ours, ["a red bird"], "query", progress=False)).max() < 1e-5
    again = tiny_model("gemma2", max_position_embeddings=514, length=512, prompts=plain.prompts)
    add_tokens(again, adapter_tokens("gemma_sd/adapter"))
    assert np.abs(load_adapter(again, "gemma_sd/adapter").encode_query(["a red bird"]) - plain.encode_query(["a red bird"])).max() < 1e-5, "the adapter alone is not the merged model"
    assert main(["flagembedding", *[o if o != "last_token" else "cls" for o in said], *asked]) == 2 and "the first token sees nothing" in capsys.readouterr().err


def rag_rows(rows, **more): Path("t2rank_100.jsonl").write_text("".join(json.dumps(o) + "\n" for o in rows))


def test_the_yaml(folder):
    "RAG-Retrieval's training_embedding.yaml, but for the precision; the loss is its loss for pairs with negatives."
    rag_rows({"query": o["query"], "pos": [i["doc"] for i in o["pos"]], "neg": [i["doc"] for i in o["neg"]]} for o in toy_groups(80, negatives=4))
    said = dict(model_name_or_path="tiny", train_type="train", train_dataset="t2rank_100.jsonl", shuffle=True, neg_nums=15, query_max_len=128, passage_max_len=512, output_dir="./output/t2", save_on_epoch_end=1,
                num_max_checkpoints=5, epochs=2, lr=2e-5, batch_size=32, seed=666, warmup_proportion=0.1, temperature=0.02, mixed_precision="no", gradient_accumulation_steps=3, log_interval=10,
                use_mrl=True, mrl_dims="128, 256")
    Path("training_embedding.yaml").write_text(yaml.safe_dump(said).replace("2.0e-05", "2e-5"))
    assert main(["rag-retrieval", "--config", "training_embedding.yaml"]) == 0
    facts = figures("output/t2")["facts"]["training"]
    assert facts["loss"] == ["InfoNCE(temperature=0.02, in_batch='negatives', positives='each', similarity='cos')", "on the first 256, 128 numbers of each vector"] and facts["gradient_accumulation_steps"] == 3
    assert len([*Path("output/t2").glob("checkpoint-*")]) == 2 and SentenceTransformer("output/t2/model").get_embedding_dimension() == 256
    assert main(["rag-retrieval", "training_embedding.yaml"]) == 2, "there is a run already"


def test_the_yaml_of_a_teacher(folder):
    "distill_embedding.yaml: raw vectors beside a file of texts. No group has a positive, so nothing is measured, which is said."
    rag_rows({"query": text} for o in toy_groups(40) for text in (o["query"], o["pos"][0]["doc"]))
    np.random.default_rng(0).normal(size=(80, 24)).astype("float32").tofile("vectors.mmap")
    said = dict(model_name_or_path="tiny", train_type="distill", train_dataset="t2rank_100.jsonl", train_dataset_vec="vectors.mmap", shuffle=False, query_max_len=512, teatch_emebedding_dim=24, output_dir="./distilled",
                save_on_epoch_end=1, num_max_checkpoints=5, epochs=2, lr=1e-4, batch_size=16, seed=666, warmup_proportion=0.05, mixed_precision="no", log_interval=10, use_mrl=True, mrl_dims="8,16,24")
    Path("distill_embedding.yaml").write_text(yaml.safe_dump(said))
    assert main(["rag-retrieval", "--config", "distill_embedding.yaml"]) == 0
    assert SentenceTransformer("distilled/model").get_embedding_dimension() == 24
    with pytest.raises(InputError, match="no teatch_emebedding_dim"): translate("rag-retrieval", {"train_type": "distill"})


def test_scored_pairs(folder):
    rag_rows({"query": o["query"], "pos": [o["pos"][0]["doc"], o["neg"][0]["doc"]], "scores": [0.9, 0.1]} for o in toy_groups(8))
    assert translate("rag-retrieval", {"train_dataset": "t2rank_100.jsonl"})["loss"] == ["BatchKL(0.02)"]


def test_the_first_nixietune(folder):
    rows = [{"query": o["query"], "doc": o["pos"][0]["doc"], "neg": [o["neg"][0]["doc"]], "negscore": [0.0]} for o in toy_groups(80)]
    Path("train.jsonl").write_text("".join(json.dumps(o) + "\n" for o in rows))
    said = {"model_name_or_path": "tiny", "train_dataset": "train.jsonl", "output_dir": "nixie", "seq_len": 64, "target": "cosine", "num_negatives": 1, "query_prefix": "query: ", "document_prefix": "passage: ",
            "num_train_epochs": 1, "per_device_train_batch_size": 16, "warmup_ratio": 0.1, "lr_scheduler_type": "cosine", "logging_steps": 1}
    Path("biencoder.json").write_text(json.dumps(said))
    assert main(["nixietune", "biencoder.json"]) == 0
    model = SentenceTransformer("nixie/model")
    assert model.prompts == {"query": "query: ", "document": "passage: "} and figures("nixie")["facts"]["training"]["loss"] == ["Cosine(similarity='cos')"]


def test_what_flagembedding_decides_together():
    def losses(**given): return translate("flagembedding", given)["loss"]
    assert losses(knowledge_distillation="True", temperature="0.05") == ["InfoNCE(0.05, in_batch=True, similarity='cos')", "KL(0.05, 1.0, similarity='cos')"]
    assert [read_loss(o) for o in losses(knowledge_distillation=True, kd_loss_type="m3_kd_loss")] == [(M3KD(0.02, 1.0), 1.0), (InfoNCE(0.02, untaught=True), 1.0)]
    assert read_loss(losses(use_inbatch_neg="False", normlized="False")[0]) == (InfoNCE(1.0, in_batch=False, similarity="dot"), 1.0)
    found = translate("flagembedding", {"sub_batch_size": "4", "passage_max_len": "100", "fix_position_embedding": "True", "use_mrl": "True", "mrl_dims": ["256", "64"], "use_lora": "True", "lora_rank": "8"})
    assert found["arguments"] == {"warmup_steps": 0, "negatives_cross_device": False, "cache_gradients": True, "tokens_per_forward": 400}
    assert (found["freeze"], found["dims"], found["lora"], found["lora_rank"], found["lora_alpha"]) == (["position_embeddings"], [256, 64], True, 8, 16.0)
    assert [o for o in objective_of(found).described() if "256, 64" in o]


@pytest.mark.parametrize("system, given, problem", [
    ("flagembedding", {"kd_loss_type": "mse"}, "kd_loss_type='mse'"), ("flagembedding", {"use_mrl": "True"}, "without mrl_dims"), ("flagembedding", {"config_name": "x"}, "brings its configuration"),
    ("flagembedding", {"use_self_distill": "True"}, "without unified_finetuning"), ("flagembedding", {"query_instruction_format": "{} and {}!"}, "two {}"), ("flagembedding", {"temprature": 1}, "no argument 'temprature'"),
    ("flagembedding", {"train_group_size": "many"}, "a whole number"), ("flagembedding", {"logging_dir": "x"}, "TENSORBOARD_LOGGING_DIR"), ("rag-retrieval", {"train_type": "rerank"}, "'train' or 'distill'"),
    ("rag-retrieval", {}, "no train_dataset"), ("nixietune", {"target": "softmax"}, "infonce, mnrl"), ("nixietune", {"streaming": True}, "memory-mapped"), ("word2vec", {}, "flagembedding, rag-retrieval"),
])
def test_refused_with_a_reason(system, given, problem):
    with pytest.raises(InputError, match=problem): translate(system, given)


def test_help_of_a_system(capsys):
    assert main(["flagembedding", "--help"]) == 0
    assert "sub_batch_size" in capsys.readouterr().out
    with pytest.raises(InputError, match="--fp16 twice"): read_command(["--fp16", "--fp16"])


def test_lora_from_a_run_file(folder):
    "An adapter is trained; the model beside it is whole."
    Path("run.yaml").write_text("groups: toy_finetune_data.jsonl\nmodel: tiny\noutput: out\nepochs: 1\nlora: true\nlora_rank: 4\nquery_prompt: 'q: '\nloss: [InfoNCE(0.05), '0.1 * Cosine']\nprecision: fp32\nlogging_steps: 1\n")
    assert main(["train", "run.yaml", "--patience", "2", "--set", "weight_decay=0.01"]) == 0
    assert Path("out/adapter/adapter_model.safetensors").is_file() and SentenceTransformer("out/model").prompts == {"query": "q: ", "document": ""}
    assert main(["train", "run.yaml", "--adapter", "out/adapter", "--output", "again", "--no-measure"]) == 0
    assert Path("again/model/modules.json").is_file() and not Path("again/metrics.json").exists()
    settings = read_settings(TRAIN, "run.yaml", {"patience": 3})
    assert arguments_of(settings)["eval_strategy"] == "epoch" and arguments_of(settings)["load_best_model_at_end"]


def test_under_accelerate(folder):
    "Two processes: batches of each make one step, so there are half as many as with one."
    said = "flagembedding --model_name_or_path tiny --train_data toy_finetune_data.jsonl --output_dir out --per_device_train_batch_size 8 --train_group_size 3 --num_train_epochs 1 --learning_rate 1e-3 --negatives_cross_device"
    Path("ddp.yaml").write_text(config_text("ddp"))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "ddp.yaml", "-m", "nixietune.cli", *said.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert figures("out")["facts"]["training"]["steps"] == 4  # 64 groups, the rest is measured on
