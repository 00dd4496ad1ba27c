"""Megatron-style flags that are rare, contradict each other, or lie in a DeepSpeed configuration."""

import json

import pytest

from seqloom.dialects import Note, translate
from seqloom.dialects.megatron_options import BY_NAME, NO_EFFECT
from seqloom.dialects.models import ROPE_OF_LLAMA31
from seqloom.dialects.translation import Translation
from seqloom.errors import DialectError


def read(flags: str, world: int | None = None, version: str | None = None) -> tuple[Translation, dict[str, Note]]:
    """What flags come to, and the last note on each option."""
    found = translate("megatron", [flags], world=world, version=version)
    return found, {note.option: note for note in found.notes}


def deepspeed(config: dict[str, object], flags: str = "") -> str:
    """A script that writes a configuration and starts 4 processes with it."""
    command = "deepspeed --num_gpus 4 pretrain_gpt.py --deepspeed --deepspeed_config ds.json"
    return f"cat <<'EOT' > ds.json\n{json.dumps(config)}\nEOT\n{command} {flags}"


@pytest.mark.parametrize(
    ("flags", "world", "says"),
    [
        ("--tensor-model-parallel-size --bf16", 4, "is given without a value"),
        ("--tensor-model-parallel-size 2 --num-experts 8", 4, "need --sequence-parallel"),
        (
            "--pipeline-model-parallel-size 2 --num-layers 8 --num-layers-per-virtual-pipeline-stage 1 "
            "--num-virtual-stages-per-pipeline-rank 2",
            2,
            "is 4 stages on a pipeline rank",
        ),
        ("--model-parallel-size 4", 4, "write --tensor-model-parallel-size"),
        (
            "--pipeline-model-parallel-size 4 --num-layers 8 --decoder-first-pipeline-num-layers 1",
            4,
            "cannot be dealt evenly to 3",
        ),
        ("--bf16 --fp16", 1, "bf16 and fp16 are both switched on"),
        ("--yaml-cfg foo.yaml", 1, "--yaml-cfg replaces the arguments"),
        ("--tensor_model_parallel_size 2", 2, "did you mean '--tensor-model-parallel-size'?"),
        ("--tensor-model-par 2", 2, "did you mean '--tensor-model-parallel-size'?"),
        ("--tensor-model-parallel-size 16", 8, "= 16; use 16."),
        ("--no-pipeline-parallel --pipeline-model-parallel-size 2", 2, "leave one of them out"),
        ("--pipeline-model-parallel-size 2 --num-layer-list 7,8 --num-layers 16", 2, "holds 15 layers"),
        ("--ds-sequence-parallel-size 2 --context-parallel-size 2", 4, "both above 1"),
        ("--lr-warmup-iters 5 --lr-warmup-fraction 0.1", 1, "leave one of them out"),
        (deepspeed({"train_batch_size": 64}, "--global-batch-size 32"), None, "make them equal"),
        (deepspeed({"bf16": {"enabled": True}}, "--fp16"), None, "bf16 and fp16 are both switched on"),
        ("--cp-comm-type a2a+p2p --context-parallel-size 4", 4, "a2a+p2p takes --hierarchical"),
    ],
)
def test_what_contradicts_itself(flags: str, world: int | None, says: str) -> None:
    """Catches one of two options taken without a word, and options of a file or of a misspelt name passed over."""
    with pytest.raises(DialectError) as caught:
        read(flags, world)
    assert says in str(caught.value)


def test_words_without_flags() -> None:
    """Catches a plan made of nothing."""
    with pytest.raises(DialectError, match="hold no flags"):
        translate("megatron", ["s", "p", "a", "c", "e"], world=1)


