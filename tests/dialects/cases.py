"""Settings as people run them, and the layouts they mean."""

from collections.abc import Mapping
from textwrap import dedent
from types import MappingProxyType
from typing import Any, NamedTuple


class Case(NamedTuple):
    """Settings, the processes there are, and what must come of them.

    plan: as `Plan.parse` reads it. train: values of `train` that must be there. notes: (option, verdict, words of the
    reason) that must be there.
    """

    settings: str
    world: int | None
    plan: str
    train: Mapping[str, Any] = MappingProxyType({})
    notes: tuple[tuple[str, str, str], ...] = ()
    version: str | None = None


def _mindspeed(tensor: int, pipeline: int, context: int, more: str) -> str:
    return (
        f"--tensor-model-parallel-size {tensor} --pipeline-model-parallel-size {pipeline} "
        f"--context-parallel-size {context} {more}"
    )


RING = "--context-parallel-algo megatron_cp_algo"
HYBRID = "--context-parallel-algo hybrid_cp_algo --ulysses-degree-in-cp 2"
ULYSSES = "--context-parallel-algo ulysses_cp_algo"

MEGATRON = {
    "hybrid of a long sequence on 4": Case(
        _mindspeed(
            1, 1, 4, f"{HYBRID} --sequence-parallel --micro-batch-size 1 --global-batch-size 2 --seq-length 65536"
        ),
        4,
        "ring=2 ulysses=2",
        {"sequence_length": 65536, "micro_batch": 1, "global_batch": 2, "accumulate": 2},
        (("--sequence-parallel", "no effect", "one tensor rank"),),
    ),
    "hybrid with tensor": Case(
        _mindspeed(
            2, 1, 4, f"{HYBRID} --sequence-parallel --micro-batch-size 1 --global-batch-size 8 --seq-length 4096"
        ),
        8,
        "tensor=2 ring=2 ulysses=2",
        {"accumulate": 8},
        (("--ulysses-degree-in-cp", "mapped", "context 4 / ulysses 2 = ring 2"),),
    ),
    "double ring": Case(
        _mindspeed(2, 1, 4, f"{RING} --cp-window-size 2 --sequence-parallel --micro-batch-size 1"),
        8,
        "tensor=2 ring=4 inner_ring=2",
    ),
    "tensor in two dimensions": Case(
        _mindspeed(4, 1, 2, f"{RING} --tp-2d --tp-x 2 --tp-y 2 --micro-batch-size 2 --global-batch-size 16"),
        8,
        "tensor=4 tensor_kind=2d ring=2",
        {"micro_batch": 2, "global_batch": 16, "accumulate": 8},
    ),
    "128 processes of tensor, pipeline and ring": Case(
        _mindspeed(
            8, 4, 4, f"{RING} --sequence-parallel --seq-length 32768 --micro-batch-size 1 --global-batch-size 32"
        ),
        128,
        "tensor=8 pipeline=4 ring=4",
    ),
    "256 processes": Case(
        _mindspeed(8, 8, 4, f"{RING} --sequence-parallel --micro-batch-size 1 --global-batch-size 16"),
        256,
        "tensor=8 pipeline=8 ring=4",
    ),
    "ulysses with recomputation by blocks": Case(
        _mindspeed(
            8,
            1,
            8,
            f"{ULYSSES} --sequence-parallel --seq-length 262144 --micro-batch-size 1 --global-batch-size 32 "
            "--recompute-granularity full --recompute-method block --recompute-num-layers 48",
        ),
        128,
        "data=2 tensor=8 ulysses=8 recompute=full:block:48",
        {"recompute": "full:block:48", "sequence_length": 262144},
    ),
    "48 heads over ulysses and tensor": Case(
        _mindspeed(
            8,
            1,
            2,
            f"{ULYSSES} --sequence-parallel --num-attention-heads 48 --micro-batch-size 1 --global-batch-size 64",
        ),
        32,
        "data=2 tensor=8 ulysses=2",
        {},
        (("--num-attention-heads", "mapped", "divide evenly"),),
    ),
    "BLOOM with a batch that grows": Case(
        "--tensor-model-parallel-size 8 --sequence-parallel --num-layers 30 --hidden-size 4096 "
        "--num-attention-heads 32 "
        "--position-embedding-type alibi --rampup-batch-size 192 16 9_765_625 --global-batch-size 512 "
        "--micro-batch-size 4 --seq-length 2048 --zero-stage 0 --deepspeed",
        8,
        "tensor=8",
        {"ramp_up": {"start": 192, "increment": 16, "samples": 9_765_625}, "global_batch": 512},
        (
            ("--zero-stage", "mapped", "zero=0"),
            ("--rampup-batch-size", "mapped", "ignores"),
            ("model", "mapped", "bloom-7b1"),
        ),
    ),
    "Llama 3 with a flag commented out": Case(
        dedent(
            """\
            GPUS=8
            PP=4
            MODEL=(
                --num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32
                --group-query-attention --num-query-groups 8 --kv-channels 128
                --position-embedding-type rope --normalization RMSNorm --swiglu
                --seq-length 8192   # as the model
            )
            PARALLEL=(
                --tensor-model-parallel-size 1
                --context-parallel-size 1
                # --pipeline-model-parallel-size $PP
                --sequence-parallel
            )
            torchrun --nproc_per_node $GPUS --nnodes 1 pretrain_gpt.py ${MODEL[@]} "${PARALLEL[@]}" \\
                --micro-batch-size 1 --global-batch-size 128 --bf16
            """
        ),
        None,
        "data=8",
        {"accumulate": 16, "precision": "bf16"},
        (
            ("--sequence-parallel", "no effect", "one tensor rank"),
            ("PP", "no effect", "never passed"),
            ("model", "mapped", "llama3-8b"),
        ),
    ),
    "Megatron-LM's own hybrid": Case(
        _mindspeed(
            1,
            2,
            4,
            "--cp-comm-type a2a+p2p --hierarchical-context-parallel-sizes 2 2 --micro-batch-size 4 "
            "--global-batch-size 32",
        ),
        8,
        "pipeline=2 ring=2 ulysses=2",
        {"accumulate": 8},
    ),
    "a degree set and never passed": Case(
        "CP=16\nTP=8\npython -m torch.distributed.launch --nproc_per_node 8 pretrain_gpt.py "
        "--tensor-model-parallel-size ${TP} --sequence-parallel --micro-batch-size 1\n",
        None,
        "tensor=8",
        {},
        (("CP", "no effect", "never passed"),),
    ),
    "context without an algorithm": Case(
        _mindspeed(1, 1, 4, "--micro-batch-size 1"),
        4,
        "ulysses=4",
        {},
        (("--context-parallel-algo", "changed", "core_r0.8.0"),),
    ),
    "the same of a later release": Case(
        _mindspeed(1, 1, 4, "--micro-batch-size 1"), 4, "ring=4", {}, (), "2.1.0_core_r0.12.1"
    ),
    "the same of Megatron-LM": Case(_mindspeed(1, 1, 4, "--micro-batch-size 1"), 4, "ring=4", {}, (), "megatron-lm"),
    "hybrid of ulysses alone": Case(
        _mindspeed(1, 1, 2, f"{HYBRID} --micro-batch-size 1"),
        2,
        "ulysses=2",
        {},
        (("--ulysses-degree-in-cp", "changed", "refused there"),),
    ),
    "context 8 with ulysses 2": Case(_mindspeed(1, 1, 8, f"{HYBRID} --micro-batch-size 1"), 8, "ring=4 ulysses=2"),
    "key/value all-gather": Case(
        _mindspeed(1, 1, 4, "--context-parallel-algo kvallgather_cp_algo"), 4, "ring=4 exchange=gather"
    ),
    "sums and defaults of a shell": Case(
        dedent(
            """\
            A=${NONE:-4}
            WORLD_SIZE=$((A * 2))
            ARGS="--tensor-model-parallel-size=$(($A/2))
                --sequence-parallel"
            ARGS+=" --use-distributed-optimizer"
            IPs=('a' 'b')
            if [ ${#IPs[@]} -eq 2 ]; then MB=2; else MB=3; fi
            python pretrain.py $ARGS --micro-batch-size $MB | tee "log $A.txt"
            """
        ),
        None,
        "data=4 tensor=2 zero=1",
        {"micro_batch": 2},
    ),
    "a DeepSpeed configuration that the script writes": Case(
        dedent(
            """\
            STAGE=2
            cat <<EOT > ds.json
            {"zero_optimization": {"stage": $STAGE}, "bf16": {"enabled": true}, "steps_per_print": 1}
            EOT
            deepspeed --num_gpus 4 pretrain_gpt.py --zero-stage 1 --deepspeed --deepspeed_config ds.json \\
                --distributed-backend nccl --deepspeed-activation-checkpointing --checkpoint-activations
            """
        ),
        None,
        "data=4 zero=2 recompute=full",
        {"precision": "bf16"},
        (
            ("--zero-stage", "no effect", "stage 2"),
            ("deepspeed_config.zero_optimization.stage", "mapped", "zero=2"),
            ("deepspeed_config.steps_per_print", "no effect", ""),
            ("--distributed-backend", "no effect", "gloo"),
        ),
    ),
}


