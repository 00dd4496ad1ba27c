"""Configurations: what is accepted, and a sentence for everything that is not."""

from inspect import cleandoc
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from seqloom.errors import ConfigError
from seqloom.plan import TINY_SHAPES, Plan
from seqloom.train.config import Config
from seqloom.train.curriculum import stretches
from seqloom.train.reading import load_config

MINIMAL = {"model": {"path": "llama"}, "data": {"files": ["*.txt"]}, "train": {"steps": 10}}


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """Write a configuration and give its path; a mapping is dumped, text is written as it is."""

    def write(content: str | dict[str, Any]) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
        return path

    return write


def complaint(path: Path, *overrides: str) -> str:
    """What load_config says is wrong, without the file's name."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    assert "\n" not in message, "an error is one line"
    return message.removeprefix(f"{path}: ")


def test_minimal_configuration_has_defaults(write: Any) -> None:
    """Catches a default that is missing or is not of its own type."""
    config = load_config(write(MINIMAL))
    assert config.plan == Plan()
    assert (config.train.batch, config.train.micro_batch, config.data.sequence_length) == (1, 1, 4096)
    assert config.model.settings() == TINY_SHAPES["llama"]
    assert config.data.files == ("*.txt",)


def test_configuration_prints_and_reads_back(write: Any) -> None:
    """Catches a field that is written in a form the reader refuses, such as the plan as a mapping."""
    config = load_config(
        write(MINIMAL), ["plan=ring=2 ulysses=2 layout=striped", "train.clip=null", "model.config.hidden_size=64"]
    )
    again = load_config(write(config.model_dump(mode="json")))
    assert again == config
    assert again.plan == Plan(ring=2, ulysses=2, layout="striped")


def test_configuration_cannot_be_changed(write: Any) -> None:
    """Catches a section that is not frozen: a run whose settings change under it."""
    config = load_config(write(MINIMAL))
    with pytest.raises(ValueError, match="frozen"):
        config.train.steps = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "value"),
    [("3e-4", 3e-4), ("3E-4", 3e-4), ("1e2", 100.0), ("1.5e-3", 1.5e-3), (".5e1", 5.0), ("0.25", 0.25), ("2", 2.0)],
)
def test_floats_as_people_write_them(write: Any, text: str, value: float) -> None:
    """Catches PyYAML's reading of 3e-4 as a string, in the file and in an override."""
    path = write(f"model: {{path: llama}}\ndata: {{files: [a]}}\ntrain: {{steps: 1, learning_rate: {text}}}")
    assert load_config(path).train.learning_rate == value
    assert load_config(write(MINIMAL), [f"train.learning_rate={text}"]).train.learning_rate == value


def test_words_that_start_like_floats_stay_words(write: Any) -> None:
    """Catches a float rule so wide that it eats names."""
    config = load_config(write(MINIMAL), ["data.text_key=1e4x", "run.folder=e5"])
    assert config.data.text_key == "1e4x"
    assert config.run.folder == Path("e5")


def test_overrides_reach_every_depth(write: Any) -> None:
    """Catches overrides that are dropped, applied in another order, or lose the rest of their section."""
    config = load_config(
        write(MINIMAL),
        ["train.steps=20", "train.steps=30", "plan=ring=4", "model.config.hidden_size=64", "data.files=[a, b]",
         "train.clip=null", "run.folder=x=y"],
    )  # fmt: skip
    assert config.train.steps == 30
    assert config.plan == Plan(ring=4)
    assert config.model.settings() == TINY_SHAPES["llama"] | {"hidden_size": 64}
    assert config.data.files == ("a", "b")
    assert config.train.clip is None
    assert config.run.folder == Path("x=y")


