"""Runs that settings of other systems describe: what they say arrives, what they leave open is refused or told."""

import json
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from close import assert_close
from dialects.cases import Case
from dialects.generated import SETTINGS
from dialects.test_cases import CASES
from pool import Pool
from seqloom.dialects import Translation, translate
from seqloom.dialects.models import by_name, known
from seqloom.errors import ConfigError, DialectError, SeqloomError
from seqloom.model import outline
from seqloom.plan import ModelShape, Plan, check, reasons, reduced, shrunk
from seqloom.train import Config, Scale, TranslatedRun, translated
from seqloom.train.batches import Batches
from seqloom.train.schedule import learning_rate
from seqloom.train.theirs import steps_to
from train.runs import metrics, run, write_text

EXAMPLES = Path(__file__).parents[2] / "examples"
TEXT = "data.files=[text.txt]"


def made(
    dialect: str, settings: str, *overrides: str, world: int | None = None, scale: Scale = "full"
) -> TranslatedRun:
    """The run of some settings on a text that nobody reads."""
    return translated(dialect, translate(dialect, [settings], world=world), [TEXT, *overrides], scale=scale)


def said(found: TranslatedRun, option: str) -> str:
    """What the notes say of an option."""
    return " ".join(note.why for note in found.notes if note.option == option)


def test_a_launch_script_arrives() -> None:
    """Catches a value of Megatron's that is dropped on the way, counts of samples taken for steps, and an end of decay
    taken for its length."""
    found = made("megatron", str(EXAMPLES / "from_megatron.sh"))
    config, train = found.config, found.config.train
    assert str(config.plan) == "data=2 zero=1 ring=2 ulysses=2 tensor=2 recompute=full:block:8"
    assert config.data.sequence_length == 8192 and ModelShape.from_config(config.model.settings()).hidden == 4096
    assert (train.batch, train.micro_batch, train.accumulate) == (128, 2, 64)
    assert train.rampup == (32, 16, 9600) and train.precision == "bf16"
    assert train.batches.consumed(train.steps) >= 1_000_000 > train.batches.consumed(train.steps - 1)
    assert (train.learning_rate, train.schedule, train.clip) == (3e-4, "cosine", 1.0)
    assert train.final_learning_rate_share == pytest.approx(0.1)
    assert (train.warmup_samples, train.decay_samples, train.warmup_steps) == (4000, 946_000, 0)
    assert (train.weight_decay, train.betas) == (0.1, (0.9, 0.95))
    # What the script leaves to Megatron-LM's defaults, with a note for each.
    assert (train.seed, config.data.seed, train.epsilon) == (1234, 1234, 1e-8)
    assert "the default there" in said(found, "train.seed") and "the default there" in said(found, "train.epsilon")


def test_a_yaml_file_arrives() -> None:
    """Catches MindFormers' clip that is off unless it is switched on, -1 steps, and a share of warm-up of no run."""
    config = made("mindformers", str(EXAMPLES / "from_mindformers.yaml"), "train.steps=1000").config
    train = config.train
    assert str(config.plan) == "pipeline=2 ring=16 tensor=2 recompute=full layout=contiguous"
    assert config.data.sequence_length == 131_072 == config.model.settings()["max_position_embeddings"]
    assert (train.batch, train.micro_batch, train.accumulate, train.precision) == (64, 1, 64, "bf16")
    assert (train.warmup_steps, train.decay_steps, train.schedule) == (100, None, "cosine")
    assert (train.learning_rate, train.betas, train.clip) == (1e-3, (0.9, 0.95), 1.0)
    text = (EXAMPLES / "from_mindformers.yaml").read_text(encoding="utf-8")
    assert (
        made("mindformers", text.replace("use_clip_grad: True", "sink: 1"), "train.steps=9").config.train.clip is None
    )


