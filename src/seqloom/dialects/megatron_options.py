"""The options of Megatron-LM, MindSpeed, AscendSpeed and Megatron-DeepSpeed, by what becomes of them."""

from seqloom.dialects.ledger import Verdict

LAYOUT = (
    "--tensor-model-parallel-size",
    "--pipeline-model-parallel-size",
    "--context-parallel-size",
    "--context-parallel-algo",
    "--cp-comm-type",
    "--hierarchical-context-parallel-sizes",
    "--ulysses-degree-in-cp",
    "--cp-window-size",
    "--sequence-parallel",
    "--expert-model-parallel-size",
    "--expert-tensor-parallel-size",
    "--num-layers-per-virtual-pipeline-stage",
    "--num-virtual-stages-per-pipeline-rank",
    "--use-distributed-optimizer",
    "--zero-stage",
    "--tp-2d",
    "--tp-x",
    "--tp-y",
    "--micro-batch-size",
    "--global-batch-size",
    "--rampup-batch-size",
    "--seq-length",
    "--num-attention-heads",
    "--num-query-groups",
    "--recompute-granularity",
    "--recompute-method",
    "--recompute-num-layers",
)
"""Names that a misspelt one must not pass by unseen."""

SCHEDULE = {
    "--train-iters": "steps",
    "--train-samples": "samples",
    "--train-tokens": "tokens",
    "--lr": "learning_rate",
    "--min-lr": "final_learning_rate",
    "--lr-decay-style": "decay",
    "--lr-decay-iters": "decay_steps",
    "--lr-decay-samples": "decay_samples",
    "--lr-decay-tokens": "decay_tokens",
    "--lr-warmup-iters": "warmup_steps",
    "--lr-warmup-samples": "warmup_samples",
    "--lr-warmup-tokens": "warmup_tokens",
    "--lr-warmup-fraction": "warmup_share",
    "--lr-warmup-init": "first_learning_rate",
    "--lr-wsd-decay-iters": "wsd_steps",
    "--lr-wsd-decay-samples": "wsd_samples",
    "--initial-loss-scale": "initial_loss_scale",
    "--loss-scale-window": "loss_scale_window",
    "--weight-decay": "weight_decay",
    "--clip-grad": "clip",
    "--adam-beta1": "beta1",
    "--adam-beta2": "beta2",
    "--adam-eps": "epsilon",
    "--optimizer": "optimizer",
    "--seed": "seed",
}
"""Options of the schedule, and what `train.schedule` calls them."""

_DATA = "Data is given the seqloom way (data.files, data.tokenizer); it does not enter the plan."
_FILES = "Where a run writes and how often it reports is set under `run`; it does not enter the plan."
_KERNEL = "It chooses a kernel or fuses operations; what is computed, and how it is split, is the same."
_OVERLAP = "It hides or groups communication; what is sent to whom, and the result, are the same."
_MEMORY = "It trades memory for time on a rank; what is computed, and how it is split, is the same."
_START = "It is the launcher's; seqloom starts its processes with torchrun or on its own."
_WEIGHTS = "It shapes the model's weights; it enters `model` as far as that family has it, not the plan."
_INFER = "It is for inference or fine-tuning, which are not translated; it does not enter the plan."
_LOSS = "It is about precision of sums; seqloom keeps gradients, sums and optimizer states in float32."