def test_a_folder_at_home(write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a folder named ~ in the working directory, which is easily removed with all of one's home."""
    monkeypatch.setenv("HOME", "/home/me")
    assert load_config(write(MINIMAL), ["run.folder=~/runs/a"]).run.folder == Path("/home/me/runs/a")


WRONG_VALUES = [
    ("train.steps=ten", "train.steps is 'ten' (a string); it must be a whole number."),
    ("train.steps=010", "train.steps is '010' (a string); it must be a whole number."),
    ("train.steps=1:30", "train.steps is '1:30' (a string); it must be a whole number."),
    ("train.steps=1.5", "train.steps is 1.5; it must be a whole number."),
    ("train.steps=true", "train.steps is true; it must be a whole number."),
    ("train.steps=0", "train.steps is 0; it must be at least 1."),
    ("train.batch=-2", "train.batch is -2; it must be at least 1."),
    ("train.learning_rate=0", "train.learning_rate is 0; it must be above 0."),
    ("train.learning_rate=fast", "train.learning_rate is 'fast' (a string); it must be a number."),
    ("train.learning_rate=.nan", "train.learning_rate is nan; it must be a finite number."),
    ("train.learning_rate=.inf", "train.learning_rate is inf; it must be a finite number."),
    ("train.final_learning_rate_share=1.5", "train.final_learning_rate_share is 1.5; it must be at most 1."),
    ("train.betas=[0.9, 1]", "train.betas[1] is 1; it must be below 1."),
    ("train.betas=[0.9]", "train.betas has 1 entry, which is too few."),
    ("train.betas=[0.9, 0.9, 0.9]", "train.betas has 3 entries; it must have at most 2."),
    ("train.weight_decay=-0.1", "train.weight_decay is -0.1; it must be at least 0."),
    ("train.clip=0", "train.clip is 0; it must be above 0."),
    ("train.clip=off", "train.clip is false; it must be a number."),
    ("train.precision=fp8", "train.precision is 'fp8' (a string); it must be 'float32', 'bf16', 'fp16' or 'float64'."),
    ("train.gradient_checkpointing=1", "train.gradient_checkpointing is 1; it must be true or false."),
    ("train.loss_chunk=0", "train.loss_chunk is 0; it must be at least 1."),
    ("train.warmup_steps=11", "train.warmup_steps is 11, more than train.steps=10; make it at most 10."),
    ("train.micro_batch=0", "train.micro_batch is 0; it must be at least 1."),
    ("train.micro_batch=2",
     "train.batch is 1, which train.micro_batch=2 does not divide; make it a multiple, such as 2."),
    ("train.rampup=[1, 1]", "train.rampup has 2 entries, which is too few."),
    ("train.rampup=[1, 1, 8]", "train.rampup starts at 1, which is not below train.batch=1; start lower."),
    ("train.schedule=step", "train.schedule is 'step' (a string); it must be 'cosine', 'linear', 'constant' or 'wsd'."),
    ("train.schedule=wsd",
     "train.schedule is 'wsd', which falls at the very end; say over how much with train.decay_steps."),
    ("train.warmup_samples=11", "train.warmup_samples is 11, more than the 10 of train.steps=10; make it at most 10."),
    ("train.loss_scale_window=5",
     "train.loss_scale_window is 5, but only train.precision=fp16 scales losses; leave it out."),
    ("eval={every: 2}", "eval.files and eval.dataset are both missing; name the text by one of them."),
    ("eval={filez: [a], files: [a]}", "eval.filez is not a setting (did you mean 'eval.files'?)."),
    ("train=5", "train is 5; it must be a section."),
    ("train=null", "train is null; it must be a section."),
    ("data.files=a.txt", "data.files is 'a.txt' (a string); it must be a list."),
    ("data.split=nonsense",
     "data.split is 'nonsense', but only data.dataset has splits, not files; leave it out."),
    ("data.files=[]", "data.files and data.dataset are both missing; name the text by one of them."),
    ("data.dataset=x", "data.files and data.dataset are both given; name the text by one of them."),
    ("data.files=[a, 3]", "data.files[1] is 3; it must be a string."),
    ("data.sequence_length=4k", "data.sequence_length is '4k' (a string); it must be a whole number."),
    ("data.seed=-1", "data.seed is -1; it must be at least 0."),
    ("run.save_every=0", "run.save_every is 0; it must be at least 1."),
    ("run.keep=0", "run.keep is 0; it must be at least 1."),
    ("run.timeout_seconds=0", "run.timeout_seconds is 0; it must be above 0."),
    ("run.folder=3", "run.folder is 3; it must be the path of a folder."),
    ("plan=4", "plan is 4; it must be a string such as 'ring=2 ulysses=2'."),
    ("plan=ring=0", "ring=0 is not a whole number from 1 to 65,536."),
    ("model.path=7", "model.path is 7; it must be a string."),
    ("model.config=[1]", "model.config is [1] (a list); it must be a section."),
    ("train.stepz=3", "train.stepz is not a setting (did you mean 'train.steps'?)."),
    ("steps=3", "steps is not a setting (did you mean 'train.steps'?)."),
    ("data.learning_rate=1", "data.learning_rate is not a setting (did you mean 'train.learning_rate'?)."),
    ("trian.steps=3", "trian is not a setting (did you mean 'train'?)."),
    ("run.qqqq=1", "run.qqqq is not a setting; there are folder, save_every, save_async, keep, timeout_seconds."),
    ("train.steps", "The override 'train.steps' is not of the form section.key=value."),
    ("=3", "The override '=3' is not of the form section.key=value."),
    ("train..steps=3", "The override 'train..steps=3' is not of the form section.key=value."),
    ("plan.ring=3", "The override 'plan.ring=3' reaches into plan, which is 'ring=1' (a string), not a section."),
]  # fmt: skip


@pytest.mark.parametrize(("override", "message"), WRONG_VALUES)
def test_wrong_values_are_named(write: Any, override: str, message: str) -> None:
    """Catches a value that is coerced, accepted or complained about without its name, its limit or what was given."""
    assert complaint(write({"plan": "ring=1"} | MINIMAL), override) == message


def test_unreadable_override_value(write: Any) -> None:
    """Catches a YAML error inside an override that escapes as a traceback."""
    said = complaint(write(MINIMAL), "data.files={a")
    assert said.startswith("The value in the override 'data.files={a' is not readable as YAML (")
    assert said.endswith("; quote it.")


def test_batch_must_be_cut_evenly(write: Any) -> None:
    """Catches a remainder of the batch that would be dropped in silence."""
    said = complaint(write(MINIMAL), "train.batch=5", "train.accumulate=2")
    assert said == "train.batch is 5, which train.accumulate=2 does not divide; make it a multiple, such as 6."
    assert load_config(write(MINIMAL), ["train.batch=6", "train.accumulate=2"]).train.micro_batch == 3


def test_everything_wrong_is_said_at_once(write: Any) -> None:
    """Catches stopping at the first error: a user would meet them one by one."""
    said = complaint(
        write(MINIMAL),
        "train.steps=ten", "data.seed=-1", "plan=ring=0 ulises=2", "oops", "run.keeep=1", "model.path=nowhere",
    )  # fmt: skip
    for part in ("train.steps", "data.seed", "ring=0", "'ulises'", "'oops'", "'run.keep'", "'nowhere'"):
        assert part in said, part
    assert said.count(" Also: ") == 6


def test_warmup_and_batch_are_said_together(write: Any) -> None:
    """Catches a check across two fields that hides the next one."""
    said = complaint(write(MINIMAL), "train.warmup_steps=99", "train.batch=5", "train.accumulate=2")
    assert "warmup_steps is 99" in said
    assert "batch is 5" in said


@pytest.mark.parametrize("missing", ["model", "data", "train"])
def test_missing_sections_are_named(write: Any, missing: str) -> None:
    """Catches a section that is silently given defaults it cannot have."""
    values = {name: section for name, section in MINIMAL.items() if name != missing}
    assert complaint(write(values)) == f"{missing} is missing; it has no default."


def test_missing_and_unreadable_files(write: Any, tmp_path: Path) -> None:
    """Catches errors of the file system that reach the user as tracebacks."""
    with pytest.raises(ConfigError, match=r"^There is no file .*none\.yaml; give the path of a YAML configuration\.$"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read as text"):
        load_config(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00a")
    with pytest.raises(ConfigError, match="cannot be read as text"):
        load_config(tmp_path / "binary.yaml")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("train: {steps: 1", "is not readable as YAML: "),
        ("train: [1, 2\nplan: x", "line 2"),
        ("a: !!python/object/apply:os.getcwd []", "is not readable as YAML: "),
        ("train: {steps: 1, steps: 2}", "'steps' is said twice at line 1"),
        ("- 1\n- 2", "holds a list; a configuration has sections: plan, model, data, train, eval, run, curriculum."),
        ("just words", "holds a string; a configuration has sections"),
        ("", "holds nothing; a configuration has sections"),
    ],
)
def test_text_that_is_no_configuration(write: Any, text: str, part: str) -> None:
    """Catches broken YAML without a place, code in YAML, a key whose first value would be lost, and non-mappings."""
    assert part in complaint(write(text))


def test_keys_that_are_not_strings(write: Any) -> None:
    """Catches a crash on YAML's numeric keys."""
    assert "train.3 is not a setting" in complaint(write(MINIMAL | {"train": {"steps": 1, 3: 4}}))


class TestModel:
    """The model section."""

    def test_nothing_given(self, write: Any) -> None:
        """Catches a model made of defaults that nobody asked for."""
        said = complaint(write(MINIMAL | {"model": {}}))
        assert said == "model is empty; give model.path, model.config or both."

    def test_unknown_path(self, write: Any) -> None:
        """Catches a wrong path that is only noticed once processes have started."""
        assert "There is no model 'nowhere'" in complaint(write(MINIMAL), "model.path=nowhere")

    def test_incomplete_inline_configuration(self, write: Any) -> None:
        """Catches transformers' defaults (7 billion parameters) standing in for what was left out."""
        said = complaint(write(MINIMAL | {"model": {"config": {"model_type": "llama", "vocab_size": 9}}}))
        assert "lacks hidden_size, num_hidden_layers, num_attention_heads, max_position_embeddings" in said

    def test_misspelt_configuration_key(self, write: Any) -> None:
        """Catches keys that transformers would carry along and never read."""
        said = complaint(write(MINIMAL), "model.config.hiden_size=64")
        assert said == "model.config.hiden_size is not a setting of llama (did you mean 'model.config.hidden_size'?)."

    def test_configuration_value_of_another_type(self, write: Any) -> None:
        """Catches wrong types in fields that plans do not look at."""
        said = complaint(write(MINIMAL), "model.config.rms_norm_eps=small")
        assert "rms_norm_eps" in said
        assert "expected float" in said

    def test_configuration_number_out_of_range(self, write: Any) -> None:
        """Catches a model of no layers."""
        assert "num_hidden_layers is 0" in complaint(write(MINIMAL), "model.config.num_hidden_layers=0")

    def test_folder(self, write: Any, tmp_path: Path) -> None:
        """Catches overrides that are not laid over a folder's own configuration."""
        (tmp_path / "config.json").write_text('{"model_type": "llama", "vocab_size": 11, "hidden_size": 8,'
            '"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64}')  # fmt: skip
        config = load_config(write(MINIMAL), [f"model.path={tmp_path}", "model.config.vocab_size=12"])
        assert config.model.settings()["vocab_size"] == 12
        assert config.model.settings()["hidden_size"] == 8


def test_tokenizer_folder_must_exist(write: Any) -> None:
    """Catches a misspelt tokenizer that would be looked up elsewhere or fail late."""
    said = complaint(write(MINIMAL), "data.tokenizer=byte")
    assert said == (
        "data.tokenizer is 'byte', and there is no such folder; give 'bytes' or the folder of a Hugging Face tokenizer."
    )


def test_demonstration_is_legal() -> None:
    """Catches an example that no longer fits the configuration it shows."""
    config = load_config(Path(__file__).parents[2] / "examples" / "demo.yaml")
    assert config.plan.world_size == 4
    assert config.model.settings()["vocab_size"] == 257
    assert config.model.settings()["max_position_embeddings"] >= config.data.sequence_length >= 4096


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.batch=8", "train.accumulate=2", "train.micro_batch=2"],
         "train.batch is 8, but train.accumulate=2 times train.micro_batch=2 is 4; leave one of them out."),
        (["train.batch=8", "train.rampup=[2, 4, 9]"],
         "train.rampup grows from 2 by 4, which misses train.batch=8; make its increment a divisor of 6."),
        (["train.batch=8", "train.micro_batch=4", "train.rampup=[2, 6, 9]"],
         "train.rampup has the start 2, which micro-batches of 4 sequences do not divide; make it a multiple of 4, "
         "or set a smaller train.micro_batch. Also: train.rampup has the increment 6, which"),
        (["train.warmup_steps=2", "train.decay_samples=4"],
         "train has warm-up or decay in steps and in samples; give both in one unit."),
        (["train.schedule=wsd", "train.warmup_steps=4", "train.decay_steps=7"],
         "train.decay_steps is 7, but a 'wsd' schedule has 6 steps after warm-up; make it at most 6."),
        (["train.schedule=constant", "train.decay_steps=7"], "train.schedule is 'constant', which never falls, so"),
        (["train.schedule=constant", "train.final_learning_rate_share=0.5"], "train.schedule is 'constant', which"),
    ],
)  # fmt: skip
def test_settings_that_contradict_each_other(write: Any, overrides: list[str], message: str) -> None:
    """Catches batches, ramp-ups and schedules that cannot be, and settings that would say nothing."""
    assert complaint(write(MINIMAL), *overrides).startswith(message)