def test_a_deepspeed_configuration_is_read_whole() -> None:
    """Catches Ulysses, MiCS, the batch, clipping and the loss scale of the file called without effect."""
    zero = {"stage": 3, "mics_shard_size": 2, "offload_param": {"device": "none"}}
    rest = {"gradient_clipping": 0.5, "train_batch_size": 64, "odd": 1}
    fp16 = {"enabled": True, "initial_scale_power": 12}
    found, notes = read(
        deepspeed({"zero_optimization": zero, "fp16": fp16, **rest}, "--micro-batch-size 2 --clip-grad 1.0")
    )
    assert str(found.plan) == "data=4 zero=3 zero_replicas=2"
    assert (found.train["accumulate"], found.train["precision"]) == (8, "fp16")
    assert found.train["schedule"] == {"clip": 0.5, "initial_loss_scale": 4096}
    assert notes["--clip-grad"].verdict == "no effect"
    assert notes["deepspeed_config.odd"].verdict == "changed"
    assert notes["deepspeed_config.zero_optimization.offload_param.device"].verdict == "no effect"
    sequence = {"sequence_parallel_size": 2, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3}
    found, _ = read(deepspeed({"zero_optimization": {"stage": 2}, **sequence}))
    assert (str(found.plan), found.train["global_batch"]) == ("data=2 zero=2 ulysses=2", 12)
    assert str(read("--ds-sequence-parallel-size 2", 4)[0].plan) == "data=2 ulysses=2"


OPTIMIZER = {"type": "AdamW", "params": {"lr": 0.1, "betas": [0.8, 0.9], "weight_decay": 0.3}}
WARMUP = {"warmup_num_steps": 10, "warmup_type": "linear", "total_num_steps": 90}


@pytest.mark.parametrize(
    ("scheduler", "params", "schedule"),
    [
        ("WarmupLR", {"warmup_max_lr": 0.2}, {"decay": "constant", "learning_rate": 0.2, "warmup_steps": 10}),
        (
            "WarmupDecayLR",
            {"warmup_max_lr": 0.2},
            {"decay": "linear", "learning_rate": 0.2, "decay_steps": 90, "final_learning_rate": 0.0},
        ),
        (
            "WarmupCosineLR",
            {"cos_min_ratio": 0.5},
            {"decay": "cosine", "learning_rate": 0.1, "decay_steps": 90, "final_learning_rate": 0.05},
        ),
        ("OneCycle", {}, {"decay": "OneCycle"}),
    ],
)
def test_an_optimizer_and_a_schedule_of_deepspeed(
    scheduler: str, params: dict[str, object], schedule: dict[str, object]
) -> None:
    """Catches a rate, decay or warm-up of the file that is lost, and one that counts though flags make their own."""
    config = {"optimizer": OPTIMIZER, "scheduler": {"type": scheduler, "params": {**WARMUP, **params}}}
    found, _ = read(deepspeed(config))
    said = found.train["schedule"]
    assert schedule.items() <= said.items()
    assert (said["optimizer"], said["betas"], said["weight_decay"], said["epsilon"], said["clip"]) == (
        "AdamW",
        [0.8, 0.9],
        0.3,
        1e-8,
        0.0,
    )
    assert found.plan.zero == 0, "a configuration without a stage is stage 0"
    found, notes = read(deepspeed(config, "--lr 0.5 --clip-grad 1.0"))
    assert found.train["schedule"] == {"learning_rate": 0.5, "clip": 0.0}
    assert notes["deepspeed_config.optimizer.params.lr"].verdict == notes["--clip-grad"].verdict == "no effect"
    assert notes["deepspeed_config.scheduler.type"].verdict == "changed"


@pytest.mark.parametrize(
    ("flags", "kept"),
    [
        ("--tensor-model-parallel-size 2", "partitioned"),
        ("--tensor-model-parallel-size 2 --checkpoint-in-cpu", "offloaded"),
        ("--tensor-model-parallel-size 2 --sequence-parallel", "whole"),
        ("", "whole"),
    ],
)
def test_where_deepspeed_keeps_activations(flags: str, kept: str) -> None:
    """Catches partitioned or offloaded checkpoints that are lost, or asked of ranks that share nothing."""
    config = {"activation_checkpointing": {"partition_activations": True, "number_checkpoints": 4}}
    found, notes = read(deepspeed(config, f"{flags} --deepspeed-activation-checkpointing"))
    assert (found.plan.recompute, found.plan.activations) == ("full", kept)
    assert notes["deepspeed_config.activation_checkpointing.number_checkpoints"].verdict == "no effect"
    assert read(deepspeed(config, flags))[0].plan.activations == "whole"


