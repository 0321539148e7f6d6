"""What somebody may have meant by the name of a field that does not exist."""

import difflib
from collections.abc import Mapping

from darkformer_jax.config.base import fields

_LIKE_ENOUGH = 0.6  # of difflib's ratio, from 0 to 1
_MOST_SHOWN = 3

# Names that other libraries give to what a field here is, by that field. `section_name` stands for a name in a section.
_ELSEWHERE: Mapping[str, str] = {
    "num_steps": "steps max_steps n_steps num_train_steps train_steps training_steps total_steps iters max_iters "
    "num_iters num_iterations iterations max_iterations",
    "batch_size": "batch bs global_batch_size train_batch_size per_device_train_batch_size per_device_batch_size",
    "sequence_length": "seq_len seqlen seq_length max_seq_len max_seq_length max_len max_length context context_len "
    "context_length context_size ctx_len n_ctx block_size max_position_embeddings n_positions",
    "accumulation_steps": "grad_accum grad_accum_steps grad_accumulation gradient_accumulation "
    "gradient_accumulation_steps accumulate_grad_batches micro_batches",
    "init_from": "pretrained pretrained_model model_name_or_path from_pretrained load_from init_checkpoint",
    "seed": "random_seed rng_seed",
    "task.name": "task_type problem_type objective",
    "model.vocab_size": "vocab n_vocab num_tokens",
    "model.num_layers": "n_layer n_layers num_layer nlayers layers num_hidden_layers num_blocks n_blocks depth",
    "model.embed_dim": "d_model dim hidden hidden_size hidden_dim n_embd n_embed emb_dim embedding_dim embedding_size "
    "model_dim width",
    "model.num_heads": "n_head n_heads nhead nheads heads num_attention_heads num_query_heads",
    "model.num_kv_heads": "n_kv_head n_kv_heads kv_heads num_key_value_heads num_query_groups",
    "model.head_dim": "d_head dim_head head_size d_kv",
    "model.mlp_dim": "d_ff ff_dim ffn_dim dim_feedforward intermediate_size ffn_hidden_size mlp_size mlp_ratio",
    "model.activation": "act hidden_act activation_function act_fn",
    "model.norm_eps": "rms_norm_eps layer_norm_eps layer_norm_epsilon norm_epsilon",
    "model.rope_theta": "theta rope_base rotary_base rotary_emb_base",
    "model.qkv_bias": "bias attention_bias use_bias",
    "model.tie_embeddings": "tie_word_embeddings tie_weights weight_tying",
    "model.dtype": "precision mixed_precision compute_dtype torch_dtype bf16 fp16 fp32",
    "model.remat": "gradient_checkpointing activation_checkpointing grad_checkpointing",
    "model.lora_rank": "lora lora_r",
    "model.causal": "is_causal bidirectional is_decoder",
    "model.attention.kind": "attention attn attention_type attn_type attn_implementation mechanism mixer",
    "model.attention.num_features": "features nb_features n_features num_random_features m num_buckets n_buckets",
    "model.attention.num_hashes": "hashes n_hashes",
    "model.attention.window": "window_size sliding_window local_attention attention_window",
    "model.attention.num_sinks": "sinks attention_sinks sink_size",
    "model.attention.chunk_size": "chunk chunk_len chunk_length",
    "model.attention.conv_width": "conv conv_size conv_kernel d_conv kernel_size",
    "model.attention.positions": "rope alibi position_embedding_type pos_emb",
    "data.files": "data_dir data_path data_file data_files train_file train_files train_data dataset dataset_name "
    "dataset_path corpus text path",
    "data.tokenizer": "tokenizer_name tokenizer_path tokenizer_file",
    "data.heldout_fraction": "val_fraction val_split valid_split validation_split validation_fraction test_size "
    "heldout holdout",
    "data.num_workers": "workers dataloader_num_workers num_proc",
    "optimizer.learning_rate": "lr max_lr peak_lr base_lr learningrate",
    "optimizer.final_fraction": "min_lr end_lr lr_min final_lr min_lr_ratio",
    "optimizer.warmup_steps": "warmup warm_up warmup_iters num_warmup_steps warmup_ratio lr_warmup_steps",
    "optimizer.schedule": "scheduler lr_schedule lr_scheduler lr_scheduler_type lr_decay decay_lr",
    "optimizer.b1": "beta1 beta_1 adam_beta1",
    "optimizer.b2": "beta2 beta_2 adam_beta2",
    "optimizer.eps": "epsilon adam_eps adam_epsilon",
    "optimizer.weight_decay": "wd l2",
    "optimizer.clip_norm": "clip grad_clip gradient_clip grad_clip_norm clip_grad clip_grad_norm max_grad_norm "
    "gradient_clip_val",
    "optimizer.train": "freeze trainable",
    "eval.every": "eval_interval eval_steps eval_freq val_every val_interval val_check_interval evaluation_steps",
    "eval.batches": "eval_iters limit_val_batches",
    "eval.batch_size": "eval_bs val_batch_size per_device_eval_batch_size",
    "eval.patience": "early_stopping early_stopping_patience",
    "checkpoint.every": "save_every save_interval save_steps save_freq checkpoint_interval checkpoint_steps ckpt_every",
    "checkpoint.keep": "save_total_limit max_to_keep keep_last",
    "log.every": "log_interval log_steps log_freq logging_steps",
    "log.trackers": "report_to tracker logger wandb mlflow",
    "sample.max_new_tokens": "max_tokens",
    "distill.workdir": "teacher",
    "mesh.data": "num_gpus gpus devices num_devices n_gpu",
    "mesh.tensor": "tp tensor_parallel tensor_parallel_size",
    "mesh.fsdp": "dp_shard zero_stage",
}
_HERE = {name: field for field, names in _ELSEWHERE.items() for name in names.split()}

