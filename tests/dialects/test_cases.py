"""Every collected setting means the layout it states."""

import pytest

from dialects.cases import COLOSSALAI, MEGATRON, MINDFORMERS, Case
from seqloom.dialects import translate
from seqloom.plan import Plan

CASES = [
    pytest.param(dialect, case, id=f"{dialect}: {name}")
    for dialect, cases in (("colossalai", COLOSSALAI), ("megatron", MEGATRON), ("mindformers", MINDFORMERS))
    for name, case in cases.items()
]


@pytest.mark.parametrize(("dialect", "case"), CASES)
def test_layout(dialect: str, case: Case) -> None:
    """Catches a degree read wrongly, a default that is not theirs, and a note left out."""
    found = translate(dialect, [case.settings], world=case.world, version=case.version)
    assert str(found.plan) == str(Plan.parse(case.plan))
    assert {key: found.train[key] for key in case.train} == case.train
    for option, verdict, words in case.notes:
        said = [note for note in found.notes if note.option == option and note.verdict == verdict]
        assert any(words in note.why for note in said), [note for note in found.notes if note.option == option]
