"""Settings of each dialect at random: sensible, odd and broken."""

from hypothesis import strategies as st

from seqloom.dialects.colossalai_options import BY_NAME as PLUGIN_NAMES
from seqloom.dialects.colossalai_options import HYBRID
from seqloom.dialects.megatron_options import BY_NAME, LAYOUT, NO_EFFECT, SCHEDULE

DEGREES = st.sampled_from([1, 2, 3, 4, 6, 8, 16])
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 10**12),
    st.floats(),
    st.text(max_size=12),
    st.lists(st.integers(-1, 40), max_size=4),
    st.dictionaries(st.text(max_size=4), st.integers(), max_size=2),
)
VALUES = st.one_of(DEGREES, DEGREES, DEGREES, ODD)
PIECES = st.sampled_from(
    [
        "$X",
        "${X}",
        "${X:-4}",
        "$((X*2))",
        "$((1/0))",
        "$((9**99))",
        "$(touch\tx)",
        "`id`",
        "'a\tb'",
        '"$X"',
        "${#A[@]}",
        "${A[@]}",
        "(",
        ")",
        ";",
        "|",
        "<<EOT",
        "#",
        "if",
        "[\t1\t=\t1\t];",
        "then",
        "else",
        "fi",
        "X=8",
        "X+=$X$X",
        "A=(1",
        "2)",
        "\\",
        "\n",
        "'",
        '"',
        "{",
        "}",
    ]
)
"""Bits of shell, closed or not."""

WORDS = {
    "sequence_parallelism_mode": st.sampled_from(["split_gather", "ring", "all_to_all", "ring_attn", "rings", None]),
    "precision": st.sampled_from(["fp16", "bf16", "fp32", "fp8"]),
    "pp_style": st.sampled_from(["1f1b", "interleaved", "zbv", "gpipe"]),
    "enable_sequence_parallelism": st.booleans(),
    "zero_stage": st.integers(0, 3),
    "num_layers_per_stage": st.lists(st.integers(0, 9), max_size=5),
    "--context-parallel-algo": st.sampled_from(
        [
            "ulysses_cp_algo",
            "megatron_cp_algo",
            "hybrid_cp_algo",
            "adaptive_cp_algo",
            "kvallgather_cp_algo",
            "mamba_cp_algo",
            "x",
        ]
    ),
    "--cp-comm-type": st.sampled_from(["p2p", "a2a", "all_gather", "a2a+p2p", "p2p a2a", "q"]),
    "--hierarchical-context-parallel-sizes": st.sampled_from(["2 2", "2 4", "4", "a b"]),
    "--rampup-batch-size": st.sampled_from(["2 2 100", "16 16 9_765_625", "3 0 1", "1 2"]),
    "--recompute-granularity": st.sampled_from(["full", "selective", "half"]),
    "--recompute-method": st.sampled_from(["uniform", "block"]),
    "context_parallel_algo": st.sampled_from(["colossalai_cp", "ulysses_cp", "hybrid_cp", "hybird_cp"]),
    "context_parallel_method": st.sampled_from(["colossal", "ulysses", "hybrid", "x"]),
    "parallel_mode": st.sampled_from([0, 1, 2, 3, "semi_auto_parallel", "x"]),
    "use_seq_parallel": st.booleans(),
    "use_flash_attention": st.booleans(),
    "use_ring_attention": st.booleans(),
    "recompute": st.one_of(st.booleans(), st.lists(st.integers(0, 9), max_size=4)),
}


