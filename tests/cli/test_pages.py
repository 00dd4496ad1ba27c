"""What pages show of commands that only read is what these print today."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from architecture.source import ROOT
from cli.conftest import Cli

PAGES = (
    "plans",
    "translate",
    "schemes",
    "from-colossalai",
    "from-mindformers",
    "from-megatron",
    "from-deepspeed",
    "from-torchtitan",
)
BLOCK = re.compile(r"(?:`([\w.-]+\.\w+)`[^`\n]*:\n\n)?```(\w*)\n(.*?)\n```", re.DOTALL)


def shown(page: str, folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Each `seqloom translate` and `seqloom plan` of a page and the lines below it; its files are written."""
    for name, language, text in BLOCK.findall((ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")):
        if name:
            (folder / name).write_text(text + "\n")
        for said in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:] if not language else []:
            command, *lines = said.rstrip("\n").split("\n")
            if command.startswith(("seqloom translate", "seqloom plan")) and lines:
                yield command, lines


def piped(lines: list[str], pipe: str) -> list[str]:
    """Lines through head or grep."""
    program, *options = shlex.split(pipe)
    if program == "head":
        return lines[: int(options[0].lstrip("-"))]
    assert (program, options[0]) == ("grep", "-i")
    words = "|".join(re.escape(word) for word in options[2::2])
    return [line for line in lines if re.search(words, line, re.IGNORECASE)]


@pytest.mark.parametrize("page", PAGES)
def test_pages_show_what_is_printed(page: str, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a page whose example prints something else since."""
    monkeypatch.chdir(tmp_path)
    examples = list(shown(page, tmp_path))
    assert examples
    (tmp_path / "ds_config.json").write_text('{"train_batch_size": 64, "zero_optimization": {"stage": 2}}')
    (tmp_path / "qwen2-7b.json").write_text(QWEN)
    for command, lines in examples:
        call, *pipes = command.split(" | ")
        _, out, err = cli(*shlex.split(call)[1:])
        found = (out + err).rstrip("\n").split("\n")
        for pipe in pipes:
            found = piped(found, pipe)
        assert found == lines, command


QWEN = """{"model_type": "qwen2", "vocab_size": 152064, "max_position_embeddings": 262144, "rms_norm_eps": 1e-06,
"rope_theta": 1000000.0, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
"num_attention_heads": 28, "num_key_value_heads": 4}"""
