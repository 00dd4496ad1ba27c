"""What becomes of options: notes, equations, refusals; nothing run, nothing lost."""

import json
import time
from pathlib import Path

import pytest

from seqloom.dialects import Note, translate
from seqloom.dialects.flags import from_text
from seqloom.errors import DialectError
from seqloom.plan import Plan


def refusal(dialect: str, text: str, world: int | None = None, **options: bool) -> str:
    """The sentence of a refusal."""
    with pytest.raises(DialectError) as caught:
        translate(dialect, [text], world=world, **options)
    assert any(note.verdict == "refused" for note in caught.value.notes) or not caught.value.notes
    return str(caught.value)


def note(dialect: str, text: str, option: str, world: int | None = None) -> Note:
    """The first note on an option."""
    return next(note for note in translate(dialect, [text], world=world).notes if note.option == option)


YAML = "parallel_config: {%s}\nmodel: {model_config: {use_flash_attention: True}}"
PLUGIN = "HybridParallelPlugin(tp_size=%s, pp_size=1, enable_sequence_parallelism=True%s)"


@pytest.mark.parametrize(
    ("dialect", "text", "world", "says"),
    [
        (
            "mindformers",
            YAML % "data_parallel: 2, model_parallel: 2",
            8,
            "device_num 8 must be data_parallel 2 x model_parallel 2 x context_parallel 1 x pipeline_stage 1 = 4; "
            "change",
        ),
        (
            "mindformers",
            YAML % "context_parallel: 6, context_parallel_algo: hybrid_cp, ulysses_degree_in_cp: 4",
            None,
            "context_parallel 6 is not divisible by ulysses_degree_in_cp 4; use a divisor of 6.",
        ),
        ("mindformers", YAML % "context_parallel_algo: hybird_cp", 1, "(did you mean 'hybrid_cp'?)"),
        ("mindformers", "a: 1", 1, "neither `parallel_config` nor `parallelism`"),
        ("mindformers", "use_parallel: False", 2, "use_parallel is off"),
        (
            "megatron",
            "--context-parallel-size 6 --context-parallel-algo hybrid_cp_algo --ulysses-degree-in-cp 4",
            6,
            "--context-parallel-size 6 is not divisible by --ulysses-degree-in-cp 4; use a divisor of 6.",
        ),
        (
            "megatron",
            "--context-parallel-size 4 --context-parallel-algo hybrid_cp_algo",
            4,
            "needs --ulysses-degree-in-cp",
        ),
        ("megatron", "--tensor-model-parallel-size 3", 8, "The world of 8 processes is no multiple of tensor 3 x"),
        ("megatron", "--tensor-model-parallel-sise 2", 8, "did you mean '--tensor-model-parallel-size'?"),
        ("megatron", "--tp-2d --tp-x 2 --tp-y 3 --tensor-model-parallel-size 4", 4, "--tp-x 2 x --tp-y 3 = 6, but"),
        (
            "megatron",
            "--context-parallel-size 8 --num-attention-heads 4 --context-parallel-algo ulysses_cp_algo",
            8,
            "ulysses=8 x tensor=1 is more than the 4 query heads",
        ),
        (
            "megatron",
            "--micro-batch-size 3 --global-batch-size 8",
            2,
            "no multiple of --micro-batch-size 3 x data 2 = 6",
        ),
        ("megatron", "--rampup-batch-size 3 4 100 --global-batch-size 8 --micro-batch-size 1", 1, "in steps of 4"),
        ("megatron", "--tensor-model-parallel-size $TP", 8, "$TP is not set in the script"),
        (
            "megatron",
            "if [ $1 = a ]; then TP=2; else TP=4; fi\npython x.py --tensor-model-parallel-size $TP",
            8,
            "TP is set in a branch",
        ),
        (
            "megatron",
            "--cp-comm-type a2a+p2p --context-parallel-size 4 --hierarchical-context-parallel-sizes 2 3",
            4,
            "= 4; give them",
        ),
        ("colossalai", PLUGIN % (2, ""), 4, "incoherent there"),
        ("colossalai", PLUGIN % (1, ", sequence_parallelism_mode='ring'"), 4, "needs tp_size above 1"),
        (
            "colossalai",
            PLUGIN % ("int('4')", ""),
            4,
            "tp_size is 'int('4')': it is not a literal, and no file is run here",
        ),
        (
            "colossalai",
            PLUGIN % (2, ", tp_sise=4"),
            4,
            "tp_sise is no argument of HybridParallelPlugin (did you mean 'tp_size'?)",
        ),
        (
            "colossalai",
            "HybridParallelPlugin(tp_size=2, pp_size=1, sp_size=2)",
            4,
            "sp_size 2 without enable_sequence_parallelism",
        ),
        (
            "colossalai",
            "HybridParallelPlugin(tp_size=1, pp_size=2, zero_stage=2)",
            4,
            "zero_stage 2 with pp_size above 1",
        ),
        (
            "colossalai",
            "parallel = dict(tensor=dict(size=8, mode='3d', depth=2))",
            8,
            "depth belongs to mode 2.5d, not 3d",
        ),
        (
            "colossalai",
            "parallel = dict(tensor=dict(size=6, mode='2d'))",
            6,
            "2d takes size = q x q, and 6 is not; use 4 or 9.",
        ),
        ("colossalai", "parallel = dict(tensor=dict(size=int(math.sqrt(16)), mode='2d'))", 4, "it is not a literal"),
        ("colossalai", "parallel = dict(tensor=4)", 4, "write dict(size=..., mode=...)"),
        ("colossalai", "x = 1", 4, "holds no `parallel = dict(...)`"),
        ("colossalai", "HybridParallelPlugin(1, 1)\nHybridParallelPlugin(2, 1)", 4, "several plugins"),
        ("nonsense", "x", None, "it is one of colossalai, megatron, mindformers."),
        ("megatron", " ", None, "There are no settings"),
        ("megatron", "no-such-file.sh", None, "There is no file no-such-file.sh"),
    ],
)
def test_what_cannot_be(dialect: str, text: str, world: int | None, says: str) -> None:
    """Catches an equation that is not checked, or told without its numbers; a guess in place of a refusal."""
    assert says in refusal(dialect, text, world)