NO_EFFECT = {
    _DATA: (
        "--data-path --train-data-path --valid-data-path --test-data-path --split --vocab-file --merge-file "
        "--vocab-size --tokenizer-type --tokenizer-model --tokenizer-name-or-path --tokenizer-not-use-fast "
        "--data-impl --data-cache-path --dataloader-type --num-workers --mock-data --reset-position-ids "
        "--eod-mask-loss --make-vocab-size-divisible-by --padded-vocab-size --pad-vocab-size-to "
        "--no-create-attention-mask-in-dataloader --mmap-warmup --is-instruction-dataset --variable-seq-lengths "
        "--no-shuffle --shuffle --handler-name --append-eod --legacy-tokenizer --num-dataset-builder-threads"
    ),
    _FILES: (
        "--save --load --save-interval --log-interval --eval-interval --eval-iters --tensorboard-dir "
        "--tensorboard-queue-size --log-throughput --log-params-norm --log-num-zeros-in-grad "
        "--log-timers-to-tensorboard --log-batch-size-to-tensorboard --log-validation-ppl-to-tensorboard "
        "--wandb-project --wandb-exp-name --wandb-save-dir --timing-log-level --exit-interval "
        "--exit-duration-in-mins --no-load-optim --no-load-rng --no-save-optim --no-save-rng --finetune "
        "--pretrained-checkpoint --profile --profile-step-start --profile-step-end --profile-ranks --ckpt-format "
        "--dist-ckpt-format --auto-detect-ckpt-format --distributed-timeout-minutes --log-memory-to-tensorboard "
        "--log-path --kill-switch-path --use-dist-ckpt --override-opt_param-scheduler --use-checkpoint-args "
        "--skip-train --manual-gc --manual-gc-interval --codecarbon-dir --log-level --log-level-replica "
        "--no-async-tensor-model-parallel-allreduce"
    ),
    _KERNEL: (
        "--use-fused-rmsnorm --use-fused-swiglu --use-fused-rotary-pos-emb --use-fused-rotary-pos-emb-new "
        "--no-masked-softmax-fusion --no-bias-gelu-fusion --no-bias-swiglu-fusion --no-bias-dropout-fusion "
        "--no-rope-fusion --no-gradient-accumulation-fusion --transformer-impl --use-mcore-models "
        "--use-legacy-models --use-cp-send-recv-overlap --use-fused-ring-attention-update --megatron-cp-in-bnsd "
        "--use-mc2 --use-fused-mlp --use-fusion-attn-v2 --fused-rmsnorm --use-npu-mc2 "
        "--jit-compile --use-fused-moe-token-permute-and-unpermute --moe-grouped-gemm --disable-bias-linear-fusion "
        "--no-persist-layer-norm --use-contiguous-buffers-in-local-ddp --bias-gelu-fusion "
        "--no-scaled-masked-softmax-fusion --enable-token-rearrange-opt --npu-deterministic --shape-order "
        "--attention-backend --use-cpu-initialization --sync-tp-duplicated-parameters"
    ),
    _OVERLAP: (
        "--overlap-grad-reduce --overlap-param-gather --no-overlap-p2p-communication --overlap-p2p-communication "
        "--no-scatter-gather-tensors-in-pipeline --ddp-bucket-size --delay-grad-reduce --delay-param-gather "
        "--tp-comm-split-ag --tp-comm-split-rs --tp-comm-bulk-dgrad --tp-comm-bulk-wgrad --use-ascend-coc --coc-mode "
        "--coc-parallel-num --coc-fused-kernel --enable-overlap-ag-with-matmul --enable-overlap-matmul-with-rs "
        "--align-param-gather --nccl-communicator-config-path --use-ring-exchange-p2p --variable-pipeline "
        "--optimize-vpp-send-recv-comm --use-nanopipe --use-nd-matmul --use-sharp --moe-pad-expert-input-to-capacity "
        "--use-ulysses-allgather-kv --ddp-num-buckets --DDP-impl"
    ),
    _MEMORY: (
        "--recompute-activation-function --recompute-activation-function-num-layers --recompute-norm "
        "--recompute-norm-num-layers --swap-attention --swap-modules --adaptive-recompute-device-size "
        "--adaptive-recompute-device-swap --reuse-fp32-param --enable-recompute-layers-per-pp-rank "
        "--recompute-in-bubble --recompute-in-advance --context-parallel-kv-cache-policy "
        "--context-parallel-cache-interval --adaptive-memory-optimization --smart-swap --empty-unused-memory-level "
        "--synchronize-each-layer --contigious-checkpointing --profile-backward --split-transformers"
    ),
    _START: (
        "--nproc_per_node --nproc-per-node --nnodes --node_rank --node-rank --master_addr --master-addr "
        "--master_port --master-port --rdzv_id --rdzv-id --rdzv_backend --rdzv-backend --rdzv_endpoint "
        "--rdzv-endpoint --max_restarts --max-restarts --tee --role --log_dir --standalone --hostfile --num_gpus "
        "--num_nodes --local_rank --local-rank --launcher --use_env --local-addr --redirects --worker_num "
        "--lazy-mpu-init"
    ),
    _WEIGHTS: (
        "--init-method-std --untie-embeddings-and-output-weights --disable-bias-linear --add-bias-linear "
        "--use-rotary-position-embeddings --position-embedding-type --rotary-base --normalization --norm-epsilon "
        "--layernorm-epsilon --swiglu --group-query-attention --kv-channels --qk-layernorm --add-qkv-bias --qkv-bias "
        "--no-position-embedding --embed-layernorm --square-alibi-mask --fill-neg-inf --mlp-layer-fusion "
        "--no-query-key-layer-scaling --apply-query-key-layer-scaling --multi-latent-attention --seq-aux --spec "
        "--add-dense-bias"
    ),
    _INFER: (
        "--task --task-data --stage --max-new-tokens "
        "--inference-batch-times-seqlen-threshold --prompt-type --use-kv-cache --add-eos-token "
        "--inference-max-seq-length"
    ),
    _LOSS: (
        "--attention-softmax-in-fp32 --accumulate-allreduce-grads-in-fp32 --fp32-residual-connection "
        "--initial-loss-scale --loss-scale --min-loss-scale --loss-scale-window --hysteresis --grad-reduce-in-bf16 "
        "--fp16-lm-cross-entropy --cross-entropy-loss-fusion --no-query-key-layer-scaling --main-grads-dtype "
        "--main-params-dtype --exp-avg-dtype --exp-avg-sq-dtype --pipeline-no-flushes"
    ),
}
"""Options without a part in the layout, by the reason why."""

