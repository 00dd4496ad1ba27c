"""The sections of MindFormers' YAML files, by what becomes of them."""

from difflib import get_close_matches

from seqloom.dialects.ledger import Ledger, Verdict, as_whole, shown

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
    "swap": "It moves activations to host memory; what is computed, and how it is split, is the same.",
    "recompute_comm": "It keeps or repeats single operations; the result is the same.",
    "monitor": "It is about the measurement; it does not enter the plan.",
    "profiler": "It is about the measurement; it does not enter the plan.",
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
    "parallelism.data_parallel_shard_strategy": ("no effect", "Nothing there reads it: parameters are shared out."),
    **dict.fromkeys(
        (
            "parallelism.reshard_after_forward_policy",
            "parallelism.pipeline_parallel_overlap_p2p",
            "parallelism.pipeline_parallel_overlap_b_f",
            "parallelism.pipeline_parallel_enable_dxdw_split",
            "parallelism.pipeline_parallel_p2p_transport",
            "parallelism.enable_mc2",
            "parallelism.npu_nums_per_device",
            "parallelism.moe_token_dispatcher_type",
        ),
        ("no effect", "It says when and how parts are sent and kept; the result is the same."),
    ),
    "parallelism.pipeline_parallel_microbatch_size": ("no effect", "Their trainer reckons it from the batch."),
    "parallelism.disable_gradient_division": (
        "no effect",
        "Gradients are those of the mean loss over the global batch's labels.",
    ),
    "parallelism.enable_loss_parallel": ("no effect", "Nothing there reads it: the vocabulary is split either way."),
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
    "lr_scheduler.learning_rate": "learning_rate",
    "lr_scheduler.lr_end": "final_learning_rate",
    "lr_scheduler.min_lr": "final_learning_rate",
    "lr_scheduler.type": "decay",
    "lr_scheduler.warmup_ratio": "warmup_share",
    "lr_scheduler.warmup_steps": "warmup_steps",
    "lr_scheduler.warmup_lr_init": "first_learning_rate",
    "lr_scheduler.total_steps": "decay_steps",
    "training.max_norm": "clip",
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
    "training.seed": "seed",
}
"""Options of the schedule, and what `train.schedule` calls them."""


_LAYOUT = {
    "parallel_config": (
        "data_parallel model_parallel context_parallel expert_parallel pipeline_stage micro_batch_num seq_split_num "
        "use_seq_parallel optimizer_shard gradient_aggregation_group vocab_emb_dp context_parallel_algo "
        "ulysses_degree_in_cp mem_coeff micro_batch_interleave_num use_3d_tensor_parallel tp_x tp_y tp_z "
        "expert_model_parallel"
    ),
    "parallelism": (
        "data_parallel_shard data_parallel_replicate tensor_parallel tensor_parallel_degree pipeline_parallel "
        "pipeline_parallel_degree context_parallel context_parallel_method context_parallel_async "
        "ulysses_degree_in_cp expert_parallel expert_tensor_parallel data_parallel_shard_strategy sequence_parallel "
        "reshard_after_forward_policy cpu_offload disable_gradient_division pipeline_parallel_schedule "
        "pipeline_parallel_interleave_num pipeline_parallel_layers_per_stage pipeline_parallel_microbatch_size "
        "pipeline_parallel_overlap_p2p pipeline_parallel_overlap_b_f pipeline_parallel_enable_dxdw_split "
        "pipeline_parallel_p2p_transport context_parallel_mask_type enable_loss_parallel enable_mc2 "
        "npu_nums_per_device moe_token_dispatcher_type dense_fsdp_shard_size"
    ),
    "parallel": (
        "parallel_mode full_batch enable_parallel_optimizer parallel_optimizer_config gradients_mean enable_alltoall "
        "search_mode strategy_ckpt_save_file strategy_ckpt_config dataset_strategy pipeline_config device_num "
        "parameter_broadcast loss_repeated_mean auto_pipeline"
    ),
    "recompute_config": (
        "recompute select_recompute select_comm_recompute parallel_optimizer_comm_recompute mp_comm_recompute "
        "recompute_slice_activation select_recompute_exclude select_comm_recompute_exclude"
    ),
}
"""The keys of the sections that hold a layout; a misspelt one must not pass by unseen."""

