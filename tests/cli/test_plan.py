"""seqloom plan: what is legal, what it costs, and which kernels there are."""

import subprocess
import sys

import pytest

from cli.conftest import Cli, refused
from seqloom.geometry import Layout, Mask
from seqloom.plan import ModelShape, Plan, every_plan, fit, fit_world, read_config
from seqloom.planner import attention_bytes, places, tensor_bytes
from train.runs import environment

PLAN = ("plan", "--model", "llama", "--seq-len")


def test_plan_that_is_legal(cli: Cli) -> None:
    """Catches a plan called legal with the numbers of another, or bytes of axes that are not split."""
    code, out, err = cli(*PLAN, "4096", "--check", "ring=2 ulysses=2", "--world", "4")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == (
        "Legal: 'ring=2 ulysses=2' on 4 processes; each holds 1,024 of 4,096 tokens, and 2 of 4 query heads and "
        "1 of 2 key/value heads in attention."
    )
    assert lines[1] == (
        "Attention work of the busiest ring rank over the mean: "
        "1.000 (contiguous 1.500, striped 1.000, balanced 1.000)."
    )
    assert [line.split(" along ")[1].split(",")[0] for line in lines[2:4]] == ["ring", "ulysses"]
    _, out, _ = cli(*PLAN, "4096", "--check", "ring=4 layout=contiguous")
    assert "over the mean: 1.75" in out, "4 equal parts of a triangle: 7/16 over 4/16"
    assert "ulysses" not in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ("7", "--check", "ring=4"),
            "A sequence of 7 tokens is too short for ring=4 ulysses=1 layout=zigzag to give each rank at ",
        ),
        (("64", "--check", "ring=2", "--world", "4"), "The plan 'ring=2' takes 2 processes, but there are 4. Try "),
        (("64", "--check", "ulysses=16", "--heads", "12"), "ulysses=16 is more than the model's 12 query heads, and "),
        (("64", "--check", "ring=4 inner_ring=3"), "inner_ring=3 does not divide ring=4; nearest to it do 2 and 4."),
        (
            ("64", "--check", "tensor=5", "--heads", "12"),
            "12 query heads cannot be split evenly over tensor=5; use a degree that divides them: 1, 2, 3, 4, 6, 12.",
        ),
        (("0", "--check", "ring=2"), "A sequence of 0 tokens is empty; the shortest has 1."),
    ],
)
def test_plan_that_is_not_legal(cli: Cli, arguments: tuple[str, ...], says: str) -> None:
    """Catches a reason that is not told, or is told without the way out."""
    said = refused(cli(*PLAN, *arguments))
    assert said.startswith(says)
    assert " Try " in said or "nearest" in said or "shortest" in said or "only degree" in said


@pytest.mark.parametrize(
    ("check", "says"),
    [
        (
            "tensor=4 ring=2",
            [
                "each holds 128 of 1,024 tokens, and 1 of 4 query heads and 1 of 2 key/value heads in attention.",
                "Tensor grid tensor 4: in the residual stream 128 tokens and all of 32 channels, inside the MLP 512 "
                "tokens and 12 of 48 channels.",
                "along ring, forward and backward, in bf16.",
                # 10 (t-1)/t N h elements of two bytes
                "Each process sends 245,760 bytes a layer and sequence along tensor in its linears, forward and ",
            ],
        ),
        (
            "tensor=6 tensor_kind=2d grid=3x2",
            [
                "each holds 341 to 342 of 1,024 tokens, and 2 of 4 query heads and 1 of 2 key/value heads in",
                "Tensor grid row 3 x col 2: in the residual stream 341 to 342 tokens and 16 of 32 channels, inside the "
                "MLP 341 to 342 tokens and 24 of 48 channels.",
                "over the mean: 1.0",
                "along ring, forward",
                " along row in its linears, forward and backward, in bf16.",
                " along col in its linears, forward and backward, in bf16.",
            ],
        ),
        (
            "tensor=8 tensor_kind=3d tensor_tokens=ulysses",
            [
                "each holds 256 of 1,024 tokens, and 1 of 8 query heads and 1 of 4 key/value heads in attention.",
                "Tensor grid output 2 x input 2 x weight 2: ",
                "along ulysses, forward",
                "along output in its linears",
                "along input in its linears",
                "along weight in its linears",
            ],
        ),
    ],
)
def test_a_tensor_grid_is_told(cli: Cli, check: str, says: list[str]) -> None:
    """Catches the grid's part of what a plan costs left out, or attention's told for the plan's ring alone."""
    code, out, err = cli(*PLAN, "1024", "--check", check)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    lines = [line for line in lines if "in float32" not in line]
    if "2d" not in check:
        lines = [line for line in lines if "over the mean" not in line]
    assert len(lines) == len(says)
    assert [said for line, said in zip(lines, says, strict=True) if said not in line] == []