def _plugin(arguments: str, moe: bool = False) -> str:
    return f"plugin = {'Moe' if moe else ''}HybridParallelPlugin({arguments})"


ON = "enable_sequence_parallelism=True, sequence_parallelism_mode="

COLOSSALAI = {
    "the tutorial's split_gather": Case(
        _plugin(f'tp_size=4, sp_size=1, enable_all_optimization=True, {ON}"split_gather"'),
        4,
        "tensor=4",
        {"precision": "fp16"},
        (("pp_size", "changed", "missing"), ("enable_all_optimization", "mapped", "does not")),
    ),
    "the tutorial's all_to_all": Case(
        _plugin(f'tp_size=2, sp_size=2, enable_all_optimization=True, {ON}"all_to_all"'),
        8,
        "data=2 tensor=2 ulysses=2 sequence_parallel=false",
        {},
        (("rank order", "changed", "ulysses, tensor, data"),),
    ),
    "the tutorial's ring_attn": Case(
        _plugin(f'tp_size=2, sp_size=2, enable_all_optimization=True, {ON}"ring_attn"'),
        8,
        "data=2 tensor=2 ring=2 sequence_parallel=false",
    ),
    "a ring alone": Case(_plugin(f'tp_size=1, pp_size=1, sp_size=4, zero_stage=0, {ON}"ring_attn"'), 4, "ring=4"),
    "a ring in a pipeline": Case(
        _plugin(f'tp_size=1, pp_size=2, sp_size=2, num_microbatches=2, zero_stage=1, {ON}"ring_attn"'),
        4,
        "ring=2 pipeline=2 zero=1",
        {"accumulate": 2},
    ),
    "all_to_all in tensor": Case(
        _plugin(f'tp_size=2, pp_size=1, sp_size=2, zero_stage=0, {ON}"all_to_all"'),
        4,
        "tensor=2 ulysses=2 sequence_parallel=false",
    ),
    "the overlapped ring, which is no ring attention": Case(
        _plugin(f'tp_size=2, pp_size=1, sp_size=1, zero_stage=2, {ON}"ring"'),
        4,
        "data=2 tensor=2 tensor_overlap=ring zero=2",
        {},
        (("sequence_parallelism_mode", "mapped", "not ring attention"),),
    ),
    "split_gather in a pipeline": Case(
        _plugin(f'tp_size=2, pp_size=2, zero_stage=1, num_microbatches=4, {ON}"split_gather"'),
        4,
        "tensor=2 pipeline=2",
        {},
        (("zero", "no effect", "one rank"),),
    ),
    "ring with a sequence degree of its own": Case(
        _plugin(f'tp_size=2, pp_size=1, sp_size=2, {ON}"ring"'),
        4,
        "data=2 tensor=2 tensor_overlap=ring",
        {},
        (("sp_size", "no effect", "whatever"),),
    ),
    "experts over data": Case(
        _plugin(f'ep_size=2, zero_stage=1, pp_size=1, tp_size=1, sp_size=2, {ON}"all_to_all"', moe=True),
        4,
        "data=2 ulysses=2 expert=2 zero=1",
    ),
    "MoE without experts spread": Case(
        _plugin(f'ep_size=1, zero_stage=1, pp_size=1, tp_size=2, sp_size=2, {ON}"all_to_all"', moe=True),
        8,
        "data=2 tensor=2 ulysses=2 sequence_parallel=false zero=1",
    ),
    "MoE with ZeRO-2": Case(
        _plugin("ep_size=2, zero_stage=2, pp_size=1, tp_size=1", moe=True),
        4,
        "data=4 expert=2 zero=1",
        {},
        (("zero_stage", "changed", "stage 1"),),
    ),
    "a mode that the benchmark leaves off": Case(
        "benchmark.py -p 3d --tp 4 --sp_mode split_gather",
        8,
        "data=2 tensor=4 sequence_parallel=false",
        {"precision": "bf16"},
        (("--sp_mode", "no effect", "stays off"),),
    ),
    "the same turned on by a degree that is ignored": Case(
        "benchmark.py -p 3d --tp 4 --sp 4 --sp_mode split_gather", 8, "data=2 tensor=4"
    ),
    "Gemini": Case(
        "plugin = GeminiPlugin(tp_size=2, enable_tensor_parallelism=True, precision='bf16', initial_scale=2**16)",
        8,
        "data=4 tensor=2 sequence_parallel=false zero=3",
        {"precision": "bf16"},
        (("initial_scale", "no effect", "scaler"),),
    ),
    "Gemini with fractions of its own": Case(
        "GeminiPlugin(offload_optim_frac=0.5, extra_dp_size=2)", 8, "data=8 zero=3 zero_replicas=2 offload=true"
    ),
    "Gemini by itself": Case("GeminiPlugin(placement_policy='auto')", 4, "data=4 zero=3 offload=true"),
    "the benchmark's Gemini": Case(
        "benchmark.py -p gemini --tp 2 -c 7b -b 4 -l 2048", 8, "data=4 tensor=2 sequence_parallel=false zero=3"
    ),
    "a whole program": Case(
        dedent(
            """\
            import torch, colossalai
            TP = 2
            config = LlamaConfig(hidden_size=256, num_hidden_layers=2, num_attention_heads=8, vocab_size=1000)
            plugin = HybridParallelPlugin(TP, 1, 2, enable_sequence_parallelism=True,
                                          sequence_parallelism_mode="ring_attn", precision="bf16", inner_ring_size=None)
            loader = plugin.prepare_dataloader(data, batch_size=2, shuffle=True, seed=42)
            """
        ),
        8,
        "data=2 tensor=2 ring=2 sequence_parallel=false",
        {"global_batch": 4},
        (("model", "mapped", "LlamaConfig"), ("prepare_dataloader.seed", "no effect", "")),
    ),
    "the older configuration in two dimensions": Case(
        "parallel = dict(data=1, pipeline=1, tensor=dict(size=4, mode='2d'))",
        8,
        "data=2 tensor=4 tensor_kind=2d",
        {},
        (("parallel.data", "no effect", "ignores"),),
    ),
    "in two and a half": Case(
        "CONFIG = dict(parallel=dict(data=1, pipeline=1, tensor=dict(size=8, mode='2.5d', depth=2)))",
        8,
        "tensor=8 tensor_kind=2.5d depth=2",
    ),
    "in three": Case("parallel = {'pipeline': 1, 'tensor': {'size': 8, 'mode': '3d'}}", 8, "tensor=8 tensor_kind=3d"),
    "a long pipeline": Case(
        "NUM_MICRO_BATCHES = 192\nparallel = dict(pipeline=32, tensor=dict(size=4, mode='1d'))",
        128,
        "pipeline=32 tensor=4 sequence_parallel=false",
        {"accumulate": 192},
    ),
    "a pipeline of grids": Case(
        "parallel = dict(pipeline=dict(size=24), tensor=dict(size=4, mode='2.5d', depth=1))",
        96,
        "pipeline=24 tensor=4 tensor_kind=2.5d",
    ),
    "ring self-attention": Case(
        "parallel = dict(pipeline=1, tensor=dict(size=4, mode='sequence'))",
        8,
        "data=2 ring=4 exchange=rsa layout=contiguous",
    ),
    "a file with an import that would open a window": Case(
        "from tkinter import X\nfrom colossalai.amp import AMP_TYPE\nimport math\nS = int(math.sqrt(16))\n"
        "fp16 = dict(mode=AMP_TYPE.NAIVE)\nparallel = dict(pipeline=1, tensor=dict(size=2, mode='1d'))",
        2,
        "tensor=2 sequence_parallel=false",
        {"precision": "fp16"},
        (("S", "changed", "Not read here"),),
    ),
}


