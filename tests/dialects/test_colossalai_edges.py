"""Colossal-AI's programs at their edges: values that change, other names, and notes that must be true."""

import pytest

from dialects.test_translate import refusal
from seqloom.dialects import translate
from seqloom.plan import Plan


@pytest.mark.parametrize(
    "change",
    [
        "kw['tp_size'] = 8",
        "kw.update(tp_size=4)",
        "kw.pop('tp_size')",
        "kw |= {}",
        "del kw['tp_size']",
        "a = kw\na['tp_size'] = 4",
        "if X:\n    kw = dict(tp_size=8, pp_size=1)",
    ],
)
def test_a_dict_that_is_changed_after_it_is_made(change: str) -> None:
    """Catches the first value of a dict taken where the program changes it."""
    text = f"kw = dict(tp_size=2, pp_size=1)\n{change}\nHybridParallelPlugin(**kw)"
    assert "not a literal" in refusal("colossalai", text, 8)
    legacy = f"kw = dict(pipeline=1, tensor=dict(size=4, mode='1d'))\n{change}".replace("kw", "parallel")
    assert "changed after it is made" in refusal("colossalai", legacy, 8)


def test_a_list_that_grows_and_a_section_inside() -> None:
    """Catches layers of stages without those appended, and a size set two keys deep."""
    grown = "L = [3]\nL.append(3)\nHybridParallelPlugin(tp_size=1, pp_size=2, num_layers_per_stage=L)"
    assert "changed after it is made" in refusal("colossalai", grown, 2)
    deep = "CONFIG = dict(parallel=dict(tensor=dict(size=4, mode='1d')))\nCONFIG['parallel']['tensor']['size'] = 2"
    assert "changed after it is made" in refusal("colossalai", deep, 4)


@pytest.mark.parametrize(
    "text",
    [
        "from colossalai.booster.plugin import HybridParallelPlugin as H\nH(tp_size=2, pp_size=1)",
        "import colossalai as c\nH = c.HybridParallelPlugin\nH(tp_size=2, pp_size=1)",
        "\ufeffHybridParallelPlugin(tp_size=2, pp_size=1)",
    ],
)
def test_other_names_of_a_plugin(text: str) -> None:
    """Catches a plugin that is not found under the name that the file gives it, or behind a byte order mark."""
    assert translate("colossalai", [text], world=2).plan == Plan(tensor=2, sequence_parallel=False)
