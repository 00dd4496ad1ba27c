"""The options of Colossal-AI's plugins, benchmark programs and configuration files, by what becomes of them."""

import re

from seqloom.dialects.ledger import Ledger, Verdict
from seqloom.errors import DialectError

HYBRID = [
    "tp_size",
    "pp_size",
    "sp_size",
    "precision",
    "zero_stage",
    "enable_all_optimization",
    "enable_fused_normalization",
    "enable_flash_attention",
    "enable_jit_fused",
    "enable_sequence_parallelism",
    "sequence_parallelism_mode",
    "parallel_output",
    "num_microbatches",
    "microbatch_size",
    "initial_scale",
    "min_scale",
    "growth_factor",
    "backoff_factor",
    "growth_interval",
    "hysteresis",
    "max_scale",
    "max_norm",
    "broadcast_buffers",
    "ddp_bucket_cap_mb",
    "find_unused_parameters",
    "check_reduction",
    "gradient_as_bucket_view",
    "static_graph",
    "zero_bucket_size_in_m",
    "cpu_offload",
    "communication_dtype",
    "overlap_communication",
    "custom_policy",
    "pp_style",
    "num_model_chunks",
    "scheduler_nodes",
    "num_layers_per_stage",
    "gradient_checkpoint_config",
    "enable_metadata_cache",
    "make_vocab_size_divisible_by",
    "dp_outside",
    "overlap_p2p",
    "overlap_allgather",
    "fp8_communication",
    "use_fp8",
    "inner_ring_size",
]
"""The arguments of HybridParallelPlugin, in their order."""

GEMINI = [
    "chunk_config_dict",
    "chunk_init_device",
    "placement_policy",
    "enable_gradient_accumulation",
    "max_prefetch",
    "shard_param_frac",
    "offload_optim_frac",
    "offload_param_frac",
    "warmup_non_model_data_ratio",
    "steady_cuda_cap_ratio",
    "precision",
    "master_weights",
    "pin_memory",
    "force_outputs_fp32",
    "strict_ddp_mode",
    "search_range_m",
    "hidden_dim",
    "min_chunk_size_m",
    "memstats",
    "gpu_margin_mem_ratio",
    "initial_scale",
    "min_scale",
    "growth_factor",
    "backoff_factor",
    "growth_interval",
    "hysteresis",
    "max_scale",
    "max_norm",
    "norm_type",
    "tp_size",
    "extra_dp_size",
    "enable_all_optimization",
    "enable_fused_normalization",
    "enable_flash_attention",
    "enable_sequence_parallelism",
    "enable_jit_fused",
    "enable_sequence_overlap",
    "enable_async_reduce",
    "use_fp8",
    "fp8_communication",
    "enable_tensor_parallelism",
    "verbose",
]
"""The arguments of GeminiPlugin; only names count, since their order changed between releases."""

MOE = ["ep_size", "moe_dp_outside", "overlap_p2p", "use_ep_inside", "checkpoint_io", "dp_outside"]
"""What MoeHybridParallelPlugin takes beside the arguments of HybridParallelPlugin."""

_KERNEL = "It chooses kernels; what is computed, and how it is split, is the same."
_SCALER = "It belongs to the loss scaler of fp16; seqloom's own starts and grows by its own rule."
_BUCKET = "It sizes or overlaps communication; what is sent to whom, and the result, are the same."
_GEMINI = "It tunes Gemini's chunks and memory; seqloom shards each layer's parameters as a whole."
_FP8 = "seqloom neither computes nor sends in fp8; numbers are those of the precision."
_MEASURE = "It is about the measurement or its data; it does not enter the plan."

_GIVEN = "Data, weights and what a run saves are given the seqloom way."

