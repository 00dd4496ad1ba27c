"""Colossal-AI's programs at their edges: values that change, other names, and notes that must be true."""

import time

import pytest

from dialects.test_translate import refusal
from seqloom.dialects import translate
from seqloom.errors import DialectError
from seqloom.plan import Plan


@pytest.mark.parametrize(
    "change",
    [
        "kw['tp_size'] = 8",
        "kw.update(tp_size=4)",
        "kw.pop('tp_size')",
        "kw |= {}",
        "del kw['tp_size']",
        "a = kw\na['tp_size'] = 4",
        "if X:\n    kw = dict(tp_size=8, pp_size=1)",
    ],
)
def test_a_dict_that_is_changed_after_it_is_made(change: str) -> None:
    """Catches the first value of a dict taken where the program changes it."""
    text = f"kw = dict(tp_size=2, pp_size=1)\n{change}\nHybridParallelPlugin(**kw)"
    assert "not a literal" in refusal("colossalai", text, 8)
    legacy = f"kw = dict(pipeline=1, tensor=dict(size=4, mode='1d'))\n{change}".replace("kw", "parallel")
    assert "changed after it is made" in refusal("colossalai", legacy, 8)


def test_a_list_that_grows_and_a_section_inside() -> None:
    """Catches layers of stages without those appended, and a size set two keys deep."""
    grown = "L = [3]\nL.append(3)\nHybridParallelPlugin(tp_size=1, pp_size=2, num_layers_per_stage=L)"
    assert "changed after it is made" in refusal("colossalai", grown, 2)
    deep = "CONFIG = dict(parallel=dict(tensor=dict(size=4, mode='1d')))\nCONFIG['parallel']['tensor']['size'] = 2"
    assert "changed after it is made" in refusal("colossalai", deep, 4)


@pytest.mark.parametrize(
    "text",
    [
        "from colossalai.booster.plugin import HybridParallelPlugin as H\nH(tp_size=2, pp_size=1)",
        "import colossalai as c\nH = c.HybridParallelPlugin\nH(tp_size=2, pp_size=1)",
        "\ufeffHybridParallelPlugin(tp_size=2, pp_size=1)",
    ],
)
def test_other_names_of_a_plugin(text: str) -> None:
    """Catches a plugin that is not found under the name that the file gives it, or behind a byte order mark."""
    assert translate("colossalai", [text], world=2).plan == Plan(tensor=2, sequence_parallel=False)


def verdicts(text: str, world: int) -> dict[str, set[str]]:
    """What is said of each option."""
    found: dict[str, set[str]] = {}
    for each in translate("colossalai", [text], world=world).notes:
        found.setdefault(each.option, set()).add(each.verdict)
    return found


def test_one_option_is_told_one_thing() -> None:
    """Catches an option that is honoured and called without effect, or the other way round."""
    hybrid = verdicts(
        "HybridParallelPlugin(tp_size=1, pp_size=1, cpu_offload=True, zero_stage=2, microbatch_size=2)", 4
    )
    assert hybrid["cpu_offload"] == {"changed"} and hybrid["microbatch_size"] == {"no effect"}
    assert verdicts("GeminiPlugin(placement_policy='auto')", 4)["placement_policy"] == {"changed"}
    parts = verdicts("GeminiPlugin(offload_optim_frac=1.0, offload_param_frac=0.0, shard_param_frac=0.5)", 4)
    assert parts["offload_optim_frac"] == {"changed"} and parts["offload_param_frac"] == {"no effect"}
    assert parts["shard_param_frac"] == {"changed"}


def test_what_changes_numbers_is_said() -> None:
    """Catches "no effect" for fp8, a policy, an unknown argument; a loss scale and recomputation that are lost."""
    text = (
        "HybridParallelPlugin(tp_size=1, pp_size=1, initial_scale=2**10, use_fp8=True, custom_policy=Own(), odd=1)\n"
        "model.gradient_checkpointing_enable()"
    )
    found, said = translate("colossalai", [text], world=2), verdicts(text, 2)
    assert found.plan.recompute == "full" and found.train["schedule"]["initial_loss_scale"] == 1024
    assert said["use_fp8"] == said["custom_policy"] == said["odd"] == {"changed"}
    zero = "parallel = dict(pipeline=1)\nzero = dict(model_config=dict(tensor_placement_policy='cpu'))"
    assert translate("colossalai", [zero], world=2).plan == Plan(data=2, zero=3, offload=True)


def test_another_norm_than_the_2_norm() -> None:
    """Catches gradients clipped by another norm than was asked for, and an option that keeps weights lower."""
    assert "clipped by their 2-norm" in refusal("colossalai", "GeminiPlugin(max_norm=1.0, norm_type=1.0)", 2)
    assert "clipped by their 2-norm" in refusal("colossalai", "LowLevelZeroPlugin(max_norm=1.0, norm_type='inf')", 2)
    said = verdicts("GeminiPlugin(max_norm=1.0, norm_type=2.0, master_weights=False)", 2)
    assert (said["norm_type"], said["master_weights"]) == ({"mapped"}, {"changed"})


