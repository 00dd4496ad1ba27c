"""Running a command line in this process."""

import sys
from collections.abc import Callable

import pytest

from seqloom.cli.main import main

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Cli:
    """Run a command line: exit status, stdout, stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["seqloom", *arguments])
        with pytest.raises(SystemExit) as left:
            main()
        said = capfd.readouterr()
        return int(left.value.code or 0), said.out, said.err

    return run


def refused(said: tuple[int, str, str]) -> str:
    """The one sentence of a refusal."""
    code, out, err = said
    assert (code, out) == (2, ""), said
    assert err.startswith("Error: ") and err.count("\n") == 1 and "Traceback" not in err, err
    return err.removeprefix("Error: ").rstrip("\n")