@pytest.mark.parametrize(
    ("flags", "option", "verdict"),
    [
        ("--unheard-of 3", "--unheard-of", "changed"),
        ("--use-rope-scaling", "--use-rope-scaling", "changed"),
        ("--qk-head-dim 64", "--qk-head-dim", "changed"),
        ("--moe-z-loss-coeff 0.1", "--moe-z-loss-coeff", "changed"),
        ("--window-size 128", "--window-size", "changed"),
        ("--pp-partition-method x", "--pp-partition-method", "changed"),
        ("--attention-mask-type general", "--attention-mask-type", "changed"),
        (
            "--tp-2d --tp-x 2 --tp-y 2 --tensor-model-parallel-size 4 --num-attention-heads 6",
            "--num-attention-heads",
            "changed",
        ),
        ("--attention-mask-type causal", "--attention-mask-type", "mapped"),
        ("--use-flash-attn", "--use-flash-attn", "mapped"),
        ("--lora-r 8", "--lora-r", "changed"),
        ("--use-flash-attn=False", "--use-flash-attn", "no effect"),
        ("--reset-attention-mask=False", "--reset-attention-mask", "changed"),
        ("--deepspeed --zero-stage 0 --use-distributed-optimizer", "--use-distributed-optimizer", "no effect"),
        ("--num-query-groups 8 --group-query-attention", "--num-query-groups", "no effect"),
        ("--cp-comm-type p2p --context-parallel-size 4 --cp-window-size 1", "--cp-window-size", "no effect"),
        ("--tensor-model-parallel-size 2 --sequence-parallel=False", "--sequence-parallel", "mapped"),
        (
            "--context-parallel-size 4 --context-parallel-algo kvallgather_cp_algo --cp-window-size 2",
            "--cp-window-size",
            "no effect",
        ),
    ],
)
def test_verdicts_are_true(flags: str, option: str, verdict: str) -> None:
    """Catches "no effect" for what changes numbers or layout, and known options called no option of theirs."""
    assert read(flags, 4)[1][option].verdict == verdict


def test_names_are_whole() -> None:
    """Catches a name cut in two where a line of the table ends."""
    names = [name for names in NO_EFFECT.values() for name in names.split()] + list(BY_NAME)
    assert all(name.startswith("--") and not name.endswith("-") for name in names)


def test_instances_of_the_distributed_optimizer() -> None:
    """Catches groups that repeat the optimizer's shares taken for one group."""
    found, _ = read("--use-distributed-optimizer --num-distributed-optimizer-instances 2", 8)
    assert str(found.plan) == "data=8 zero=1 zero_replicas=2"


@pytest.mark.parametrize(
    ("version", "plan"),
    [
        ("2.0.0", "ulysses=2"),
        ("1.0.RC3", "ulysses=2"),
        ("2.0.0_core_r0.8.0", "ulysses=2"),
        ("core_r0.12.1", "ring=2"),
        ("2.1.0", "ring=2"),
    ],
)
def test_versions_of_mindspeed(version: str, plan: str) -> None:
    """Catches MindSpeed's own number taken for that of its core."""
    assert str(read("--context-parallel-size 2", 2, version)[0].plan) == plan


def test_a_version_that_is_none() -> None:
    """Catches a default taken for a version that nobody released, also where it would not matter."""
    for size in (1, 2):
        with pytest.raises(DialectError, match="'bogus' is no version"):
            read(f"--context-parallel-size {size}", 2, "bogus")


