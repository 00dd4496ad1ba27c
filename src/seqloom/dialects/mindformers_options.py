"""The sections of MindFormers' YAML files, by what becomes of them."""

from seqloom.dialects.ledger import Verdict

SECTIONS = {
    "context": "MindSpore's device and graph settings; seqloom runs on PyTorch.",
    "callbacks": "What a run reports and saves is set under `run`.",
    "train_dataset": "Data is given the seqloom way (data.files, data.tokenizer).",
    "train_dataset_task": "Data is given the seqloom way (data.files, data.tokenizer).",
    "train_dataloader": "Data is given the seqloom way (data.files, data.tokenizer).",
    "eval_dataset": "Data is given the seqloom way (data.files, data.tokenizer).",
    "eval_dataset_task": "Data is given the seqloom way (data.files, data.tokenizer).",
    "eval_callbacks": "What a run reports and saves is set under `run`.",
    "processor": "The tokenizer is given the seqloom way (data.tokenizer).",
    "auto_tune": "It measures other settings, and is off in a run.",
    "filepath_prefix": "It measures other settings, and is off in a run.",
    "autotune_per_step": "It measures other settings, and is off in a run.",
    "profile": "It is about the measurement; it does not enter the plan.",
    "runner_wrapper": "The loss scaler of fp16 is seqloom's own.",
    "wrapper": "The loss scaler of fp16 is seqloom's own.",
    "eval_step_interval": "Evaluation does not enter the plan.",
    "metric": "Evaluation does not enter the plan.",
    "layer_scale": "It is for vision models.",
    "layer_decay": "It is for vision models.",
    "lr_scale": "seqloom's schedule has one rate for all layers.",
    "swap_config": "It moves activations to host memory; what is computed, and how it is split, is the same.",
    "monitor_config": "It is about the measurement; it does not enter the plan.",
    "moe_config": "It sets capacities and routing; seqloom routes by the family's own rule and drops no token.",
    "checkpoint": "Where a run saves is set under `run`.",
    "infer": "It is for inference.",
    "output_dir": "Where a run writes is set under `run`.",
    "load_checkpoint": "Weights are given the seqloom way (model.path).",
    "auto_trans_ckpt": "Checkpoints hold names and global shapes; seqloom reads them under any plan.",
    "src_strategy_path_or_dir": "Checkpoints hold names and global shapes; seqloom reads them under any plan.",
    "only_save_strategy": "There is no strategy file; checkpoints hold global shapes.",
    "resume_training": "A run resumes from its folder by itself.",
    "remote_save_url": "Where a run writes is set under `run`.",
}
"""Sections without a part in the layout, by the first word of their names."""

BY_NAME: dict[str, tuple[Verdict, str]] = {
    "parallel.full_batch": ("no effect", "Each rank reads the rows that are its own, whatever this says."),
    "parallel.enable_alltoall": (
        "no effect",
        "It lets the compiler use all-to-all in place of an all-gather; seqloom's ulysses always does.",
    ),
    "parallel.gradients_mean": ("no effect", "Gradients are those of the mean loss over the global batch's labels."),
    "parallel.search_mode": ("no effect", "It is for the automatic mode, which is not on."),
    "parallel.strategy_ckpt_save_file": ("no effect", "There is no strategy file; checkpoints hold global shapes."),
    "parallel.strategy_ckpt_config": ("no effect", "There is no strategy file; checkpoints hold global shapes."),
    "parallel.dataset_strategy": ("no effect", "Each rank reads the rows and tokens that are its own."),
    "parallel_config.gradient_aggregation_group": ("no effect", "It groups sums of gradients; the result is the same."),
    "parallel_config.vocab_emb_dp": (
        "no effect",
        "It repeats the embedding on tensor ranks; seqloom splits the vocabulary over them, with the same result.",
    ),
    "parallel_config.optimizer_shard": ("no effect", "Deprecated, and without effect there too."),
    "parallel_config.mem_coeff": ("no effect", "It is for the automatic mode."),
    "parallel_config.micro_batch_interleave_num": ("mapped", "It enters the batch."),
    "runner_config.sink_mode": ("no effect", "MindSpore's way to feed data."),
    "runner_config.sink_size": ("no effect", "MindSpore's way to feed data."),
    "run_mode": ("no effect", "It is train, finetune, eval or predict there; here the command says it."),
    "use_parallel": ("mapped", "On."),
    "use_legacy": ("mapped", "It chooses between their two kinds of models; see the notes on context parallelism."),
    "seed": ("mapped", "train.schedule.seed."),
}
"""Options with a sentence of their own."""

SCHEDULE = {
    "runner_config.epochs": "epochs",
    "training.steps": "steps",
    "training.max_steps": "steps",
    "training_args.training_steps": "steps",
    "lr_schedule.learning_rate": "learning_rate",
    "lr_schedule.lr_end": "final_learning_rate",
    "lr_schedule.min_lr": "final_learning_rate",
    "lr_schedule.type": "decay",
    "lr_schedule.warmup_ratio": "warmup_share",
    "lr_schedule.warmup_steps": "warmup_steps",
    "lr_schedule.warmup_lr_init": "first_learning_rate",
    "lr_schedule.total_steps": "decay_steps",
    "optimizer.type": "optimizer",
    "optimizer.beta1": "beta1",
    "optimizer.beta2": "beta2",
    "optimizer.betas": "betas",
    "optimizer.eps": "epsilon",
    "optimizer.learning_rate": "learning_rate",
    "optimizer.weight_decay": "weight_decay",
    "optimizer.swap": "swap",
    "runner_wrapper.max_grad_norm": "clip",
    "runner_wrapper.use_clip_grad": "clipped",
    "seed": "seed",
}
"""Options of the schedule, and what `train.schedule` calls them."""


def untouched(name: str) -> tuple[Verdict, str]:
    """The verdict and reason of an option that no rule reads."""
    if name in BY_NAME:
        return BY_NAME[name]
    first = name.partition(".")[0]
    if first in ("lr_schedule", "optimizer"):
        return "changed", "It is not carried over; a run's schedule and optimizer have what `train` names."
    if first == "model":
        return "no effect", "It does not enter `model`: the family sets it, or has no such setting."
    return "no effect", SECTIONS.get(first, "It says nothing about how a run is split; it does not enter the plan.")