def test_bytes_of_a_grid_are_those_of_the_planner(cli: Cli) -> None:
    """Catches the bytes of one rank told as those of all: an awkward length over three rows."""
    text = "tensor=6 tensor_kind=2d grid=3x2"
    plan = Plan.parse(text)
    model = ModelShape.from_config(fit(read_config("llama"), plan, 1003))
    found = [tensor_bytes(plan, model, 1003, place=place, item_bytes=2)["row"] for place in places(plan)]
    counts = [sum(ways.values()) for ways in found]
    _, out, _ = cli(*PLAN, "1003", "--check", text)
    assert f"sends {min(counts):,} to {max(counts):,} bytes a layer and sequence along row in its linears" in out


def test_plan_tells_all_at_once(cli: Cli) -> None:
    """Catches reasons that come one by one."""
    said = refused(cli(*PLAN, "30", "--check", "ring=4 ulysses=9", "--heads", "8", "--kv-heads", "4", "--world", "5"))
    for reason in ("takes 36 processes", "8 query heads", "30 tokens"):
        assert reason in said
    assert said.count(" Also: ") == 2


def test_plan_leaves_torch_unloaded() -> None:
    """Catches an import on the way to `plan` that costs seconds before the first word."""
    program = (
        "import sys; from seqloom.cli.main import main; sys.argv[1:] = sys.argv[1:]\n"
        "try: main()\nfinally: print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    for check, code in (("ring=2 ulysses=2", 0), ("ring=3 ulysses=13", 2)):
        command = [sys.executable, "-c", program, *PLAN, "64", "--check", check, "--heads", "4"]
        ended = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, timeout=60)
        assert ended.returncode == code, ended.stderr
        assert ended.stdout.splitlines()[-1] == "[]"


def test_uneven_splits_are_told_as_ranges(cli: Cli) -> None:
    """Catches an average told as what each rank holds, and a key/value head counted to one rank only."""
    code, out, err = cli(*PLAN, "1001", "--check", "ring=2 ulysses=4", "--heads", "6", "--kv-heads", "3")
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == (
        "Legal: 'ring=2 ulysses=4' on 8 processes; each holds 125 to 126 of 1,001 tokens, and 1 to 2 of 6 query heads "
        "and 1 to 2 of 3 key/value heads in attention."
    )
    assert " to " in out.splitlines()[2] and " to " in out.splitlines()[3]


def test_work_and_bytes_are_those_of_the_mask_and_of_every_layer(cli: Cli) -> None:
    """Catches documents, windows of the model or of the command line, prefix or full attention left out of the cost."""
    plan, model = "ring=4 exchange=needed", "gemma2"
    documents = (700, 1500, 300, 548)

    def said(*more: str) -> tuple[str, str]:
        code, out, err = cli("plan", "--model", model, "--check", plan, *more)
        assert (code, err) == (0, "")
        return out.splitlines()[1].partition("mean: ")[2].split(" ")[0], out.splitlines()[2].partition(" sends ")[
            2
        ].split(" bytes")[0]

    cases: list[tuple[tuple[str, ...], Mask]] = [
        (("--seq-len", "3048"), Mask()),
        (("--documents", "700,1500,300,548"), Mask(documents=documents)),
        (("--documents", "700,1500,300,548", "--window", "100"), Mask(documents=documents, window=100)),
        (("--seq-len", "3048", "--window", "10"), Mask(window=10)),
        (("--seq-len", "3048", "--prefix", "50"), Mask(prefix=50)),
        (("--seq-len", "3048", "--full"), Mask(causal=False)),
    ]
    shape, found = ModelShape.from_config(read_config(model)), {}
    for arguments, mask in cases:
        layers = [mask.within(window) for window in shape.windows]
        work = [sum(each) for each in zip(*(Layout("zigzag", 3048, 4).work(layer) for layer in layers), strict=True)]
        counts = [
            sum(attention_bytes(Plan.parse(plan), shape, 3048, ring_rank=r, masks=(m,), item_bytes=2)["ring"].values())
            for r in range(4)
            for m in layers
        ]
        found[arguments] = said(*arguments)
        assert found[arguments] == (f"{max(work) * 4 / sum(work):.3f}", f"{min(counts):,} to {max(counts):,}")
    assert len(set(found.values())) == len(cases)


