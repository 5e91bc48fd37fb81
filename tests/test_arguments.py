"Every argument keeps its meaning, or is refused by name; none is ignored."
from dataclasses import fields, MISSING

import pytest

from nixietune.arguments import REFUSED, TrainingArguments
from nixietune.core import InputError
from nixietune.losses import InfoNCE
from nixietune.testing import tiny_model, toy_groups
from nixietune.training import Trainer

# what transformers and sentence-transformers do with it is what a user gets, for what it speaks of is theirs, or is read by us as they read it
KEPT = """output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps warmup_ratio optim optim_args weight_decay
    adam_beta1 adam_beta2 adam_epsilon optim_target_modules gradient_accumulation_steps max_grad_norm bf16 fp16 tf32 activation_checkpointing activation_checkpointing_kwargs
    gradient_checkpointing gradient_checkpointing_kwargs torch_compile torch_compile_backend torch_compile_mode use_cache torch_empty_cache_steps logging_strategy logging_steps
    logging_first_step log_on_each_node logging_nan_inf_filter log_level log_level_replica disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id
    trackio_static_space_id eval_strategy eval_steps eval_delay eval_on_start save_only_model save_strategy save_steps save_on_each_node save_total_limit push_to_hub hub_token
    hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision load_best_model_at_end metric_for_best_model greater_is_better ignore_data_skip
    restore_callback_states_from_checkpoint full_determinism seed data_seed use_cpu accelerator_config dataloader_drop_last dataloader_num_workers dataloader_pin_memory
    dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order remove_unused_columns train_sampling_strategy
    ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout fsdp fsdp_config deepspeed debug skip_memory_metrics
    do_train do_eval do_predict resume_from_checkpoint local_rank prompts learning_rate_mapping""".split()
OURS = {name for name, o in TrainingArguments.__annotations__.items()}
OTHER = {bool: lambda o: not o, float: lambda o: o + 0.5, int: lambda o: o + 1, str: lambda o: f"{o}x", type(None): lambda o: 3}


def test_every_argument_is_thought_of():
    "A field that a new version brings is in no list, and fails here."
    names = {o.name for o in fields(TrainingArguments)}
    assert names == {*KEPT} | {*REFUSED} | OURS and not {*KEPT} & {*REFUSED}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(tmp_path, name):
    field = next(o for o in fields(TrainingArguments) if o.name == name)
    usual = field.default_factory() if field.default is MISSING else field.default
    value = ["x"] if isinstance(usual, (list, dict)) else OTHER.get(type(usual), lambda o: 3)(usual)
    with pytest.raises(InputError, match=f"{name}=.*its default: "): TrainingArguments(str(tmp_path), **{name: value})


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("NIXIETUNE_CACHE", str(tmp_path / "cache"))
    def run(callbacks=(), **more):
        options = dict(learning_rate=5e-3, per_device_train_batch_size=16, precision="fp32", seed=1, logging_steps=1)
        trainer = Trainer(tiny_model(), TrainingArguments(str(tmp_path / "run"), **options | more), toy_groups(64), loss=InfoNCE(0.1), callbacks=list(callbacks))
        trainer.train()
        return trainer
    return run


def losses(trainer): return [o for _, o in trainer.history.column("loss")]


def test_some_that_are_easily_lost(run, capsys):
    "Workers, order, schedule, clipping, precision of products: each does under packing what it says."
    usual = run(num_train_epochs=2)
    assert losses(run(num_train_epochs=2, dataloader_num_workers=2, dataloader_multiprocessing_context="fork", dataloader_in_order=True, dataloader_prefetch_factor=1)) == losses(usual)
    assert losses(run(num_train_epochs=2, gradient_checkpointing=True)) == pytest.approx(losses(usual), abs=1e-4)
    assert losses(run(num_train_epochs=2, data_seed=7)) != losses(usual) == losses(run(num_train_epochs=2, data_seed=1))
    assert usual.state.global_step == 8 and run(max_steps=3).state.global_step == 3
    assert losses(run(num_train_epochs=2, max_grad_norm=1e-6))[-1] > losses(usual)[-1] + 0.2
    rates = [o for _, o in run(num_train_epochs=2, lr_scheduler_type="constant").history.column("learning_rate")]
    assert {*rates} == {5e-3}
    capsys.readouterr()
    run(disable_tqdm=True)
    assert "pairs" not in capsys.readouterr().err


@pytest.mark.slow
def test_torch_compile(run): assert losses(run(max_steps=3, torch_compile=True, torch_compile_backend="eager")) == pytest.approx(losses(run(max_steps=3)), abs=1e-5)
