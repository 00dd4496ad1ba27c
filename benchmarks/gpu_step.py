"""A whole training step on one GPU for each choice of recomputation: tokens/s, MFU, peak memory, and selective's gain.

    python -m benchmarks.gpu_step [--tokens 32768 131072] [--choices none selective ...] [--repeats 5] [--out FOLDER]
    python -m benchmarks.gpu_step --device cpu --tokens small      # runs all of the program, measures nothing

The model is a slice of Llama-3-8B: its width, four of its layers, its vocabulary; float32 parameters, bfloat16
arithmetic, AdamW, as `seqloom train` has them. Without a GPU it writes a record that says 'not measured'.
"""

import argparse
import gc
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import distributed

from benchmarks.emulation import Sizes, seconds
from benchmarks.record import RECORDS, Record, table
from seqloom.attention.kernels import Call, choose
from seqloom.fabric import Fabric
from seqloom.model import build_model, parallelize
from seqloom.plan import Plan
from seqloom.sequence import Batch
from seqloom.train import apply_gradients, compute_gradients
from seqloom.train.optimizer import adamw

FULL = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128_256,
    "tie_word_embeddings": False,
}
SMALL = FULL | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 256,
}
SMALL_TOKENS = 128
CHOICES = ("none", "selective", "full", "full:uniform:2", "full:block:2", "selective+offloaded", "full+offloaded")
PEAK_FLOPS = 989.4e12  # dense bfloat16 of an H100 or H200 SXM, NVIDIA's data sheet
CONVENTION = (
    "MFU counts 6 operations for each token and weight of a linear, the head's among them, and for attention 12 x head "
    "width for each visible pair and head (causal pairs alone, half of the square; backward twice forward); nothing "
    f"that is computed again counts. The peak is {PEAK_FLOPS / 1e12:.1f} TFLOP/s."
)


def main(arguments: Sequence[str] | None = None) -> Path:
    """Measure what the command line asks for, write the record, print its page; returns where the page is."""
    asked = parse(arguments)
    small = asked.tokens == ["small"]
    settings, tokens = (SMALL, [SMALL_TOKENS]) if small else (FULL, [int(number) for number in asked.tokens])
    here = asked.device == "cpu" or torch.cuda.is_available()
    about = {"model": settings, "tokens": tokens, "choices": asked.choices, "repeats": asked.repeats}
    record = Record("gpu_step", about, notes=[CONVENTION], timed=here)
    if not here:
        page = record.write("Not measured: there is no CUDA GPU here.", asked.out)
    else:
        began = not distributed.is_initialized()
        if began:
            distributed.init_process_group(store=distributed.HashStore(), rank=0, world_size=1)
        for num_tokens in tokens:
            attention = attention_seconds(settings, num_tokens, asked.device, asked.repeats)
            for choice in asked.choices:
                record.rows.append(row(settings, num_tokens, choice, asked.device, asked.repeats, attention))
                page = record.write(tables(record.rows), asked.out)  # what is measured stays if a later one fails
        if began:
            distributed.destroy_process_group()
    print(page.read_text(encoding="utf-8"))
    return page


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_step", description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", nargs="+", default=["32768", "131072"], help="tokens of the sequence, or `small`")
    parser.add_argument("--choices", nargs="+", choices=CHOICES, default=list(CHOICES), help="what to recompute")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try the program, with small")
    parser.add_argument("--repeats", type=int, default=5, help="measured steps of each, after one that warms up")
    parser.add_argument("--out", type=Path, default=RECORDS, help="the folder of the record")
    asked = parser.parse_args(arguments)
    if asked.tokens != ["small"] and not all(number.isdecimal() and int(number) > 1 for number in asked.tokens):
        parser.error(f"--tokens {' '.join(asked.tokens)}: give `small`, or numbers of at least 2")
    if asked.repeats < 1:
        parser.error(f"--repeats {asked.repeats} measures nothing; give 1 or more")
    return asked


def attention_seconds(settings: dict[str, Any], num_tokens: int, device: str, repeats: int) -> float:
    """What attention's forward kernel takes in all layers, on tensors of the step's shapes."""
    heads, kv_heads = settings["num_attention_heads"], settings["num_key_value_heads"]
    sizes = Sizes(num_tokens, heads, kv_heads, settings["head_dim"], torch.bfloat16, device)
    q, k, v, _ = sizes.tensors
    call = Call(sizes.width**-0.5, causal=True)
    taken = seconds(partial(choose(q, v, call).forward, q, k, v, call), device, repeats)
    return settings["num_hidden_layers"] * median(taken)