def test_a_program_arrives() -> None:
    """Catches a plugin's clip that is lost, a batch counted for one rank, and defaults that are not its optimizer's."""
    found = made(
        "colossalai", str(EXAMPLES / "from_colossalai.py"), "train.steps=5", "data.sequence_length=4096", world=8
    )
    config, train = found.config, found.config.train
    assert str(config.plan) == "data=2 zero=1 ring=2 tensor=2 sequence_parallel=false"
    assert (train.batch, train.micro_batch, train.precision, train.clip) == (8, 8, "bf16", 1.0)
    assert (train.learning_rate, train.betas, train.weight_decay) == (3e-4, (0.9, 0.999), 0.0)
    plugin = "HybridParallelPlugin(tp_size=1, pp_size=1)\nAutoModel.from_pretrained('llama-2-7b')"
    open_ended = made("colossalai", plugin, "train.steps=5", "data.sequence_length=64")
    assert open_ended.config.train.clip is None, "max_norm is 0 there, which is no clip"
    assert "seqloom's default" in said(open_ended, "train.schedule")
    with pytest.raises(DialectError, match="trains with AdamW alone"):
        made("colossalai", plugin + "\nSGD(model.parameters(), 1)", "train.steps=5", "data.sequence_length=64")


FLAGS = "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --swiglu --untie-embeddings-and-output-weights "


@pytest.mark.parametrize(
    ("flags", "keys"),
    [
        ("--train-iters 100 --lr 1e-3", {"schedule": "linear", "final_learning_rate_share": 0.0, "decay_steps": None}),
        (
            "--train-iters 100 --lr 1e-3 --lr-decay-iters 80 --lr-warmup-fraction 0.1",
            {"warmup_steps": 8, "decay_steps": 72},
        ),
        ("--train-iters 100 --lr 1e-3 --lr-decay-iters 100 --lr-warmup-iters 5", {"decay_steps": None}),
        ("--train-samples 80 --lr 1e-3", {"steps": 20, "decay_samples": 80}),
        ("--train-tokens 5120 --lr 1e-3 --lr-decay-tokens 2560 --lr-warmup-tokens 640", {"decay_samples": 30}),
        ("--train-iters 9 --lr 1e-3 --lr-decay-style constant --min-lr 1e-5", {"schedule": "constant"}),
        (
            "--train-iters 100 --lr 1e-3 --lr-decay-style WSD --lr-wsd-decay-iters 20",
            {"schedule": "wsd", "decay_steps": 20},
        ),
        ("--train-iters 9 --lr 1e-3 --clip-grad 0", {"clip": None}),
        ("--train-iters 9 --lr 1e-3 --adam-eps 1e-5", {"epsilon": 1e-5}),
        ("--train-iters 9 --lr 1e-3 --fp16 --initial-loss-scale 4096", {"initial_loss_scale": 4096.0}),
        ("--train-iters 9 --lr 1e-3 --rampup-batch-size 4 4 10", {"rampup": None}),
    ],
)
def test_schedules(flags: str, keys: dict[str, Any]) -> None:
    """Catches a unit mistaken, a default that is seqloom's and not theirs, and keys that train refuses together."""
    found = made("megatron", f"{FLAGS}--seq-length 64 --micro-batch-size 4 --global-batch-size 4 {flags}").config.train
    assert {key: getattr(found, key) for key in keys} == keys


def test_latent_attention_arrives() -> None:
    """Catches sizes of DeepSeek's layers that a script gives and its model does not get."""
    flags = (
        "--multi-latent-attention --num-layers 4 --hidden-size 512 --num-attention-heads 8 --num-experts 8 "
        "--moe-router-topk 2 --kv-lora-rank 64 --qk-head-dim 32 --qk-pos-emb-head-dim 16 --v-head-dim 32 "
        "--moe-ffn-hidden-size 128 --first-k-dense-replace 1 --init-method-std 0.01 "
        "--seq-length 64 --train-iters 1 --lr 1"
    )
    model = made("megatron", flags).config.model.settings()
    assert model["model_type"] == "deepseek_v2" and model["initializer_range"] == 0.01
    keys = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    assert [model[key] for key in keys] == [64, 32, 16, 32]
    assert (model["moe_intermediate_size"], model["first_k_dense_replace"], model["n_routed_experts"]) == (128, 1, 8)