def test_every_option_has_a_note() -> None:
    """Catches an option that vanishes: known, unknown, given twice, cut off by a comment, or a word on its own."""
    script = (
        "export OMP_NUM_THREADS=1\nFOO=3\n"
        "torchrun --nproc_per_node 2 stray.py word --bf16 --unheard-of 1 2 --lr 1.0e-4 --lr 2.0e-4 --save /x \\\n"
        "  # --finetune \\\n  --log-interval 10\n"
    )
    found = {each.option: each for each in translate("megatron", [script]).notes}
    for option in ("OMP_NUM_THREADS", "FOO", "--nproc_per_node", "word", "--bf16", "--unheard-of", "--lr", "--save"):
        assert option in found, option
    assert found["--unheard-of"].value == ["1", "2"]
    assert "cut" in found["--log-interval"].why or "comment" in found["--log-interval"].why
    yaml = "parallel_config: {data_parallel: 1}\nodd: {deep: [1, {a: 2}], deeper: {x: .nan, y: 2020-01-01}}\n"
    assert {"odd.deep", "odd.deeper.x", "odd.deeper.y"} <= {
        each.option for each in translate("mindformers", [yaml]).notes
    }
    plugin = "HybridParallelPlugin(tp_size=1, pp_size=1, brand_new=f(x), static_graph=True)"
    assert {"brand_new", "static_graph"} <= {each.option for each in translate("colossalai", [plugin]).notes}


def test_masks_that_are_never_held() -> None:
    """Catches mask compression noted without the bytes of this length."""
    model = "model: {model_config: {seq_length: 131072, use_attn_mask_compression: True}}"
    text = f"parallel_config: {{data_parallel: 1}}\n{model}"
    found = note("mindformers", text, "model.model_config.use_attn_mask_compression")
    assert found.verdict == "mapped" and f"{131072**2:,} bytes" in found.why


def test_heads_that_do_not_divide_are_honoured() -> None:
    """Catches a refusal of what seqloom can, or silence about it."""
    flags = "--num-attention-heads 6 --context-parallel-size 4 --context-parallel-algo ulysses_cp_algo"
    found = note("megatron", flags, "--num-attention-heads", world=4)
    assert found.verdict == "mapped" and "do not divide evenly" in found.why
    assert translate("megatron", [flags], world=4).plan == Plan(ulysses=4)


def test_code_is_followed_where_documents_differ() -> None:
    """Catches Ulysses where the newer models of MindFormers gather keys and values, and a change without a word."""
    text = "use_legacy: False\n" + YAML % "context_parallel: 4, context_parallel_algo: ulysses_cp"
    found = translate("mindformers", [text])
    assert (found.plan.ring, found.plan.ulysses, found.plan.exchange) == (4, 1, "gather")
    assert any(n.option.endswith("context_parallel_algo") and n.verdict == "changed" for n in found.notes)