def row(
    settings: dict[str, Any], num_tokens: int, choice: str, device: str, repeats: int, attention: float
) -> dict[str, Any]:
    """What whole steps of one choice take; out of memory is a row that says so."""
    said: dict[str, Any] = {"tokens": num_tokens, "choice": choice, "attention_forward_seconds": attention}
    try:
        taken, peak = steps(settings, num_tokens, choice, device, repeats)
    except torch.OutOfMemoryError as error:
        said["failed"] = str(error).splitlines()[0]
    else:
        each = median(taken)
        said |= {
            "step_seconds": each,
            "rounds": taken,
            "tokens_per_second": num_tokens / each,
            "mfu": model_flops(settings, num_tokens) / each / PEAK_FLOPS,
            "peak_bytes": peak,
        }
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    return said


def steps(
    settings: dict[str, Any], num_tokens: int, choice: str, device: str, repeats: int
) -> tuple[list[float], int | None]:
    """Seconds of each step, and the most bytes allocated in one; the device of a CPU counts none."""
    recompute, _, where = choice.partition("+")
    plan = replace(Plan(recompute=recompute), activations=where or "whole")
    fabric = Fabric.build(plan, device)
    model = build_model({**settings, "max_position_embeddings": num_tokens}, dtype=torch.float32)
    model = parallelize(model, fabric)
    optimizer = adamw(model, fabric, learning_rate=1e-4, weight_decay=0.1)
    tokens = torch.randint(settings["vocab_size"], (1, num_tokens), generator=torch.Generator().manual_seed(0))
    batch = Batch.from_tokens(tokens)

    def step() -> None:
        report = compute_gradients(model, [batch], fabric, precision="bf16", chunk_tokens=1024)
        apply_gradients(model, optimizer, report, clip=1.0)

    step()  # makes the optimizer's state
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    taken = seconds(step, device, repeats)
    fabric.close()
    return taken, torch.cuda.max_memory_allocated() if device == "cuda" else None


def model_flops(settings: dict[str, Any], num_tokens: int) -> float:
    """Operations of a step by the convention above."""
    hidden, heads, width = settings["hidden_size"], settings["num_attention_heads"], settings["head_dim"]
    attention = hidden * width * (2 * heads + 2 * settings["num_key_value_heads"])
    linears = attention + 3 * hidden * settings["intermediate_size"]
    layers = settings["num_hidden_layers"]
    weights = layers * linears + hidden * settings["vocab_size"]
    pairs = num_tokens * (num_tokens + 1) / 2
    return 6 * weights * num_tokens + 12 * layers * heads * width * pairs


def gain(rows: Sequence[dict[str, Any]], num_tokens: int) -> float | None:
    """The share of the possible gain over full recomputation that selective reaches; None where one is missing.

    Possible is full / (full - attention forward), reached is full / selective.
    """
    found = {each["choice"]: each for each in rows if each["tokens"] == num_tokens and "failed" not in each}
    if not {"full", "selective"} <= found.keys():
        return None
    full, selective = (found[name]["step_seconds"] for name in ("full", "selective"))
    return float((full - found["full"]["attention_forward_seconds"]) / selective)


def tables(rows: Sequence[dict[str, Any]]) -> str:
    """One line a choice, and selective's share of the possible gain for each length."""
    head = ["tokens", "recompute", "step s", "tokens/s", "MFU", "peak GiB"]
    lines = [
        [
            f"{each['tokens']:,}",
            each["choice"],
            *(
                ["failed", "", "", each["failed"]]
                if "failed" in each
                else [
                    f"{each['step_seconds']:.3f}",
                    f"{each['tokens_per_second']:,.0f}",
                    f"{each['mfu']:.3f}",
                    "-" if each["peak_bytes"] is None else f"{each['peak_bytes'] / 2**30:.1f}",
                ]
            ),
        ]
        for each in rows
    ]
    shares = [
        f"{tokens:,} tokens: selective reaches {share:.3f} of the possible gain full / (full - attention forward)."
        for tokens in dict.fromkeys(each["tokens"] for each in rows)
        if (share := gain(rows, tokens)) is not None
    ]
    return "\n\n".join([table(head, lines), *shares])


if __name__ == "__main__":
    main()