def test_rates_are_theirs_one_step_on() -> None:
    """Catches warm-up counted into the fall: Megatron-LM's rate after n steps is that of step n here."""
    train = made(
        "megatron",
        f"{FLAGS}--seq-length 64 --micro-batch-size 1 --train-iters 40 --lr 1e-2 --min-lr 1e-3 "
        "--lr-decay-iters 30 --lr-warmup-iters 10",
    ).config.train
    assert learning_rate(train, 4) == pytest.approx(1e-2 * 5 / 10)
    for step in (10, 17, 29, 35):  # their rule: linear from the end of warm-up to --lr-decay-iters
        fallen = min(1.0, (step - 10) / (30 - 10))
        assert learning_rate(train, step) == pytest.approx(1e-3 + (1e-2 - 1e-3) * (1 - fallen))


YAML = (
    "parallel_config: {data_parallel: 1}\nmodel: {model_config: {seq_length: 64}}\ntrainer: {model_name: llama2_7b}\n"
)
PLUGIN = "HybridParallelPlugin(tp_size=1, pp_size=1)\n"


@pytest.mark.parametrize(
    ("dialect", "settings", "overrides", "says"),
    [
        ("mindformers", YAML + "runner_config: {epochs: 3}", (), "their 3 epochs count passes over their data"),
        ("mindformers", YAML, (), "do not say how many steps the run has; add train.steps=N."),
        ("mindformers", YAML.replace("llama2_7b", "mine"), ("train.steps=1",), "name no model that is known"),
        (
            "mindformers",
            YAML + "lr_schedule: {type: Zigzag}",
            ("train.steps=1",),
            "'Zigzag', which train.schedule has not",
        ),
        ("mindformers", YAML + "optimizer: {type: Muon}", ("train.steps=1",), "trains with AdamW alone"),
        ("mindformers", YAML + "optimizer: {eps: much}", ("train.steps=1",), "epsilon is 'much', no number"),
        (
            "colossalai",
            PLUGIN,
            ("train.steps=1", "model.path=llama"),
            "how long sequences are; add data.sequence_length",
        ),
        ("megatron", f"{FLAGS}--seq-length 64 --train-iters 9 --lr 1 --min-lr 2", (), "fall from 1 up to 2"),
        (
            "megatron",
            f"{FLAGS}--seq-length 64 --train-iters 9 --lr 1 --lr-decay-iters 3 --lr-warmup-samples 2",
            (),
            "in steps and in samples",
        ),
        (
            "megatron",
            f"{FLAGS}--seq-length 64 --train-iters 9 --lr 1 --lr-decay-iters 3 --lr-warmup-iters 5",
            (),
            "until step 3, which is not after 5 steps of warm-up",
        ),
        ("megatron", f"{FLAGS}--seq-length 64 --train-iters 9 --lr-decay-style WSD", (), "how long wsd's fall"),
    ],
)
def test_what_is_left_open_is_refused(dialect: str, settings: str, overrides: tuple[str, ...], says: str) -> None:
    """Catches a default taken in silence where the settings say nothing, or say what seqloom has not."""
    with pytest.raises(DialectError) as caught:
        made(dialect, settings, *overrides)
    assert says in str(caught.value)