_MODEL_NOTHING = frozenset(
    [
        "type",
        "model_type",
        "arch",
        "batch_size",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "ignore_token_id",
        "compute_dtype",
        "layernorm_compute_type",
        "layernorm_compute_dtype",
        "softmax_compute_type",
        "softmax_compute_dtype",
        "rotary_dtype",
        "param_init_type",
        "params_dtype",
        "use_past",
        "block_size",
        "num_blocks",
        "is_dynamic",
        "qkv_concat",
        "checkpoint_name_or_path",
        "repetition_penalty",
        "max_decode_length",
        "max_new_tokens",
        "top_k",
        "top_p",
        "temperature",
        "do_sample",
        "parallel_optimizer",
        "fine_grain_interleave",
        "use_kvcache_op",
        "is_flexible_shape",
        "auto_map",
        "return_dict",
        "architectures",
        "use_fused_rope",
        "use_fused_swiglu",
        "apply_rope_fusion",
        "bias_swiglu_fusion",
        "moe_permute_fusion",
    ]
)
"""Keys of a model that are about kernels, types beside the computing one, tokens or inference."""

_SPLIT = {
    "pipeline_interleave": "The plan's pipeline is not interleaved; write schedule=interleaved chunks= in the plan.",
    "seq_split_num": "A sequence is not cut into pieces that follow each other through the pipeline.",
    "use_3d_tensor_parallel": "Tensor ranks are one line here, not a grid of tp_x x tp_y x tp_z; the result is the "
    "same.",
    **dict.fromkeys(("tp_x", "tp_y", "tp_z"), "Tensor ranks are one line here, not a grid of tp_x x tp_y x tp_z."),
}
"""Keys, wherever they stand, of a layout that seqloom's plan does not take over."""


def check_names(ledger: Ledger) -> None:
    """Refuse keys of a layout that are one of theirs misspelt, and a section that is no section."""
    for section, words in _LAYOUT.items():
        known = words.split()
        if ledger.given.get(section) not in (None, {}):
            said = shown(ledger.given[section])
            ledger.refuse(section, f"{section} is {said}, not a section; write its keys, as {known[0]}.")
        for name in ledger.given:
            first, _, key = name.partition(".")
            key = key.partition(".")[0]
            if first != section or not key or key in known or ledger.noted(name):
                continue
            if close := get_close_matches(key, known, 1, 0.8):
                ledger.refuse(name, f"{name} is no option of theirs (did you mean '{close[0]}'?).")
            elif key not in _SPLIT:
                ledger.note(name, "changed", "Not an option that is known here; it does not enter the plan.")


def _is_off(value: object) -> bool:
    """Whether a value leaves its option off: nothing, zero, one of a degree, none."""
    return value in (None, False, "", [], {}) or as_whole(value) in (0, 1) or str(value).lower() in ("none", "false")


def close_all(ledger: Ledger) -> None:
    """Note every option that no rule reads."""
    ledger.close(lambda name: _off_or(name, ledger.given[name]))


def _off_or(name: str, value: object) -> tuple[Verdict, str]:
    key = name.rpartition(".")[2]
    if key in _SPLIT and name not in BY_NAME:
        return ("no effect", "Off.") if _is_off(value) else ("changed", _SPLIT[key])
    verdict, why = untouched(name)
    own = name.startswith(("model.", "model_config.", "pretrained_model_config.", "moe_config."))
    off = value in (None, {}) or (own and value in (0, False))
    return ("no effect", "Off.") if verdict == "changed" and off else (verdict, why)


def untouched(name: str) -> tuple[Verdict, str]:
    """The verdict and reason of an option that no rule reads."""
    if name in BY_NAME:
        return BY_NAME[name]
    first = name.partition(".")[0]
    if first in ("lr_schedule", "lr_scheduler", "optimizer"):
        return "changed", "It is not carried over; a run's schedule and optimizer have what `train` names."
    if first in ("model", "model_config", "pretrained_model_config"):
        if name.rpartition(".")[2] in _MODEL_NOTHING:
            return "no effect", "It is about kernels, types, tokens or inference; the family sets what it needs."
        return "changed", "It is not read here and does not enter `model`; set it in the model's configuration."
    if first == "moe_config":
        return "changed", SECTIONS[first]
    if first in SECTIONS:
        return "no effect", SECTIONS[first]
    return "changed", "Not an option that is known here; it does not enter the plan."
