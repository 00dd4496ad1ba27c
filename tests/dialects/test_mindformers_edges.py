"""MindFormers' files at their edges: sizes, misspelt keys, and notes that must be true."""

import time

import pytest

from dialects.test_translate import YAML, note, refusal
from seqloom.dialects import translate
from seqloom.plan import Plan


def test_numbers_without_end() -> None:
    """Catches gigabytes for a list of stages, and a traceback from a number Python writes in no digits."""
    text = "parallel_config: {pipeline_stage: 900000000}\nrecompute_config: {recompute: 3}"
    assert "not a whole number from 1 to 65,536" in refusal("mindformers", text)
    assert "bits" in refusal("mindformers", f"parallel_config: {{model_parallel: {'1:' + '59:' * 8000}59}}")
    odd = f"parallel_config: {{data_parallel: 1}}\nx: {{? {'1:' + '59:' * 3000}59 : {'1:' + '59:' * 3000}59}}"
    assert translate("mindformers", [odd]).plan == Plan()


@pytest.mark.parametrize("text", ["[" * 90_000, "x: [" + "1," * 80_000 + "]", "- " * 60_000])
def test_files_that_are_slow_to_read(text: str) -> None:
    """Catches seconds spent on a file that is nobody's settings."""
    start = time.process_time()
    assert "lines and entries" in refusal("mindformers", f"parallel_config: {{}}\n{text}")
    assert time.process_time() - start < 1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("parallel_config: {data_parallel: 4, model_paralel: 2}", "did you mean 'model_parallel'?"),
        ("parallelism: {tensor_paralel: 2}", "did you mean 'tensor_parallel'?"),
        (
            "parallel_config: {}\nparallel: {enable_paralel_optimizer: True}",
            "did you mean 'enable_parallel_optimizer'?",
        ),
        ("parallel_config: {}\nrecompute_config: {recomput: True}", "did you mean 'recompute'?"),
        ("parallel: 3", "not a section"),
        (
            "parallel_config: {}\nmodel: {model_config: {hidden_size: 64, num_layers: 1000000000000, num_heads: 4}}",
            "layers is not read",
        ),
        ("parallel_config: 3", "parallel_config is '3', not a section"),
        ("parallel_config: [1, 2]", "not a section"),
        ("parallelism: {context_parallel: 4, context_parallel_method: hybrid}", "needs ulysses_degree_in_cp"),
        (
            "parallelism: {data_parallel_shard: 3}\ntraining: {local_batch_size: 3, global_batch_size: 64}",
            "64 is no multiple of 3 rows x data 3 = 9; use 63 or 72.",
        ),
        ("parallel: {device_num: 16}\nparallel_config: {data_parallel: 4, model_parallel: 2}", "device_num 16 must be"),
        (
            "parallel_config: {model_parallel: 2}\nmoe_config: {expert_num: 4}",
            "need use_seq_parallel: True",
        ),
        ("distribute_parallel_config: {tensor_model_parallel_size: 2}", "write its degrees as `parallel_config`"),
        ("parallelism: {data_parallel_replicate: 3}", "x data_parallel_replicate = 3; use 6."),
    ],
)
def test_what_is_no_layout(text: str, says: str) -> None:
    """Catches a misspelt degree that is 1 without a word, and a batch of other rows than asked."""
    assert says in refusal("mindformers", text, 8 if "replicate" in text else None)


def test_groups_that_repeat_the_shards() -> None:
    """Catches replicas of shards that are told and not planned, and the default -1 read as no sharing."""
    text = "parallelism: {data_parallel_shard: 4, data_parallel_replicate: 2}"
    assert translate("mindformers", [text], world=8).plan == Plan(data=8, zero=3, zero_replicas=2)
    assert translate("mindformers", ["parallelism: {tensor_parallel: 2}"], world=8).plan.zero == 3


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("hidden_dropout_rate", "0.1"),
        ("sliding_window", "4096"),
        ("scaling_factor", "2.0"),
        ("use_3d_tensor_parallel", "True"),
        ("brand_new", "7"),
    ],
)
def test_what_changes_a_model_is_said(option: str, value: str) -> None:
    """Catches "no effect" for an option that changes numbers or stages."""
    text = f"parallel_config: {{data_parallel: 1}}\nmodel: {{model_config: {{{option}: {value}}}}}"
    assert note("mindformers", text, f"model.model_config.{option}").verdict == "changed"
    assert note("mindformers", text.replace(value, "null"), f"model.model_config.{option}").verdict == "no effect"