def test_the_older_word_for_recomputation(write: Any) -> None:
    """Catches gradient_checkpointing accepted and not done, or done where the plan asks for something else."""
    for plan in ("ring=2", "ring=2 recompute=full"):
        asked = [f"plan={plan}", "train.gradient_checkpointing=true"]
        assert str(load_config(write(MINIMAL), asked).plan) == "ring=2 recompute=full"
    phases = "curriculum=[{until_step: 5}, {until_step: 10, plan: ulysses=2}]"
    config = load_config(write(MINIMAL), ["plan=ring=2", "train.gradient_checkpointing=true", phases])
    assert [str(stretch.config.plan) for stretch in stretches(config)] == [
        "ring=2 recompute=full",
        "ulysses=2 recompute=full",
    ]
    says = r"'%s' has recompute=selective; leave train\.gradient_checkpointing out"
    for plan, asked in (
        ("recompute=selective", ["plan=recompute=selective"]),
        ("ulysses=2 recompute=selective", [phases.replace("ulysses=2", "ulysses=2 recompute=selective")]),
    ):
        with pytest.raises(ConfigError, match=says % plan):
            load_config(write(MINIMAL), [*asked, "train.gradient_checkpointing=true"])


def test_micro_batches_follow_from_their_size(write: Any) -> None:
    """Catches a count that does not follow from the size, or the size from the count, or one lost in writing."""
    for overrides in (["train.micro_batch=2"], ["train.accumulate=4"], ["train.accumulate=4", "train.micro_batch=2"]):
        config = load_config(write(MINIMAL), ["train.batch=8", "train.rampup=[4, 2, 9]", *overrides])
        assert (config.train.accumulate, config.train.micro_batch, config.train.micro_batches) == (4, 2, (2, 3, 4))
        assert load_config(write(config.model_dump(mode="json"))) == config