def test_overrides_win() -> None:
    """Catches a refusal of what the command says itself, a model that stays under another one's name, and keys of a
    batch that contradict the command's."""
    found = made(
        "mindformers",
        YAML + "lr_schedule: {type: Zigzag, learning_rate: 1}",
        *("train.steps=7", "train.schedule=linear", "train.learning_rate=2", "model.path=qwen2", "train.accumulate=4"),
        *("plan=ring=2", "model.config.vocab_size=300", "data.sequence_length=32"),
    )
    config = found.config
    assert (config.train.schedule, config.train.learning_rate, config.train.batch) == ("linear", 2, 4)
    assert config.plan == Plan(ring=2) and config.model.settings()["model_type"] == "qwen2"
    assert "gives way" in said(found, "model") and "gives way" in said(found, "plan")
    assert (
        made("mindformers", YAML, "train.steps=1", "train.batch=6", "train.micro_batch=3").config.train.accumulate == 2
    )
    flags = f"{FLAGS}--seq-length 64 --train-iters 9 --lr 1 --min-lr 0.5 --fp16 --initial-loss-scale 4096"
    train = made("megatron", flags, "train.schedule=constant", "train.precision=bf16").config.train
    assert (train.schedule, train.precision) == ("constant", "bf16"), "what only others have goes with them"
    with pytest.raises(ConfigError, match=r"train\.stepz is not a setting"):
        made("mindformers", YAML, "train.steps=1", "train.stepz=2")


@pytest.mark.parametrize(
    ("plan", "most", "small"),
    [
        ("pipeline=2 ring=16 tensor=2", 8, "pipeline=2 ring=2 tensor=2"),
        ("pipeline=8 tensor=8 ring=4", 4, "ring=2 tensor=2"),
        ("pipeline=24 tensor=4 tensor_kind=2.5d", 8, "pipeline=2 tensor=4 tensor_kind=2.5d"),
        ("ring=8 inner_ring=4 tensor=8", 8, "ring=4 tensor=2 inner_ring=2"),
        (
            "data=16 zero=3 zero_replicas=4 offload=true ulysses=8",
            8,
            "data=2 zero=3 zero_replicas=4 offload=true ulysses=4",
        ),
        ("data=8 zero=2 tensor=16", 2, "tensor=2"),
        ("pipeline=4 recompute=full:block:4/none/none/full", 2, "pipeline=2 recompute=full:block:1/none"),
        ("pipeline=4 schedule=interleaved chunks=4", 2, "pipeline=2 schedule=interleaved chunks=2"),
        ("tensor=8 ring=16 expert=16", 4, "ring=2 tensor=2 expert=4"),
        ("tensor=8 recompute=full activations=partitioned sequence_parallel=false", 1, "recompute=full"),
    ],
)
def test_reduced_plans(plan: str, most: int, small: str) -> None:
    """Catches an axis that is lost though it fits, and a field that the lower degrees do not allow."""
    assert str(reduced(Plan.parse(plan), most)) == small


NO_DROPOUT = {"hidden_dropout": 0.0}
"""BLOOM's dropout of hidden states is Megatron-LM's default, and refused here."""


def _of(dialect: str, case: Case) -> Translation:
    """A case with a model where its settings name none."""
    return _named(translate(dialect, [case.settings], world=case.world, version=case.version))


def _named(found: Translation) -> Translation:
    named = by_name("mixtral" if found.plan.expert > 1 else "llama2-70b")
    assert named is not None
    experts = {"num_local_experts": 16} if found.plan.expert > 1 else {}
    return replace(found, model=found.model or named[1] | experts)


def _refusals(dialect: str, case: Case) -> list[str]:
    """Why seqloom refuses a case at full size."""
    found = _of(dialect, case)
    assert found.model is not None
    return reasons(found.plan, ModelShape.from_config(found.model | NO_DROPOUT))


RUNNABLE = [each for each in CASES if not _refusals(*each.values)]