def test_what_changes_a_pipeline_is_said() -> None:
    """Catches "no effect" for a schedule, pieces of a sequence, and capacities of experts."""
    text = "parallel_config: {seq_split_num: 4, pipeline_stage: 2}\nmoe_config: {capacity_factor: 1.1}\n"
    text += "parallel: {pipeline_config: {pipeline_scheduler: seqpipe}}"
    for option in (
        "parallel_config.seq_split_num",
        "moe_config.capacity_factor",
        "parallel.pipeline_config.pipeline_scheduler",
    ):
        assert note("mindformers", text, option).verdict == "changed"


def test_one_option_is_told_one_thing() -> None:
    """Catches notes that contradict the plan or each other."""
    newer = "use_legacy: False\n" + YAML % "context_parallel: 4, context_parallel_algo: ulysses_cp, %s"
    found = translate("mindformers", [newer % "ulysses_degree_in_cp: 2"])
    said = {each.option: each for each in found.notes}
    assert found.plan.ulysses == 2 and said["parallel_config.ulysses_degree_in_cp"].verdict == "mapped"
    ring = "parallelism: {context_parallel: 4}\nmodel: {model_config: {use_ring_attention: True}}"
    assert note("mindformers", ring, "model.model_config.use_ring_attention").verdict == "no effect"
    steps = "parallel_config: {pipeline_stage: 2, micro_batch_num: 4}\nrunner_config: {gradient_accumulation_steps: 8}"
    notes = [n.verdict for n in translate("mindformers", [steps]).notes if n.option.endswith("accumulation_steps")]
    assert notes == ["changed"]


@pytest.mark.parametrize(
    ("name", "hidden"),
    [
        ("qwen2_5_72b", 8192),
        ("llama3_1_8b", 4096),
        ("deepseek3_671b", 7168),
        ("qwen2_5_0_5b", 896),
        ("qwen2_0_5b", 896),
    ],
)
def test_names_without_dots(name: str, hidden: int) -> None:
    """Catches a known model that is not found where its version is written with underscores."""
    found = translate("mindformers", [f"parallel_config: {{}}\ntrainer: {{model_name: {name}}}"])
    assert found.model is not None and found.model["hidden_size"] == hidden


def test_the_numbers_of_a_file_win_over_its_name() -> None:
    """Catches a width of the named model where the file says another, and a name called known that is not."""
    text = "parallel_config: {}\ntrainer: {model_name: %s}\nmodel: {model_config: {hidden_size: 1024}}"
    found = translate("mindformers", [text % "qwen1.5_72b"]).model
    assert found is not None and (found["hidden_size"], found["num_hidden_layers"]) == (1024, 80)
    bloom = translate("mindformers", [text % "bloom_7b1"]).model
    assert bloom is not None and (bloom["hidden_size"], bloom["n_layer"]) == (1024, 30)
    assert note("mindformers", text % "qwen2_57b", "trainer.model_name").verdict == "changed"


def test_tied_embeddings_and_wide_heads() -> None:
    """Catches a model of other weights than the file describes."""
    sizes = "hidden_size: 64, num_layers: 4, num_heads: 4, head_dim: 32, tie_word_embeddings: True"
    found = translate("mindformers", [f"parallel_config: {{}}\nmodel: {{model_config: {{{sizes}}}}}"]).model
    assert found is not None and (found["head_dim"], found["tie_word_embeddings"]) == (32, True)


def test_an_unknown_switch_that_is_off() -> None:
    """Catches "no effect" for a layout's switch that is off there and on here."""
    text = "parallelism: {tensor_parallel: 2, sequence_parallel: False}"
    assert note("mindformers", text, "parallelism.sequence_parallel", world=2).verdict == "changed"


PIPELINE = """
parallel_config: {pipeline_stage: %d, micro_batch_num: 32}
parallel: {pipeline_config: {pipeline_interleave: %s, pipeline_scheduler: %s}}
recompute_config: {recompute: %s}
model: {model_config: {hidden_size: 64, num_heads: 4, num_layers: %d, pp_interleave_num: 2, offset: %s}}
"""


