"Configurations are what accelerate reads, and mean what their names say. None of them has run on GPUs: see the page on several processes."
import os
import subprocess
import sys

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.deepspeed import HfDeepSpeedConfig

from nixietune.cli import main
from nixietune.configs import config_path, config_text, CONFIGS
from nixietune.testing import tiny_model
from nixietune.training import name_layers

KINDS = {"ddp": "MULTI_GPU", "fsdp": "FSDP", "deepspeed_zero1": "DEEPSPEED", "deepspeed_zero2": "DEEPSPEED", "deepspeed_zero3": "DEEPSPEED"}


@pytest.mark.parametrize("name", [o for o in CONFIGS if CONFIGS[o][0].endswith(".yaml")])
def test_accelerate_reads_them(name):
    "accelerate refuses keys that it does not know."
    read = load_config_from_file(str(config_path(name)))
    assert read.distributed_type.value == KINDS[name] and read.num_processes == 2
    if name == "fsdp": assert read.fsdp_config["fsdp_version"] == 2
    if "zero" in name: assert read.deepspeed_config["zero_stage"] == int(name[-1])


@pytest.mark.parametrize("stage", [0, 1])
def test_deepspeed_reads_them(stage):
    read = HfDeepSpeedConfig(str(config_path(f"deepspeed_stage{stage}")))
    assert read.get_value("zero_optimization.stage") == stage and read.get_value("train_micro_batch_size_per_gpu") == "auto"


@pytest.mark.parametrize("kind, layer", [("bert", "BertLayer"), ("qwen3", "Qwen3DecoderLayer"), ("modernbert", "ModernBertEncoderLayer")])
def test_layers_that_fsdp_divides(kind, layer, monkeypatch):
    "accelerate finds the transformer's layers in a SentenceTransformer, which by itself does not name them."
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "")
    monkeypatch.delenv("FSDP_TRANSFORMER_CLS_TO_WRAP")
    model = tiny_model(kind)
    def wrapped():
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="TRANSFORMER_BASED_WRAP")
        plugin.set_auto_wrap_policy(model)
        return {o.__name__ for o in plugin.auto_wrap_policy.keywords["transformer_layer_cls"]}
    assert not wrapped(), "then this is not needed any more"
    name_layers(model)
    assert layer in wrapped()


def test_the_command(capsys):
    assert main(["config", "fsdp"]) == 0
    assert capsys.readouterr().out == config_text("fsdp")
    assert main(["config", "fsdp", "--path"]) == 0
    assert capsys.readouterr().out.strip() == str(config_path("fsdp"))
    assert main(["config"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in CONFIGS)
    assert main(["config", "zero9"]) == 2


def test_accelerate_does_not_pretend(tmp_path):
    "Asked for FSDP on processors, accelerate runs plain data parallelism and says nothing; we refuse."
    code = f"from nixietune.arguments import TrainingArguments; TrainingArguments({str(tmp_path / 'run')!r}, use_cpu=True)"
    for kind in ("FSDP", "DEEPSPEED"):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {f"ACCELERATE_USE_{kind}": "true"})
        assert done.returncode and f"{kind.lower()} without a GPU" in done.stderr