def test_their_rank_order_is_kept_where_asked() -> None:
    """Catches degrees kept with ranks in other places, though the places were asked for."""
    text = PLUGIN % (2, ", sp_size=2, sequence_parallelism_mode='all_to_all'")
    assert translate("colossalai", [text], world=8).plan.order is None
    kept = translate("colossalai", [text], world=8, keep_order=True).plan
    assert kept.order == "ulysses-tensor-ring-pipeline-data"
    moe = "Moe" + text.replace("pp_size=1", "pp_size=1, ep_size=2")
    assert "experts spread over data ranks alone" in refusal("colossalai", moe, 8, keep_order=True)
    flags = "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --use-tp-pp-dp-mapping"
    assert translate("megatron", [flags], world=8, keep_order=True).plan.order == "tensor-ulysses-ring-pipeline-data"


def test_nothing_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a reader that imports the file, runs its shell, or builds YAML's Python objects."""
    monkeypatch.chdir(tmp_path)
    program = "open('ran', 'w')\nHybridParallelPlugin(tp_size=1, pp_size=1, precision=open('ran', 'w').name)\n"
    script = (
        "touch ran\nX=$(touch ran)`touch ran`\nT=$((X[$(touch ran)]))\neval touch ran\npython x.py --lr $X --seed $T\n"
    )
    yaml = "parallel_config: !!python/object/apply:os.system ['touch ran']\n"
    for name, dialect, text in (
        ("a.py", "colossalai", program),
        ("a.sh", "megatron", script),
        ("a.yaml", "mindformers", yaml),
    ):
        path = tmp_path / name
        path.write_text(text)
        with pytest.raises(DialectError):
            translate(dialect, [str(path)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.py", "a.sh", "a.yaml"]


def test_files_that_grow_when_read() -> None:
    """Catches minutes and gigabytes spent on names or anchors that stand for each other many times."""
    start = time.process_time()
    layers = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9) if i else 'x'}]" for i in range(12)]
    assert "more than 5,000 options" in refusal("mindformers", "parallel: {}\n" + "\n".join(layers))
    names = "a0 = [1]\n" + "\n".join(f"a{i} = [{', '.join([f'a{i - 1}'] * 9)}]" for i in range(1, 12))
    assert translate("colossalai", [f"{names}\nparallel = dict(pipeline=1)"], world=1).plan == Plan()
    shell = "X=aaaaaaaa\n" + "X=$X$X\n" * 40
    assert "grows beyond" in refusal("megatron", shell + "python a.py --x $X")
    assert "power too large" in refusal("colossalai", "HybridParallelPlugin(tp_size=2**9**9, pp_size=1)")
    words = " ".join(f"--x{i} {i}" for i in range(4000))
    assert translate("megatron", [f"python a.py {words}"]).plan == Plan()
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("python a.py --x \"$A b\" --y 'c # d' # --z", {"--x": None, "--y": "c # d"}),
        ('A=1\nB="--x ${A} --y=${A}"\npython a.py $B', {"--x": "1", "--y": "1"}),
        ('A=(--x 1 # one\n  --y "2 3"\n)\npython a.py "${A[@]}"', {"--x": "1", "--y": "2 3"}),
        ("N=(a b c)\npython a.py --n ${#N[@]} --second ${N[1]}", {"--n": "3", "--second": "b"}),
        ("python a.py --x $((2 * (3 + 4) / 5))", {"--x": "2"}),
        ("python a.py --x ${X:-${Y:-7}} --y ${Z-}", {"--x": "7", "--y": True}),
        (
            "X=1\nif [ $X -eq 2 ]; then Y=--a; elif [ $X = 1 ]; then Y=--b; else Y=--c; fi\npython a.py $Y",
            {"--b": True},
        ),
        ("python a.py \\\n  --x 1 \\\n  --y -2 > log 2>&1 &", {"--x": "1", "--y": "-2"}),
    ],
)
def test_scripts_are_read_as_a_shell_reads_them(script: str, options: dict[str, object]) -> None:
    """Catches quotes, comments, arrays, defaults, sums and branches read otherwise than bash does."""
    found = from_text(script).options
    assert set(found) == set(options)
    assert {name: found[name] for name, value in options.items() if value is not None} == {
        name: value for name, value in options.items() if value is not None
    }


def test_a_deepspeed_configuration_beside_the_script(tmp_path: Path) -> None:
    """Catches --zero-stage taken where DeepSpeed reads its own file."""
    (tmp_path / "ds.json").write_text(
        json.dumps({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}})
    )
    script = tmp_path / "run.sh"
    script.write_text("deepspeed --num_gpus 2 a.py --deepspeed --deepspeed_config ds.json --zero-stage 1\n")
    assert translate("megatron", [str(script)]).plan == Plan(data=2, zero=3, offload=True)
