#!/bin/bash
# A launch script as Megatron-LM's and MindSpeed's users have them: Llama 3 8B on 16 devices, its batch ramping up.
#     seqloom train --from megatron examples/from_megatron.sh "data.files=['{stdlib}/*.py']" --scale tiny
NODES=2
GPUS=8
MODEL_ARGS=(
    --num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32
    --group-query-attention --num-query-groups 8
    --swiglu --normalization RMSNorm --disable-bias-linear --position-embedding-type rope --rotary-base 500000
    --untie-embeddings-and-output-weights --attention-dropout 0.0 --hidden-dropout 0.0
    --seq-length 8192 --max-position-embeddings 8192
)
PARALLEL_ARGS=(
    --tensor-model-parallel-size 2 --sequence-parallel
    --context-parallel-size 4 --context-parallel-algo hybrid_cp_algo --ulysses-degree-in-cp 2
    --use-distributed-optimizer
)
TRAINING_ARGS=(
    --micro-batch-size 1 --global-batch-size 128 --rampup-batch-size 32 16 9_600
    --train-samples 1_000_000 --lr 3.0e-4 --min-lr 3.0e-5 --lr-decay-style cosine
    --lr-decay-samples 950_000 --lr-warmup-samples 4_000
    --weight-decay 0.1 --clip-grad 1.0 --adam-beta1 0.9 --adam-beta2 0.95 --bf16
    --recompute-granularity full --recompute-method block --recompute-num-layers 8
)
torchrun --nproc_per_node $GPUS --nnodes $NODES pretrain_gpt.py \
    "${MODEL_ARGS[@]}" "${PARALLEL_ARGS[@]}" ${TRAINING_ARGS[@]}