@pytest.mark.parametrize(
    ("values", "plan"),
    [
        (
            (5, True, "1f1b", "[[2, 1, 0, 0, 0], [1, 0, 0, 0, 0]]", 48, "[[0, 1, 1, 1, 1], [1, 1, 1, 1, 0]]"),
            "schedule=interleaved chunks=2 stages=4-5-5-5-5-5-5-5-5-4 "
            "recompute=full:block:2/full:block:1/none/none/none/full:block:1/none/none/none/none",
        ),
        (
            (2, True, "1f1b", "[3, 1]", 8, "0"),
            "schedule=interleaved chunks=2 stages=2-2-2-2 recompute=full:block:2/full:block:1/full:block:1/none",
        ),
        ((2, True, "zero_bubble_v", "False", 16, "[[1, 0], [-1, 0]]"), "schedule=zbv stages=5-4-4-3"),
        ((2, False, "gpipe", "[9, 1]", 16, "[1, -1]"), "schedule=gpipe stages=9-7 recompute=full:block:9/full:block:1"),
        ((2, False, "1f1b", "[8, 1]", 16, "null"), "stages=8-8 recompute=full:block:8/full:block:1"),
        ((4, True, "seqpipe", "False", 61, "[[0, 1, 1, 1], [1, 1, 1, -1]]"), None),
    ],
)
def test_stages_and_schedules(values: tuple[object, ...], plan: str | None) -> None:
    """Catches stages of other layers, chunks in another order, and recomputation of layers that are not theirs."""
    if plan is None:
        assert (
            note("mindformers", PIPELINE % values, "parallel.pipeline_config.pipeline_scheduler").verdict == "changed"
        )
        return
    assert translate("mindformers", [PIPELINE % values]).plan == Plan.parse(f"pipeline={values[0]} {plan}")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ((2, True, "1f1b", "False", 8, "[1, -1, 0]"), "one whole number, 2 of them, or 2 lists of 2"),
        ((2, False, "1f1b", "False", 9, "[1, 1]"), "adds up to 2, and 9 layers in 2 stages leave 1"),
        ((4, False, "1f1b", "False", 4, "[1, -1, 0, 0]"), "leaves a stage between the ends without layers"),
        ((2, True, "seqpip", "False", 8, "0"), "did you mean 'seqpipe'?"),
    ],
)
def test_stages_that_are_none(values: tuple[object, ...], says: str) -> None:
    """Catches an offset that loses or invents layers, which their code refuses, and a schedule nobody has."""
    assert says in refusal("mindformers", PIPELINE % values)


@pytest.mark.parametrize(
    ("section", "plan"),
    [
        ("pipeline_parallel: 2, pipeline_parallel_layers_per_stage: '0-3|4-7'", "stages=4-4"),
        ("pipeline_parallel: 2, pipeline_parallel_layers_per_stage: ['0-2', '3-7']", "stages=3-5"),
        (
            "pipeline_parallel: 2, pipeline_parallel_interleave_num: 2, "
            "pipeline_parallel_layers_per_stage: '0-1,4-5|2-3,6-7'",
            "schedule=interleaved chunks=2 stages=2-2-2-2",
        ),
        ("pipeline_parallel: 2, pipeline_parallel_schedule: GPipe, sequence_parallel: True", "schedule=gpipe"),
    ],
)
def test_stages_of_the_newer_files(section: str, plan: str) -> None:
    """Catches layers of other stages, and a schedule called unknown."""
    assert translate("mindformers", [f"parallelism: {{{section}}}"]).plan == Plan.parse(f"pipeline=2 {plan}")


def test_layers_of_the_newer_files_that_are_computed_again() -> None:
    """Catches all layers computed again where four are asked for, and a rate, clip and seed without effect."""
    text = "parallelism: {data_parallel_shard: 1}\nrecompute: {mode: full, full_recompute_layer: ['%s']}\n"
    text += "training: {max_norm: 0.5, seed: 3}\nlr_scheduler: {learning_rate: 0.1, type: ConstantWarmUpLR}"
    found = translate("mindformers", [text % "0-3"])
    assert found.plan == Plan(recompute="full:block:4")
    schedule = {"clip": 0.5, "seed": 3, "learning_rate": 0.1, "decay": "ConstantWarmUpLR"}
    assert found.train["schedule"] == schedule
    assert note("mindformers", text % "2-3", "recompute.full_recompute_layer").verdict == "changed"
    offset = PIPELINE % (1, False, "1f1b", "False", 8, "0")
    assert note("mindformers", offset, "model.model_config.offset").verdict == "no effect"


def test_what_shipped_files_hold() -> None:
    """Catches a refusal of a group that counts for nothing there, and DeepSeek's sizes lost."""
    text = "parallel_config: {data_parallel: 4}\nparallel: {enable_parallel_optimizer: True, "
    text += "parallel_optimizer_config: {optimizer_weight_shard_size: 256}}\n"
    text += "model: {model_config: {model_type: deepseek_v3, hidden_size: 64, num_hidden_layers: 2, "
    text += "num_attention_heads: 4, kv_lora_rank: 32, v_head_dim: 16, first_k_dense_replace: 1}}"
    found = translate("mindformers", [text])
    assert found.plan == Plan(data=4, zero=1) and found.model is not None
    assert (found.model["kv_lora_rank"], found.model["first_k_dense_replace"]) == (32, 1)


def test_a_key_that_is_given_twice() -> None:
    """Catches the first of two values lost without a word."""
    text = "parallel_config: {data_parallel: 2}\nparallel_config: {data_parallel: 4}"
    assert note("mindformers", text, "parallel_config").verdict == "changed"
    assert translate("mindformers", [text]).plan == Plan(data=4)