def test_a_training_program() -> None:
    """Catches a batch without its accumulation, recomputation and rate lost, and LoRA that fails there beside TP."""
    line = "train_sft.py --plugin zero2 --batch_size 4 --accumulation_steps 4 --use_grad_checkpoint --lr 1e-5"
    line += " --max_len 512"
    found = translate("colossalai", [line], world=4)
    assert found.plan == Plan(data=4, zero=2, recompute="full")
    assert (found.train["global_batch"], found.train["accumulate"], found.train["sequence_length"]) == (64, 4, 512)
    assert found.train["schedule"]["learning_rate"] == 1e-5
    assert "LoRA with a tensor degree of 2" in refusal("colossalai", "train_sft.py --plugin 3d --tp 2 --lora_rank 8", 4)
    assert verdicts(f"{line} --lora_rank 8 --unheard 1", 4)["--lora_rank"] == {"changed"}


def test_what_the_benchmark_takes_where_nothing_is_said() -> None:
    """Catches a program whose defaults are neither taken nor told, and another program that is given them."""
    found = translate("colossalai", ["benchmark.py -p 3d --tp 4"], world=8)
    assert found.model is not None and found.model["model_type"] == "llama"
    assert (found.train["sequence_length"], found.train["global_batch"]) == (4096, 4)
    assert translate("colossalai", ["train.py -p 3d --tp 4"], world=8).train["sequence_length"] is None


def test_flags_of_another_system() -> None:
    """Catches a plan of defaults for a script whose flags are Megatron-LM's."""
    text = "torchrun pretrain_gpt.py --tensor-model-parallel-size 2 --micro-batch-size 1"
    assert "use `seqloom translate megatron`" in refusal("colossalai", text, 16)


def test_layers_for_other_stages() -> None:
    """Catches a list of stages that the pipeline does not have."""
    text = "HybridParallelPlugin(tp_size=1, pp_size=2, num_microbatches=2, num_layers_per_stage=[3])"
    assert "lists 1 stage, and pp_size 2 x num_model_chunks 1 = 2" in refusal("colossalai", text, 2)


def test_a_configuration_that_is_changed_after_it_is_made() -> None:
    """Catches the model of a configuration as it was before the program changed it."""
    text = "HybridParallelPlugin(tp_size=1, pp_size=1)\nc = LlamaConfig(num_hidden_layers=4)\nc.num_hidden_layers = 8"
    assert translate("colossalai", [text], world=1).model is None


def test_a_program_that_is_slow_to_read() -> None:
    """Catches seconds spent on a program that is nobody's."""
    start = time.process_time()
    assert "nodes" in refusal("colossalai", "a[0] = 1\n" * 20_000 + "HybridParallelPlugin(tp_size=1, pp_size=1)", 1)
    assert time.process_time() - start < 2
    below = "initial_scale is 0.5, and losses are not scaled down"
    assert below in refusal("colossalai", "HybridParallelPlugin(tp_size=1, pp_size=1, initial_scale=0.5)", 1)


@pytest.mark.parametrize("call", ["adjust(kw)", "self.adjust([kw], 2)", "adjust(settings=kw)"])
def test_a_dict_that_a_function_may_change(call: str) -> None:
    """Catches a dict taken as it was made though a function of the program was handed it."""
    text = f"kw = dict(tp_size=2, pp_size=1)\n{call}\nHybridParallelPlugin(**kw)"
    assert "may be changed after it is made" in refusal("colossalai", text, 8)
    harmless = text.replace(call, "print(kw)\nlog = json.dumps(kw)\nPlain(kw)")
    assert translate("colossalai", [harmless], world=8).plan.tensor == 2


def test_a_configuration_of_the_first_kind() -> None:
    """Catches an unknown name called without effect, a seed that is lost, and gradients of one batch of several."""
    text = "BATCH_SIZE = 8\nseed = 3\nfp16 = None\nODD = 1\ngradient_accumulation = 4\nNUM_MICRO_BATCHES = 2\n"
    text += "parallel = dict(pipeline=2, tensor=dict(size=4, mode='2d'))"
    found, said = translate("colossalai", [text], world=16), verdicts(text, 16)
    train = {"micro_batch": 4, "accumulate": 8, "global_batch": 64, "precision": "float32", "schedule": {"seed": 3}}
    assert train.items() <= found.train.items()
    assert said["ODD"] == {"changed"} and said["fp16"] == {"no effect"}


@pytest.mark.parametrize(
    "text", ["HybridParallelPlugin(tp_size=1, pp_size=1)", "parallel = dict(pipeline=1)", "benchmark.py -p 3d --tp 1"]
)
def test_a_version_that_is_none(text: str) -> None:
    """Catches a version that nobody released, and one that is passed over without a word."""
    with pytest.raises(DialectError, match="'zz' is no version"):
        translate("colossalai", [text], world=1, version="zz")
    notes = {each.option: each.verdict for each in translate("colossalai", [text], world=1, version="0.4.5").notes}
    assert notes["--dialect-version"] == "no effect"


def test_an_argument_that_is_given_twice() -> None:
    """Catches one of two values taken, where Python refuses the call."""
    assert "is given tp_size twice" in refusal("colossalai", "HybridParallelPlugin(2, 1, tp_size=4)", 4)


def test_which_of_two_numbers_of_micro_batches_wins() -> None:
    """Catches a micro-batch of rows that their plugin never reads."""
    text = "HybridParallelPlugin(tp_size=1, pp_size=2, num_microbatches=4, microbatch_size=2)"
    found = translate("colossalai", [text + "\nplugin.prepare_dataloader(data, batch_size=16)"], world=4)
    assert (found.train["micro_batch"], found.train["accumulate"], found.train["global_batch"]) == (4, 4, 32)
