"""Any settings at all: a plan or one clear sentence, nothing run, and quickly."""

import json
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from dialects.generated import SETTINGS
from seqloom.dialects import translate
from seqloom.errors import DialectError, SeqloomError

WORLDS = st.sampled_from([None, 1, 2, 4, 8, 16, 64])
VERDICTS = {"mapped", "changed", "no effect", "refused"}


def holds(dialect: str, text: str, world: int | None, keep: bool, folder: Path) -> None:
    """A plan whose JSON reads back and whose notes are whole, or a refusal in words; the folder stays empty."""
    start = time.process_time()
    try:
        found = translate(dialect, [text], world=world, keep_order=keep)
    except DialectError as error:
        said = str(error)
        assert said and "\n" not in said and "Traceback" not in said
        notes = error.notes
    except SeqloomError as error:  # pragma: no cover
        pytest.fail(f"{type(error).__name__} instead of a refusal: {error}")
    else:
        whole = json.loads(json.dumps(found.as_json(), allow_nan=False))
        assert world is None or whole["world_size"] == world
        assert not any(note["verdict"] == "refused" for note in whole["notes"])
        notes = found.notes
    assert time.process_time() - start < 1
    assert all(note.verdict in VERDICTS and note.why for note in notes)
    assert not any(folder.iterdir())


@pytest.mark.parametrize("dialect", SETTINGS)
@pytest.mark.parametrize("examples", [100, pytest.param(2000, marks=pytest.mark.sweep)])
def test_a_plan_or_a_sentence(dialect: str, examples: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback, a plan of another world, a NaN in the JSON, a command that a script's $(...) ran."""
    monkeypatch.chdir(tmp_path)

    @seed(0)
    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(SETTINGS[dialect], WORLDS, st.booleans())
    def check(text: str, world: int | None, keep: bool) -> None:
        holds(dialect, text, world, keep, tmp_path)

    check()
