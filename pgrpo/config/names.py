"""From a key that does not exist to the one that was meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

# What TRL, verl and OpenRLHF call it (the end of their dotted names) -> our key, and a word where the meaning differs.
FOREIGN = {
    "num_generations": "rollout.group_size",
    "n": "rollout.group_size",
    "n_samples_per_prompt": "rollout.group_size",
    "rollout_n": "rollout.group_size",
    "max_completion_length": "rollout.max_completion_tokens",
    "max_response_length": "rollout.max_completion_tokens",
    "max_new_tokens": "rollout.max_completion_tokens",
    "max_tokens": "rollout.max_completion_tokens",
    "generate_max_len": "rollout.max_completion_tokens",
    "stop_strings": "rollout.stop",
    "use_vllm": "rollout.engine",
    "rollout_batch_size": "rollout.prompts_per_step",
    "train_batch_size": "rollout.prompts_per_step (prompts, not samples)",
    "generation_batch_size": "rollout.prompts_per_step (prompts, not samples)",
    "max_prompt_length": "data.max_prompt_tokens",
    "prompt_max_len": "data.max_prompt_tokens",
    "truncation": "data.overlong",
    "dataset_name": "data.path",
    "dataset": "data.path",
    "prompt_data": "data.path",
    "train_files": "data.path",
    "val_files": "data.eval_path",
    "eval_dataset": "data.eval_path",
    "dataset_config": "data.name",
    "dataset_config_name": "data.name",
    "dataset_split": "data.split",
    "prompt_split": "data.split",
    "dataset_train_split": "data.split",
    "dataset_test_split": "data.eval_split",
    "eval_dataset_split": "data.eval_split",
    "shuffle_dataset": "data.shuffle",
    "input_key": "prompt.messages_column",
    "prompt_key": "prompt.messages_column",
    "input_template": "prompt.template",
    "prompt_template": "prompt.template",
    "system_prompt": "prompt.messages",
    "reward_funcs": "rewards.functions",
    "reward_function": "rewards.functions",
    "reward_weights": "rewards.functions (each has a weight)",
    "beta": "loss.kl_coef",
    "kl_loss_coef": "loss.kl_coef",
    "init_kl_coef": "loss.kl_coef",
    "epsilon": "loss.clip_low",
    "epsilon_high": "loss.clip_high",
    "eps_clip": "loss.clip_low and loss.clip_high",
    "eps_clip_low_high": "loss.clip_low and loss.clip_high",
    "clip_ratio": "loss.clip_low and loss.clip_high",
    "clip_ratio_low": "loss.clip_low",
    "clip_ratio_high": "loss.clip_high",
    "loss_type": "loss.aggregate",
    "loss_agg_mode": "loss.aggregate",
    "scale_rewards": "loss.scale_advantages",
    "norm_adv_by_std_in_grpo": "loss.scale_advantages",
    "learning_rate": "optim.lr",
    "actor_learning_rate": "optim.lr",
    "lr_scheduler_type": "optim.schedule",
    "lr_scheduler": "optim.schedule",
    "lr_warmup_steps": "optim.warmup_steps",
    "warmup_ratio": "optim.warmup_steps",
    "lr_warmup_ratio": "optim.warmup_steps",
    "adam_beta1": "optim.betas",
    "adam_beta2": "optim.betas",
    "adam_betas": "optim.betas",
    "adam_epsilon": "optim.eps",
    "l2": "optim.weight_decay",
    "max_norm": "optim.max_grad_norm",
    "grad_clip": "optim.max_grad_norm",
    "max_steps": "train.steps",
    "total_training_steps": "train.steps",
    "num_train_epochs": "train.steps (steps, not epochs)",
    "num_episodes": "train.steps (steps, not epochs)",
    "total_epochs": "train.steps (steps, not epochs)",
    "steps_per_generation": "train.updates_per_step",
    "num_iterations": "train.updates_per_step (each update takes its share of the prompts, once)",
    "ppo_epochs": "train.updates_per_step (each update takes its share of the prompts, once)",
    "ppo_mini_batch_size": "train.updates_per_step (updates, not samples)",
    "per_device_train_batch_size": "train.token_budget (micro-batches are cut by tokens)",
    "gradient_accumulation_steps": "train.token_budget (micro-batches are cut by tokens)",
    "micro_train_batch_size": "train.token_budget (micro-batches are cut by tokens)",
    "ppo_micro_batch_size_per_gpu": "train.token_budget (micro-batches are cut by tokens)",
    "ppo_max_token_len_per_gpu": "train.token_budget",
    "train_max_tokens_per_gpu": "train.token_budget",
    "max_tokens_per_gpu": "train.token_budget",
    "model_name_or_path": "model.path",
    "model_name": "model.path",
    "model.name": "model.path",
    "model.model": "model.path",
    "data.dataset": "data.path",
    "pretrain": "model.path",
    "model_revision": "model.revision",
    "torch_dtype": "model.dtype",
    "bf16": "model.dtype",
    "attn_implementation": "model.attention",
    "lora_r": "model.lora_rank",
    "lora_target_modules": "model.lora_targets",
    "target_modules": "model.lora_targets",
    "gradient_checkpointing": "model.activation_checkpointing",
    "enable_gradient_checkpointing": "model.activation_checkpointing",
    "output_dir": "run_dir",
    "default_local_dir": "run_dir",
    "save_path": "run_dir",
    "save_steps": "checkpoint.every",
    "save_freq": "checkpoint.every",
    "save_total_limit": "checkpoint.keep",
    "max_ckpt_num": "checkpoint.keep",
    "max_actor_ckpt_to_keep": "checkpoint.keep",
    "eval_steps": "eval.every",
    "test_freq": "eval.every",
    "eval_temperature": "eval.temperature",
    "eval_n_samples_per_prompt": "eval.samples",
    "logging_steps": "track.console_every",
    "log_completions": "track.completions",
    "num_completions_to_print": "track.completions",
    "report_to": "track.wandb or track.tensorboard",
    "use_wandb": "track.wandb",
    "use_tensorboard": "track.tensorboard",
    "project_name": "track.wandb_project",
    "wandb_project": "track.wandb_project",
}


def suggest(key: str, valid: Iterable[str]) -> str:
    """How to mend ``key``, given every valid dotted key: another trainer's name, the wrong section, or a typo."""
    valid = sorted(valid)
    parts = re.sub(r"\[\d+\]", "", key).split(".")
    last = parts[-1]
    if ours := FOREIGN.get(".".join(parts[-2:])):
        return f"here it is {ours}"
    if same := [name for name in valid if name.rpartition(".")[2] == last]:
        return f"here it is {' or '.join(same)}"
    if last in FOREIGN:
        return f"here it is {FOREIGN[last]}"
    if near := difflib.get_close_matches(key, [n for n in valid if n.count(".") == key.count(".")], n=1, cutoff=0.75):
        return f"did you mean {near[0]}?"
    tails = {name.rpartition(".")[2]: name for name in valid}
    if near := difflib.get_close_matches(last, tails, n=1, cutoff=0.6):
        return f"did you mean {tails[near[0]]}?"
    section = key.partition(".")[0]
    siblings = [name for name in valid if name.startswith(f"{section}.")] or [n for n in valid if "." not in n]
    return f"valid keys: {', '.join(siblings)}"