_REASONS = {name: why for why, names in NO_EFFECT.items() for name in names.split()}

_NOT_CARRIED = (
    "--rotary-percent --rotary-seq-len-interpolation-factor --rope-scaling-type --rope-scaling-factor "
    "--use-rope-scaling --rope-type --sliding-window --squared-relu --openai-gelu --moe-layer-freq "
    "--apply-layernorm-1p "
    "--apply-residual-connection-post-layernorm --init-method-xavier-uniform --moe-router-topk-scaling-factor "
    "--moe-shared-expert-intermediate-size --norm-topk-prob --use-glm-rope --q-lora-rank --kv-lora-rank "
    "--qk-head-dim --qk-nope-head-dim --qk-pos-emb-head-dim --qk-rope-head-dim --v-head-dim --moe-ffn-hidden-size "
    "--n-shared-experts --first-k-dense-replace --n-group --topk-group --window-size --softmax-type --mtp-num-layers "
    "--noop-layers --pre-tockens "
    "--next-tockens"
)
"""Options that change the model where it is trained, and enter it for few families or none."""

BY_NAME: dict[str, tuple[Verdict, str]] = {
    "--distributed-backend": ("no effect", "The backend follows the device: NCCL on GPUs, gloo on CPU."),
    "--deepspeed": ("mapped", "ZeRO stages are seqloom's own (zero=); DeepSpeed itself is not used."),
    "--use-flash-attn": ("mapped", "seqloom's attention never builds the matrix of scores; this is always so."),
    **{
        name: ("mapped", "seqloom's attention never builds the matrix of scores; this is always so.")
        for name in ("--use-flash-attn-v1", "--use-flash-attn-v2", "--use-flash-attn-triton")
    },
    "--force-ds-sequence-parallel": ("mapped", "--ds-sequence-parallel-size says it."),
    "--no-pipeline-parallel": (
        "mapped",
        "pipeline=1; in Megatron-DeepSpeed it chooses the model class without a pipeline.",
    ),
    "--attention-mask-type": (
        "mapped",
        "seqloom's masks are exact for causal, documents and windows; causal is the default.",
    ),
    "--cp-attention-mask-type": ("mapped", "The older name of --attention-mask-type; causal is seqloom's default."),
    "--reset-attention-mask": (
        "mapped",
        "Documents packed in a sequence do not see each other; seqloom's data always keeps them apart.",
    ),
    "--kv-head-repeat-before-uly-alltoall": (
        "mapped",
        "seqloom sends each key/value head to the ranks that need it, repeated where there are too few.",
    ),
    "--hybrid-context-parallel": (
        "no effect",
        "Megatron-LM's hybrid context parallelism sizes the group for each sample; here every sample takes the plan's. "
        "It is not MindSpeed's hybrid_cp_algo.",
    ),
    "--tp-comm-overlap": ("mapped", "tensor_overlap=ring: gathers and products in steps that overlap."),
    "--no-check-for-nan-in-loss-and-grad": ("no effect", "seqloom ends a run whose loss or gradient is not finite."),
    "--check-for-nan-in-loss-and-grad": ("mapped", "seqloom always does."),
    **{
        name: ("changed", "seqloom does not compute in fp8; numbers are those of train.precision.")
        for name in ("--fp8-format", "--fp8-param-gather", "--fp8-recipe", "--fp8-hybrid", "--fp8-e4m3", "--fp4-format")
    },
    **{
        name: ("no effect", "It belongs to fp8, in which seqloom does not compute.")
        for name in ("--fp8-amax-history-len", "--fp8-amax-compute-algo", "--fp8-margin", "--fp8-interval")
    },
    **{
        name: ("changed", "seqloom has one learning rate for all weights.")
        for name in ("--decoupled-lr", "--decoupled-min-lr")
    },
    **{
        name: ("changed", "It is not carried into `model`; where the family has it, say it by model.config.KEY=VALUE.")
        for name in _NOT_CARRIED.split()
    },
    **{
        name: ("changed", "Weight decay is the same in all steps here, that of --weight-decay.")
        for name in ("--start-weight-decay", "--end-weight-decay", "--weight-decay-incr-style")
    },
    **{
        name: ("changed", "There are no adapters; all weights are trained.")
        for name in ("--lora-r", "--lora-alpha", "--lora-target-modules", "--lora-load", "--lora-fusion")
    },
    "--schedules-method": ("changed", "The plan's schedule is the usual one; write schedule= in the plan."),
    "--lr-wsd-decay-style": ("changed", "The fall at the end is linear here."),
    "--calculate-per-token-loss": ("mapped", "seqloom's loss is always the mean over the labels of the global batch."),
    "--moe-router-load-balancing-type": ("no effect", "The family's own auxiliary loss is used."),
    **{
        name: ("changed", "It enters no plan; what the model's own configuration says of its router counts.")
        for name in ("--moe-aux-loss-coeff", "--moe-z-loss-coeff", "--moe-expert-capacity-factor")
    },
    **{
        name: ("changed", "Layers go to stages by seqloom's own rule, or as stages= says.")
        for name in (
            "--pp-partition-method",
            "--pipeline-model-parallel-layout",
            "--decoder-first-pipeline-num-layers",
            "--decoder-last-pipeline-num-layers",
            "--account-for-embedding-in-pipeline-split",
            "--account-for-loss-in-pipeline-split",
        )
    },
    "--step-batch-size-schedule": ("changed", "The batch is that of --global-batch-size from the first step on."),
    "--moe-token-dispatcher-type": (
        "no effect",
        "Experts' tokens go by all-to-all with uneven counts; the result is the same.",
    ),
}
"""Options with a sentence of their own."""


def untouched(name: str) -> tuple[str, str] | None:
    """The verdict and reason of an option that no rule reads, None where it is not known."""
    if name in BY_NAME:
        return BY_NAME[name]
    return ("no effect", _REASONS[name]) if name in _REASONS else None