def test_many_ranks_are_not_counted_one_by_one(cli: Cli) -> None:
    """Catches the bytes of rank 0 told as those of all, and a command that takes minutes for a large plan."""
    _, out, _ = cli(*PLAN, "1000003", "--check", "ring=500 ulysses=4 layout=balanced")
    assert "Process 0 sends" in out and "Each process sends" not in out


def test_axes_of_a_double_ring(cli: Cli) -> None:
    """Catches the bytes between nodes mixed with those inside one."""
    _, out, _ = cli(*PLAN, "4096", "--check", "ring=4 inner_ring=2")
    assert [line.split(" along ")[1].split(",")[0] for line in out.splitlines()[2:4]] == ["outer ring", "inner ring"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "seqloom plan needs --check, --model, --seq-len (or --documents) to check a plan; --table alone shows"),
        (("--check", "ring=2"), "seqloom plan needs --model, --seq-len (or --documents) to check"),
        (("--check", "ring=2", "--table"), "seqloom plan needs --model, "),
        (("--table", "--heads", "4"), "seqloom plan needs --check, --model, "),
        ((*PLAN, "64", "--list", "--world", "0"), "A world of 0 processes is not possible; it has 1 to 65,536."),
        (("--list", "--model", "llama"), "seqloom plan --list needs --model and --world"),
        ((*PLAN, "64", "--list", "--world", "2", "--full"), "seqloom plan --list takes no --full: no mask or kernel"),
        (
            (*PLAN, "64", "--list", "--world", "2", "--window", "8", "--prefix", "2", "--table"),
            "seqloom plan --list takes no --window, --prefix, --table: ",
        ),
        ((*PLAN, "64", "--list", "--world", "2", "--documents", "60,3"), "--documents holds 63 tokens, but --seq-len"),
        ((*PLAN, "64", "--check", "ring=2", "--documents", "60,x"), "--documents '60,x' is not a list of lengths"),
        (
            (*PLAN, "64", "--check", "ring=2", "--documents", "60,3"),
            "--documents holds 63 tokens, but --seq-len is 64; leave --seq-len out, or make",
        ),
        ((*PLAN, "64", "--check", "ring=2", "--window", "0"), "A window of 0 tokens lets no token see itself"),
        ((*PLAN, "64", "--check", "ring=2", "--prefix", "-1"), "A prefix of -1 tokens is not possible"),
        (
            ("plan", "--model", "bloom", "--seq-len", "64", "--check", "ring=2", "--kv-heads", "2"),
            "bloom has a key/value head for each query head, so it cannot have 2; leave --kv-heads out",
        ),
    ],
)
def test_what_cannot_be_asked(cli: Cli, arguments: tuple[str, ...], says: str) -> None:
    """Catches options that are read over, and half a question answered as another one."""
    arguments = arguments if arguments[:1] == ("plan",) else ("plan", *arguments)
    assert refused(cli(*arguments)).startswith(says)


def test_the_table_of_kernels(cli: Cli) -> None:
    """Catches a table that needs a plan, leaves out kernels, or is dropped beside a check."""
    code, out, err = cli("plan", "--table")
    assert (code, err) == (0, "") and "torch_cpu" in out and "flex" in out
    code, both, err = cli(*PLAN, "64", "--check", "ring=2", "--table")
    assert (code, err) == (0, "") and both.startswith("Legal: ") and both.endswith(out)