@st.composite
def colossalai(draw: st.DrawFn) -> str:
    """A plugin, an older configuration or a command line, as a Python file or flags."""
    kind = draw(st.sampled_from(["plugin", "plugin", "moe", "gemini", "parallel", "command", "text"]))
    if kind == "text":
        return draw(st.text(max_size=80))
    if kind == "parallel":
        modes = st.sampled_from(["1d", "2d", "2.5d", "3d", "sequence", "4d", None])
        tensor = {
            "size": draw(VALUES),
            "mode": draw(modes),
            **draw(st.dictionaries(st.just("depth"), VALUES, max_size=1)),
        }
        section = draw(
            st.sampled_from(
                [{"pipeline": draw(VALUES), "tensor": tensor}, {"data": 1, "tensor": tensor}, {"tensor": 4}]
            )
        )
        return f"NUM_MICRO_BATCHES = {draw(VALUES)!r}\nparallel = {section!r}"
    if kind == "command":
        flags = draw(
            st.lists(
                st.sampled_from(["--tp", "--sp", "--pp", "--zero", "--ep", "--mbs", "-b", "-l", "--n_chunks"]),
                max_size=5,
            )
        )
        mode = draw(
            st.sampled_from(["", "--sp_mode ring_attn", "--sp_mode split_gather", "-g", "-c 7b", "-p gemini", "-p 3d"])
        )
        return f"benchmark.py {mode} " + " ".join(f"{flag} {draw(DEGREES)}" for flag in flags)
    names = st.one_of(
        st.sampled_from(["tp_size", "pp_size", "sp_size", *WORDS, "ep_size"]), st.sampled_from([*HYBRID, *PLUGIN_NAMES])
    )
    chosen = [name for name in draw(st.lists(names, max_size=9, unique=True)) if name.isidentifier()]
    given = [f"{name}={draw(WORDS.get(name, VALUES) if draw(st.integers(0, 9)) else VALUES)!r}" for name in chosen]
    extra = draw(st.sampled_from(["", "tp_size=int('4')", "**other", "*args", "tp_size=__import__('os').getpid()"]))
    name = {"plugin": "HybridParallelPlugin", "moe": "MoeHybridParallelPlugin", "gemini": "GeminiPlugin"}[kind]
    return f"p = {name}({', '.join([*given, *([extra] if extra else [])])})"


@st.composite
def mindformers(draw: st.DrawFn) -> str:
    """A YAML file of either generation."""
    import yaml

    if draw(st.integers(0, 9)) == 0:
        return draw(st.text(max_size=80))
    names = [
        "data_parallel",
        "model_parallel",
        "pipeline_stage",
        "context_parallel",
        "expert_parallel",
        "ulysses_degree_in_cp",
    ]
    names += ["micro_batch_num", "context_parallel_algo", "use_seq_parallel", "vocab_emb_dp"]
    newer = [
        "tensor_parallel",
        "pipeline_parallel",
        "context_parallel",
        "data_parallel_shard",
        "context_parallel_method",
    ]
    newer += ["ulysses_degree_in_cp", "expert_parallel"]

    def section(keys: list[str]) -> dict[str, object]:
        chosen = draw(st.lists(st.sampled_from(keys), max_size=6, unique=True))
        return {key: draw(WORDS.get(key, VALUES) if draw(st.integers(0, 9)) else ODD) for key in chosen}

    values: dict[str, object] = (
        {"parallelism": section(newer)} if draw(st.booleans()) else {"parallel_config": section(names)}
    )
    values |= draw(st.dictionaries(st.sampled_from(["use_legacy", "use_parallel"]), st.booleans(), max_size=1))
    values["parallel"] = section(["parallel_mode", "enable_parallel_optimizer", "full_batch", "enable_alltoall"])
    numbers = ["hidden_size", "num_layers", "num_heads", "n_kv_heads", "seq_length", "multiple_of", "vocab_size"]
    values["model"] = {
        "model_config": section(
            [*numbers, "use_flash_attention", "use_ring_attention", "use_attn_mask_compression", "compute_dtype"]
        )
    }
    values["runner_config"] = section(["batch_size", "gradient_accumulation_steps", "epochs", "sink_mode"])
    values["recompute_config"] = section(["recompute", "select_recompute"])
    values |= draw(st.dictionaries(st.text(max_size=5), ODD, max_size=2))
    return yaml.dump(values)


@st.composite
def megatron(draw: st.DrawFn) -> str:
    """Flags, or a script that builds them, with bits of shell between."""
    known = [*LAYOUT, *LAYOUT, *SCHEDULE, *BY_NAME, *(name for names in NO_EFFECT.values() for name in names.split())]
    chosen = draw(st.lists(st.sampled_from(known), max_size=10, unique=True))
    flags = []
    for name in chosen:
        value = draw(WORDS.get(name, st.one_of(DEGREES.map(str), DEGREES.map(str), PIECES, st.text(max_size=6))))
        flags.append(draw(st.sampled_from([f"{name} {value}", f"{name} {value}", f"{name}={value}", name])))
    if draw(st.booleans()):
        return " ".join(flags) or "--seq-length 8"
    lines = draw(st.lists(PIECES, max_size=6))
    return (
        "X=4\n" + " ".join(lines) + f'\nARGS="{" ".join(flags)}"\ntorchrun --nproc_per_node 8 train.py $ARGS --bf16\n'
    )


SETTINGS = {"colossalai": colossalai(), "mindformers": mindformers(), "megatron": megatron()}