def _yaml(config: str, model: str = "", more: str = "") -> str:
    """A static-graph file: parallel_config, model_config and further lines, as flow mappings."""
    return (
        f"use_parallel: True\nparallel: {{parallel_mode: 1}}\nparallel_config: {{{config}}}\n"
        f"model: {{model_config: {{{model}}}}}\n{more}\n"
    )


MINDFORMERS = {
    "a ring of 131072 tokens": Case(
        _yaml(
            "data_parallel: 1, model_parallel: 2, pipeline_stage: 2, context_parallel: 16, micro_batch_num: 64",
            "seq_length: 131072, use_flash_attention: True, use_ring_attention: True",
            "runner_config: {batch_size: 1}",
        ),
        64,
        "tensor=2 pipeline=2 ring=16 layout=contiguous sequence_parallel=false",
        {"global_batch": 64, "accumulate": 64, "sequence_length": 131072},
    ),
    "an all-gather with sequence parallelism": Case(
        "parallel: {enable_alltoall: True, parallel_mode: 1}\n"
        + _yaml(
            "data_parallel: 1, model_parallel: 8, context_parallel: 16, pipeline_stage: 1, expert_parallel: 16, "
            "use_seq_parallel: True",
            "seq_length: 4096, use_flash_attention: True, use_attn_mask_compression: True",
        ).replace("parallel: {parallel_mode: 1}\n", ""),
        128,
        "tensor=8 ring=16 exchange=gather layout=contiguous expert=16 expert_tensor=8",
        {},
        (
            ("parallel_config.use_seq_parallel", "mapped", "incompatible"),
            ("model.model_config.use_attn_mask_compression", "mapped", "16,777,216 bytes"),
            ("parallel.enable_alltoall", "no effect", ""),
        ),
    ),
    "tensor and pipeline": Case(
        _yaml(
            "data_parallel: 1, model_parallel: 8, pipeline_stage: 8, context_parallel: 1, use_seq_parallel: True, "
            "micro_batch_num: 8",
            "use_flash_attention: True, use_attn_mask_compression: True, seq_length: 2048",
        ),
        64,
        "tensor=8 pipeline=8",
    ),
    "gradients gathered over 64 micro-batches": Case(
        _yaml(
            "data_parallel: 4, model_parallel: 2, pipeline_stage: 1, use_seq_parallel: True",
            "",
            "runner_config: {batch_size: 2, gradient_accumulation_steps: 64}",
        ),
        8,
        "data=4 tensor=2",
        {"global_batch": 512, "micro_batch": 2, "accumulate": 64},
    ),
    "experts in data": Case(
        _yaml("data_parallel: 2, model_parallel: 4, pipeline_stage: 4, expert_parallel: 2, micro_batch_num: 8"),
        32,
        "data=2 tensor=4 pipeline=4 expert=2 expert_tensor=4 sequence_parallel=false",
        {"global_batch": 16},
    ),
    "ulysses": Case(
        "parallel: {enable_alltoall: True}\nparallel_config: {context_parallel: 2, context_parallel_algo: ulysses_cp}\n"
        "model: {model_config: {use_flash_attention: True, num_heads: 8, n_kv_heads: 2}}",
        2,
        "ulysses=2",
    ),
    "a hybrid": Case(
        _yaml(
            "context_parallel: 16, context_parallel_algo: hybrid_cp, ulysses_degree_in_cp: 8",
            "use_flash_attention: True",
        ),
        16,
        "ring=2 ulysses=8 exchange=gather layout=contiguous",
        {},
        (("parallel_config.ulysses_degree_in_cp", "mapped", "context 16 / ulysses 8 = 2"),),
    ),
    "context 8 with ulysses 2 and a ring": Case(
        _yaml(
            "context_parallel: 8, context_parallel_algo: hybrid_cp, ulysses_degree_in_cp: 2",
            "use_flash_attention: True, use_ring_attention: True",
        ),
        8,
        "ring=4 ulysses=2 layout=contiguous",
    ),
    "context without flash attention": Case(
        _yaml("context_parallel: 2"),
        2,
        "ring=2 exchange=gather layout=contiguous",
        {},
        (("use_flash_attention", "changed", "refused there"),),
    ),
    "the newer hybrid": Case(
        "parallelism: {context_parallel: 4, context_parallel_method: hybrid, ulysses_degree_in_cp: 2}",
        4,
        "zero=3 ring=2 ulysses=2 exchange=gather layout=contiguous",
        {},
        (("zero", "mapped", "-1, their default"),),
    ),
    "a model with its optimizer shared out": Case(
        _yaml(
            "data_parallel: 8, model_parallel: 1",
            "type: LlamaConfig, hidden_size: 4096, num_layers: 32, num_heads: 32, vocab_size: 32000, seq_length: 4096, "
            "compute_dtype: bfloat16, use_flash_attention: True",
            "trainer: {model_name: llama2_7b}\nrecompute_config: {recompute: True}",
        ).replace("parallel_mode: 1", "parallel_mode: semi_auto_parallel, enable_parallel_optimizer: True"),
        None,
        "data=8 zero=1 recompute=full",
        {"precision": "bf16", "recompute": "full"},
        (("model", "mapped", "llama2-7b"),),
    ),
}