def test_the_case_that_cannot_run_says_so() -> None:
    """Catches a case that stops running unnoticed, and one that is trained though its plan is refused."""
    (refused,) = (each for each in CASES if each not in RUNNABLE)
    (reason,) = _refusals(*refused.values)
    assert reason.startswith("sequence_parallel=false gives every rank of tensor=4 all tokens")
    words = [TEXT, "data.sequence_length=4096", "train.steps=1"]
    config = translated(refused.values[0], _of(*refused.values), words).config
    with pytest.raises(SeqloomError, match="sequence_parallel=false gives every rank of tensor=4"):
        check(config.plan, ModelShape.from_config(config.model.settings()))


def _override(found: Translation) -> list[str]:
    assert found.model is not None
    return ["model.config.hidden_dropout=0.0"] if found.model["model_type"] == "bloom" else []


@pytest.mark.parametrize(("dialect", "case"), RUNNABLE)
def test_every_case_has_a_legal_reduced_size(dialect: str, case: Case) -> None:
    """Catches a reduced plan, model, length and batch that do not fit one another, and an axis of the case that is gone
    while there is room."""
    theirs = _of(dialect, case)
    found = translated(dialect, theirs, [TEXT, *_override(theirs)], scale="tiny")
    config, plan = found.config, found.config.plan
    assert plan.world_size <= 8
    shape = ModelShape.from_config(config.model.settings())
    for number in config.train.micro_batches:
        check(plan, shape, config.data.sequence_length, batch=config.train.micro_batch, micro_batches=number)
    kept = [axis for axis in ("ring", "ulysses", "tensor", "pipeline") if getattr(theirs.plan, axis) > 1]
    assert all(getattr(plan, axis) > 1 for axis in kept)
    assert (plan.tensor_kind, plan.exchange, plan.layout) == (
        theirs.plan.tensor_kind,
        theirs.plan.exchange,
        theirs.plan.layout,
    )
    assert (config.train.rampup is None) == (theirs.train["ramp_up"] is None)
    assert config.train.precision == theirs.train["precision"]


def test_a_launchers_processes_are_filled() -> None:
    """Catches a reduced plan of fewer processes than torchrun has started."""
    theirs = _of("megatron", Case("--context-parallel-size 2 --cp-comm-type p2p", 2, ""))
    assert str(translated("megatron", theirs, [TEXT], scale="tiny", world=6).config.plan) == "data=3 ring=2"


@pytest.mark.parametrize(("name", "model"), [pytest.param(*each, id=each[0]) for each in known()])
def test_every_known_model_can_be_configured(name: str, model: dict[str, Any]) -> None:
    """Catches a key in the table of models that its family does not know, and a family without a reduced size."""
    theirs = Translation(Plan(), model, {"sequence_length": 64, "schedule": {"steps": 1}}, ())
    config = translated("colossalai", theirs, [TEXT]).config
    assert config.model.settings() == model
    small = shrunk(model, Plan(tensor=1), 64, vocab=257)
    assert small["model_type"] == model["model_type"]
    assert small.get("tie_word_embeddings") == model.get("tie_word_embeddings")


@pytest.mark.parametrize(
    "name", ["llama2-70b", "qwen-7b", "bloom-7b1", "gpt2", "mixtral", "deepseek-v2", "deepseek-v3"]
)
def test_reduced_models_are_built(name: str) -> None:
    """Catches a reduced size that transformers refuses, or that is no small model."""
    named = by_name(name)
    assert named is not None
    small = shrunk(named[1], Plan(ulysses=2), 512, vocab=257)
    assert outline(small).num_parameters() < 200_000
    shape, theirs = ModelShape.from_config(small), ModelShape.from_config(named[1])
    assert (shape.heads == shape.kv_heads) == (theirs.heads == theirs.kv_heads)
    assert shape.max_positions is None or shape.max_positions >= 512