_GROUPS = {
    _KERNEL: "enable_jit_fused enable_fused_normalization enable_metadata_cache -x --xformers",
    _SCALER: "initial_scale min_scale growth_factor backoff_factor growth_interval hysteresis max_scale",
    _BUCKET: (
        "broadcast_buffers ddp_bucket_cap_mb find_unused_parameters check_reduction gradient_as_bucket_view "
        "static_graph "
        "zero_bucket_size_in_m communication_dtype overlap_communication overlap_p2p overlap_allgather "
        "enable_sequence_overlap "
        "enable_async_reduce --overlap_p2p --overlap_allgather --disable-async-reduce"
    ),
    _GEMINI: (
        "chunk_config_dict chunk_init_device enable_gradient_accumulation max_prefetch warmup_non_model_data_ratio "
        "steady_cuda_cap_ratio master_weights pin_memory force_outputs_fp32 strict_ddp_mode search_range_m hidden_dim "
        "min_chunk_size_m memstats gpu_margin_mem_ratio norm_type verbose --prefetch_num --no_cache -w --warmup_ratio "
        "-m --memory_limit"
    ),
    _GIVEN: (
        "--dataset --pretrain --tokenizer_dir --save_path --save_dir --save_interval --checkpoint_path --config_file "
        "--log_dir --log_interval --load_checkpoint --num_workers --use_wandb --wandb --tensorboard_dir --pretrained "
        "--pad_token"
    ),
    _MEASURE: "-s --num_steps -i --ignore_steps --profile --nsys --debug",
}

BY_NAME: dict[str, tuple[Verdict, str]] = {
    "enable_all_optimization": (
        "mapped",
        "Flash attention and fused kernels: seqloom's attention never builds the matrix of scores anyway. The "
        "documentation "
        "says that it turns sequence parallelism on too; their code does not, and neither does this.",
    ),
    "enable_flash_attention": ("mapped", "seqloom's attention never builds the matrix of scores; this is always so."),
    "--use_flash_attn": ("mapped", "seqloom's attention never builds the matrix of scores; this is always so."),
    "parallel_output": (
        "no effect",
        "The loss is always computed on each rank's own tokens or part of the vocabulary.",
    ),
    "make_vocab_size_divisible_by": ("no effect", "A vocabulary of any size is split, without padding."),
    "custom_policy": ("changed", "It is not read; models are split by seqloom's own plans of their family."),
    "gradient_checkpoint_config": (
        "no effect",
        "It refines recomputation that the model switches on; set recompute= in the plan.",
    ),
    "scheduler_nodes": ("no effect", "zbv's schedule is derived here, from the plan."),
    "moe_dp_outside": ("no effect", "It orders ranks; see the note on rank order."),
    "max_norm": ("mapped", "train.schedule.clip."),
    "verbose": ("no effect", "seqloom prints its own progress."),
    "TENSOR_SHAPE": ("no effect", "Stages tell each other the shapes they send."),
    "clip_grad_norm": ("mapped", "train.schedule.clip."),
    "cudnn_benchmark": ("no effect", _KERNEL),
    "seed": ("mapped", "train.schedule.seed."),
}
"""Options with a sentence of their own."""

_REASONS = {name: why for why, names in _GROUPS.items() for name in names.split()}


def said_version(ledger: Ledger, version: str | None) -> None:
    """Note --dialect-version. Raises DialectError where it is none."""
    if version is None:
        return
    if not re.match(r"v?\d{1,4}\.\d{1,4}", version):
        raise DialectError(f"'{version[:40]}' is no version; give 0.4.3 and the like of Colossal-AI.")
    old = re.match(r"v?0\.4\.[34]\b", version) is not None
    why = "It decides inner rings of ring_attn alone, which 0.4.3 and 0.4.4 choose themselves."
    ledger.note("--dialect-version", "mapped" if old else "no effect", why, value=version)


def close(ledger: Ledger, unknown: str = "Not an option that is known here; it does not enter the plan.") -> None:
    """Note every option of a plugin or command line that no rule reads; an unknown one may change anything."""
    ledger.close(lambda name: _off_or(name, ledger.given[name], unknown))


def _off_or(name: str, value: object, unknown: str) -> tuple[Verdict, str]:
    if name in ("fp8_communication", "use_fp8", "--use_fp8_comm", "--use_fp8"):
        return ("changed", _FP8) if value else ("no effect", "Off.")
    if name == "custom_policy" and value is None:
        return "no effect", "None is given."
    if name == "enable_flash_attention" and not value:
        return "no effect", f"Off there; {BY_NAME[name][1]}"
    if name == "enable_all_optimization" and not value:
        return "no effect", "Off."
    if name == "master_weights" and value is False:
        return "changed", "Weights are kept and stepped in float32 here, whatever they are computed in."
    if name in BY_NAME or name in _REASONS or name in HYBRID or name in GEMINI or name in MOE:
        return untouched(name)
    return "changed", unknown


def untouched(name: str) -> tuple[Verdict, str]:
    """The verdict and reason of an option that no rule reads."""
    if name in BY_NAME:
        return BY_NAME[name]
    return "no effect", _REASONS.get(name, "It says nothing about how a run is split; it does not enter the plan.")