# What there is nothing of here, and what is there instead.
_NOTHING: Mapping[str, str] = {
    **dict.fromkeys(
        ("epochs", "num_epochs", "n_epochs", "max_epochs", "num_train_epochs"),
        "a run is so many steps long, whatever the data: --config.num_steps (of --config.batch_size rows of "
        "--config.sequence_length tokens)",
    ),
    **dict.fromkeys(
        (
            *("dropout", "dropout_rate", "resid_pdrop", "embd_pdrop", "attn_pdrop", "attention_dropout"),
            *("hidden_dropout", "dropout_p", "lora_dropout", "drop_path"),
        ),
        "there is no dropout here; --config.optimizer.weight_decay and --config.eval.patience are against overfitting",
    ),
    "label_smoothing": "there is no label smoothing here; --config.optimizer.z_loss keeps logits small",
    **dict.fromkeys(
        ("num_experts", "n_experts", "moe", "num_local_experts", "top_k_experts"), "there are no experts here"
    ),
    **dict.fromkeys(
        ("momentum", "optim", "optimizer_name", "optimizer_type", "opt"),
        "the optimizer is AdamW: --config.optimizer.b1, b2, eps and weight_decay",
    ),
    **dict.fromkeys(
        ("device", "accelerator", "cuda", "use_gpu", "no_cuda"),
        "JAX takes the accelerators that it finds; JAX_PLATFORMS=cpu in the environment keeps a run on the CPU",
    ),
}


def meant(name: str) -> str:
    """What to do instead of setting the field `name`, such as "did you mean --config.batch_size?"; "" = no idea.

    name: dotted or not, with hyphens or underscores, and without `--config.`.
    """
    name = name.lower().replace("-", "_")
    *sections, own = name.split(".")
    spellings = [*(f"{section}_{own}" for section in reversed(sections)), own]  # eval.interval is eval_interval, too
    nothing = next((_NOTHING[spelling] for spelling in spellings if spelling in _NOTHING), "")
    if nothing:
        return nothing
    found = [name] if name in fields() else _known(spellings) or _closest(name)
    return f"did you mean {_either([f'--config.{field}' for field in found[:_MOST_SHOWN]])}?" if found else ""


def _known(spellings: list[str]) -> list[str]:
    """The field that other libraries call so, and those whose last part it is. The first spelling that is known."""
    for spelling in spellings:
        same = [_HERE[spelling]] if spelling in _HERE else []
        if found := same + [field for field in _at_any_level(spelling) if field not in same]:
            return found
    return []


def _at_any_level(own: str) -> list[str]:
    """The fields whose last part is `own`, in the config's order."""
    return [field for field in fields() if field.rpartition(".")[2] == own]


def _closest(name: str) -> list[str]:
    """The field that is spelled most like `name`, by its dotted name or by the last parts alone."""

    def likeness(field: str) -> tuple[float, float]:
        pairs = (name, field), (name.rpartition(".")[2], field.rpartition(".")[2])
        whole, own = (difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)
        return max(whole, own), whole

    best = max(fields(), key=likeness)
    return [best] if likeness(best)[0] >= _LIKE_ENOUGH else []


def _either(names: list[str]) -> str:
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))