def test_reduced_rotary_angles() -> None:
    """Catches angles scaled for lengths that a reduced model never has, which transformers warns of."""
    named = by_name("llama3.1-8b")
    assert named is not None
    small = shrunk(named[1], Plan(), 512, vocab=257)
    assert small["rope_scaling"] == {**named[1]["rope_scaling"], "original_max_position_embeddings": 512 // 16}


def test_steps_to_a_number_of_samples() -> None:
    """Catches a run that ends a step before its samples are consumed, or one after."""
    batches = Batches(16, (4, 4, 50))
    for samples in range(1, 200, 7):
        steps = steps_to(batches, samples)
        assert batches.consumed(steps) >= samples > batches.consumed(steps - 1)


def small_run(pool: Pool, folder: Path, dialect: str, file: str, world: int | None, *overrides: str) -> Config:
    """Train an example's reduced size for three steps, and check what it wrote."""
    text = write_text(folder / "text.txt")
    found = translate(dialect, [str(EXAMPLES / file)], world=world)
    words = [f"data.files=['{text}']", f"run.folder={folder / 'run'}", "train.steps=3", "data.sequence_length=64"]
    config = translated(dialect, found, [*words, *overrides], scale="tiny").config
    summary = run(pool, config)
    lines = metrics(folder / "run")
    assert summary.step == 3 and len(lines) == 3
    assert all(isfinite(line["loss"]) and 3 < line["loss"] < 8 for line in lines)
    described = json.loads((folder / "run" / "run.json").read_text(encoding="utf-8"))
    assert described["plan"] == str(config.plan) and described["dtype"] == config.train.precision
    return config


def test_mindformers_trains_as_one_device(pool: Pool, tmp_path: Path) -> None:
    """Catches a reduced YAML file that does not run, or a plan that trains another model, or on other text, than one
    process does."""
    losses = []
    for name, more in (("split", ()), ("alone", ("plan=data=1",))):
        folder = tmp_path / name
        folder.mkdir()
        small_run(pool, folder, "mindformers", "from_mindformers.yaml", None, "train.precision=float64", *more)
        losses.append(torch.tensor([line["loss"] for line in metrics(folder / "run")], dtype=torch.float64))
    described = json.loads((tmp_path / "split" / "run" / "run.json").read_text(encoding="utf-8"))
    assert described["plan"] == "pipeline=2 ring=2 tensor=2 recompute=full layout=contiguous"
    assert_close(*losses, tolerance=1e-12)


def test_megatron_trains(pool: Pool, tmp_path: Path) -> None:
    """Catches a reduced launch script that does not run, and a batch that does not grow."""
    config = small_run(pool, tmp_path, "megatron", "from_megatron.sh", None)
    assert str(config.plan) == "zero=1 ring=2 ulysses=2 tensor=2 recompute=full:block:1"
    labels = [line["label_tokens"] for line in metrics(tmp_path / "run")]
    assert config.train.rampup == (2, 2, 2) and labels[1] > 1.5 * labels[0]


def test_colossalai_trains(pool: Pool, tmp_path: Path) -> None:
    """Catches a reduced program that does not run."""
    config = small_run(pool, tmp_path, "colossalai", "from_colossalai.py", 8)
    assert str(config.plan) == "data=2 zero=1 ring=2 tensor=2 sequence_parallel=false"
    assert ModelShape.from_config(config.model.settings()).kv_heads == 2, "key/value heads are shared, as there"


@pytest.mark.sweep
@pytest.mark.parametrize(
    "name",
    ["llama2-70b", "qwen-7b", "qwen2.5-7b", "qwen3-8b", "mistral-7b", "gpt2", "mixtral", "deepseek-v2", "deepseek-v3"],
)
def test_every_family_trains(pool: Pool, tmp_path: Path, name: str) -> None:
    """Catches a family that is known by name and cannot be trained at reduced size."""
    named, text = by_name(name), write_text(tmp_path / "text.txt")
    assert named is not None
    theirs = Translation(Plan(ring=2), named[1], {"sequence_length": 4096, "schedule": {"steps": 1}}, ())
    words = [f"data.files=['{text}']", f"run.folder={tmp_path / 'run'}", "train.steps=2", "data.sequence_length=64"]
    run(pool, translated("megatron", theirs, words, scale="tiny").config)
    assert all(isfinite(line["loss"]) for line in metrics(tmp_path / "run"))


@pytest.mark.sweep
@pytest.mark.parametrize(("dialect", "case"), RUNNABLE)
def test_every_case_trains(pool: Pool, tmp_path: Path, dialect: str, case: Case) -> None:
    """Catches a case that is legal at reduced size and does not run, or runs on another plan than it says."""
    text = write_text(tmp_path / "text.txt")
    theirs = _of(dialect, case)
    words = [f"data.files=['{text}']", f"run.folder={tmp_path / 'run'}", "train.steps=2", "data.sequence_length=64"]
    run(pool, translated(dialect, theirs, [*words, *_override(theirs)], scale="tiny").config)
    assert all(isfinite(line["loss"]) for line in metrics(tmp_path / "run"))


@pytest.mark.parametrize("dialect", SETTINGS)
@pytest.mark.parametrize("examples", [20, pytest.param(2000, marks=pytest.mark.sweep)])
def test_any_settings_make_a_run_or_a_sentence(dialect: str, examples: int) -> None:
    """Catches a traceback on the way from odd settings to a run, and a plan that was not reduced."""

    @seed(1)
    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(SETTINGS[dialect], st.sampled_from([None, 1, 4, 8, 64]), st.sampled_from(["full", "tiny"]))
    def check_one(text: str, world: int | None, scale: Scale) -> None:
        try:
            theirs = translate(dialect, [text], world=world)
            found = translated(dialect, _named(theirs), [TEXT], scale=scale)
        except SeqloomError as error:
            assert str(error) and "\n" not in str(error) and "Traceback" not in str(error)
        else:
            assert scale == "full" or found.config.plan.world_size <= 8

    check_one()


ODD = st.sampled_from(
    [None, True, -1, 0, 1, 5, 30, 0.1, 3e-4, 1e30, float("inf"), "3", "1e-3", "much", [], [0.9, 0.95]]
)
KEYS = (
    *("steps", "samples", "tokens", "epochs", "learning_rate", "final_learning_rate", "decay", "decay_steps"),
    *("decay_samples", "decay_tokens", "warmup_steps", "warmup_samples", "warmup_tokens", "warmup_share", "betas"),
    *("weight_decay", "clip", "clipped", "beta1", "beta2", "epsilon", "optimizer", "seed", "first_learning_rate"),
    *("wsd_steps", "wsd_samples", "initial_loss_scale", "loss_scale_window"),
)
STYLES = st.sampled_from(["cosine", "linear", "constant", "WSD", "inverse-square-root"])


@pytest.mark.parametrize("examples", [50, pytest.param(3000, marks=pytest.mark.sweep)])
def test_any_schedule_makes_a_run_or_a_sentence(examples: int) -> None:
    """Catches a traceback on a value that no schedule can have, and one that the settings of a run refuse untold."""

    @seed(2)
    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(
        st.dictionaries(st.sampled_from(KEYS), ODD, max_size=6),
        STYLES,
        st.sampled_from([None, {"start": 2, "increment": 2, "samples": 9}]),
        st.sampled_from(["colossalai", "mindformers", "megatron"]),
        st.sampled_from(["full", "tiny"]),
    )
    def check_one(values: dict[str, Any], style: str, ramp: Any, dialect: str, scale: Scale) -> None:
        said = {"decay": style} | values
        train = {"sequence_length": 64, "micro_batch": 2, "global_batch": 8, "ramp_up": ramp, "schedule": said}
        try:
            translated(dialect, _named(Translation(Plan(), None, train, ())), [TEXT], scale=scale)
        except SeqloomError as error:
            assert str(error) and "\n" not in str(error)

    check_one()