def test_all_legal_plans_are_listed(cli: Cli) -> None:
    """Catches a list that leaves plans out, cannot be piped on, or is silent on the plan that was asked about."""
    code, out, err = cli(*PLAN, "64", "--list", "--world", "4")
    *lines, last = out.splitlines()
    shape = ModelShape.from_config(fit_world(read_config("llama"), 4, 64))
    assert (code, err) == (0, "") and [Plan.parse(line) for line in lines] == list(every_plan(shape, 64, world=4))
    assert last.startswith(f"{len(lines)} legal plans of 4 processes for llama of 4 query heads and 8 layers and seq")
    _, out, _ = cli(*PLAN, "64", "--list", "--world", "4", "--check", "ulysses=8")
    assert out.startswith("Not legal: 'ulysses=8'. The plan 'ulysses=8' takes 8 processes, but there are 4. Also: ")
    _, out, _ = cli(*PLAN, "64", "--list", "--world", "4", "--check", "ring=4")
    assert out.startswith("Legal: 'ring=4'.\n")
    _, out, _ = cli("plan", "--model", "mixtral", "--list", "--world", "2")
    listed = (
        "pipeline=2 schedule=interleaved",
        "zero=3 ring=2 expert=2",
        "tensor=2 expert=2",
        "tensor=2 expert_tensor=2",
    )
    assert set(listed) <= set(out.splitlines())


def test_another_name_of_a_model_lists_the_same(cli: Cli) -> None:
    """Catches a model that grows under one of its names alone."""
    said = [cli("plan", "--model", name, "--list", "--world", "4") for name in ("deepseek", "deepseek_v3")]
    assert said[0] == said[1] and said[0][1].endswith(" of 4 query heads and 8 layers.\n")


def test_what_recomputed_layers_keep_is_told(cli: Cli) -> None:
    """Catches a choice of recomputation whose price is not said, or said of a plan that keeps all."""
    _, out, _ = cli(*PLAN, "64", "--check", "ring=2 recompute=selective activations=offloaded")
    wanted = (
        f"host memory at most {32 * 32 * 4:,} bytes of input a sequence, and with selective {32 * 32 * 2 + 32 * 16:,}"
    )
    assert wanted in out
    assert "computed again" not in cli(*PLAN, "64", "--check", "ring=2")[1]


def test_what_weights_take_and_send_is_told(cli: Cli) -> None:
    """Catches axes that print nothing: shares, copies of them, experts and stages, and how often something is sent."""
    _, out, _ = cli("plan", "--model", "mixtral", "--seq-len", "64", "--check", "data=4 zero=3 pipeline=2 expert=2")
    said = [line.partition(" sends ")[2] for line in out.splitlines() if " sends " in line]
    # A layer: 3,072 of attention and 128 of the router in quarters, moved three times; a table of 3,072 twice.
    zero = 3 * (3 * (3072 + 128) // 4 + 2 * 3072 // 4) * 4
    expert = 3 * (2 * 3 * 48 * 32 // 2) * 4
    assert said == [
        "8,192 bytes a sequence along pipeline, forward and backward, of a float32 residual stream.",
        "about 16,400 bytes a layer and sequence along expert, forward and backward, in bf16, where routers favour no "
        "expert.",
        f"at most {zero:,} bytes a micro-batch along zero, in float32.",
        f"at most {expert:,} bytes a micro-batch along expert replicas, in float32.",
    ]
    rest = 4 * 4 * ((3072 + 128 + 3072) // 4 + 2 * 3 * 48 * 32 // 2)
    assert f"AdamW's moments take at most {rest:,} bytes of a process between steps, in float32" in out
    _, out, _ = cli(*PLAN, "64", "--check", "data=4 zero=2 zero_replicas=2")
    assert " bytes a micro-batch along zero, " in out and " bytes a step along zero replicas, " in out
    _, out, _ = cli(*PLAN, "64", "--check", "data=2 zero=1")
    assert " bytes a step along replicas, " in out and " bytes a step along zero, " in out