def test_layers_that_do_nothing_and_latent_attention() -> None:
    """Catches a DeepSeek model taken for Mixtral, with the layers that only fill its stages."""
    flags = "--num-layers 64 --noop-layers 61,62,63 --hidden-size 7168 --num-attention-heads 128 --num-experts 256 "
    flags += "--moe-router-topk 8 --multi-head-latent-attention --mtp-num-layers 1 --routed-scaling-factor 2.5"
    model = read(flags, 8)[0].model
    assert model is not None and (model["model_type"], model["num_hidden_layers"]) == ("deepseek_v3", 61)
    assert model["routed_scaling_factor"] == 2.5


def test_machines_that_a_file_names() -> None:
    """Catches a world of one machine taken for certain where --hostfile may name several."""
    notes = read("deepspeed --num_gpus 8 --hostfile hosts a.py --bf16")[1]
    assert (
        notes["world"].verdict == "changed"
        and read("torchrun --nproc_per_node 8 a.py --bf16")[1]["world"].verdict == "mapped"
    )


@pytest.mark.parametrize(
    ("flags", "world", "plan"),
    [
        (
            "--pipeline-model-parallel-size 4 --num-layers 9 --decoder-first-pipeline-num-layers 2 "
            "--decoder-last-pipeline-num-layers 1",
            4,
            "pipeline=4 stages=2-3-3-1",
        ),
        ("--moe-expert-parallel-size 4 --num-experts 8", 4, "data=4 expert=4"),
    ],
)
def test_other_ways_to_say_stages_and_experts(flags: str, world: int, plan: str) -> None:
    """Catches stages of another number of layers, and Megatron-DeepSpeed's experts on one rank."""
    assert str(read(flags, world)[0].plan) == plan


def test_layers_that_are_not_those_of_the_family() -> None:
    """Catches a model with other norms, gates and biases than the flags build, without a word."""
    sizes = "--hidden-size 64 --num-layers 2 --num-attention-heads 4 --position-embedding-type rope"
    notes = read(f"{sizes} --num-key-value-heads 2", 1)[1]
    names = ("--normalization", "--swiglu", "--disable-bias-linear")
    assert {notes[name].verdict for name in names} == {"changed"} and notes["--num-key-value-heads"].verdict == "mapped"
    full = f"{sizes} --normalization RMSNorm --swiglu --disable-bias-linear"
    assert all(read(full, 1)[1][name].verdict != "changed" for name in names)
    assert "--normalization" not in read(f"python pretrain_llama.py {sizes}", 1)[1]


def test_rotary_angles_that_are_scaled() -> None:
    """Catches Llama 3.1 without its scaling, one that the flags do not ask for, and a factor that is lost."""
    named = translate("mindformers", ["parallel_config: {}\ntrainer: {model_name: llama3_1_8b}"]).model
    assert named is not None and named["rope_scaling"]["factor"] == 8 and named["max_position_embeddings"] == 131_072
    sizes = (
        "--hidden-size 4096 --ffn-hidden-size 14336 --num-layers 32 --num-attention-heads 32 --num-query-groups 8 "
        "--group-query-attention --swiglu --normalization RMSNorm --position-embedding-type rope --tokenizer-model "
        "meta-llama/Llama-3.1-8B "
    )
    plain = translate("megatron", [sizes]).model
    assert plain is not None and "rope_scaling" not in plain
    found = translate("megatron", [f"{sizes} --use-rope-scaling --rope-scaling-factor 32"])
    assert found.model is not None and found.model["rope_scaling"] == ROPE_OF_LLAMA31 | {"factor": 32.0}
    said = {note.option: note.verdict for note in found.notes}
    assert said["--use-rope-scaling"] == said["--rope-scaling-factor"] == "mapped"
    with pytest.raises(DialectError, match="give 1 or more"):
        translate("megatron", [f"{sizes} --use-rope-scaling --rope-scaling-factor 0.5"])