@pytest.mark.parametrize(
    ("said", "phase", "accumulate", "micro_batch"),
    [
        ("train.micro_batch=2", {"batch": 16}, 8, 2),
        ("train.accumulate=4", {"batch": 16}, 4, 4),
        ("train.accumulate=4", {"batch": 16, "micro_batch": 8}, 2, 8),
        ("train.micro_batch=2", {"batch": 16, "accumulate": 2}, 2, 8),
    ],
)
def test_phases_keep_what_was_said(
    write: Any, said: str, phase: dict[str, int], accumulate: int, micro_batch: int
) -> None:
    """Catches micro-batches of a phase that grow with its batch, though their size was said."""
    phases = yaml.safe_dump([{"until_step": 4, **phase}, {"until_step": 10}], default_flow_style=True)
    train = stretches(load_config(write(MINIMAL), ["train.batch=8", said, f"curriculum={phases}"]))[0].config.train
    assert (train.batch, train.accumulate, train.micro_batch) == (16, accumulate, micro_batch)


def test_every_setting_is_described() -> None:
    """Catches a setting that was added without a word on what it means."""
    for name, field in Config.model_fields.items():
        for section in get_args(field.annotation) or (field.annotation,):
            for key in getattr(section, "model_fields", ()):
                described = cleandoc(section.__doc__ or "")  # Python 3.13 takes the indentation away by itself
                assert f"\n{key}: " in described, f"{name}.{key}"


def test_an_inline_dtype_is_refused(write: Any) -> None:
    """Catches a wish for bf16 weights that float32 weights answer in silence."""
    said = complaint(write(MINIMAL), "model.config.dtype=bfloat16")
    assert "model.config.dtype has no effect" in said and "train.precision" in said
