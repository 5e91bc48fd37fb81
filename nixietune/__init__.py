"""Fine-tune embedding models for your own search, and see whether it got better.

Importing this package costs nothing: a public name loads its module when it is first used.
"""

__version__ = "0.1.0"

from importlib import import_module

# public name -> the module it lives in
_NAMES = {
    name: module
    for module, names in {
        "core": "InputError runtime set_seed",
        "display": "quiet",
        "groups": "load_groups write_groups make_groups load_corpus corpus_of",
        "texts": "split_groups",
        "samples": "lay_terms docstrings",
        "encoder": "load_encoder encode set_max_length",
        "adapters": "add_head add_lora add_tokens adapter_tokens load_adapter save_adapter merge_adapter save_merged freeze",
        "embeddings": "embed",
        "recipes": "recipe",
        "testing": "tiny_model toy_groups toy_corpus",
        "index": "search",
        "evaluation": "evaluate evaluate_run write_trec_run",
        "comparison": "compare clusters_of",
        "auditing": "audit split_by_length drop_duplicates merge_queries mask unify_documents forget_ids limit_hubs drop_seen add_positives drop_suspicious drop_teacher teacher_to_score squash_teacher sort_by_grade keep_script",
        "candidates": "evaluate_candidates evaluate_pairs",
        "compression": "evaluate_compressed",
        "pool": "dev_pool",
        "suites": "evaluate_msmarco evaluate_mteb mteb_task",
        "probes": "forgetting",
        "mining": "mine_negatives find_false_negatives relabel",
        "teachers": "teacher_vectors load_vectors join_vectors",
        "scoring": "score_groups as_scorer yes_logit query_likelihood bm25_scorer blend teacher_summary",
        "losses": "InfoNCE Cosine Contrastive Triplet CoSENT KL BatchKL M3KD MarginMSE",
        "objectives": "Objective Matryoshka PerDataset",
        "distillation": "DistillVectors",
        "foreign": "SentenceTransformersLoss",
        "planning": "plan",
        "memory": "memory_of memory_table",
        "arguments": "TrainingArguments",
        "training": "Trainer",
        "experiments": "finetune",
        "tuning": "tune",
        "remining": "Remine",
        "curves": "learning_curve",
        "merging": "mix_models mix_models_with_data mix_models_by_layers merge_sweep",
        "m3": "M3 load_m3 save_m3 encode_m3 m3_scores evaluate_m3 m3_scorer m3_evaluator",
        "icl": "set_examples examples_of examples_from evaluate_icl InContext",
        "launching": "launch",
        "runs": "write_evaluation read_evaluation read_result",
        "reporting": "report write_run",
        "widgets": "side_by_side search_box refused_at margin_slider mix_at merge_slider plot_both_maps plot_both_scores",
    }.items()
    for name in names.split()
}

__all__ = sorted(_NAMES)


def __getattr__(name):
    if name not in _NAMES: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_NAMES[name]}", __name__), name)
    globals()[name] = value  # found without this function from now on
    return value


def __dir__(): return sorted({*globals(), *_NAMES})
