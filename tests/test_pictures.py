"""The drawings of docs/schemes.md are what the plan's tables say today."""

from importlib.util import module_from_spec, spec_from_file_location

from architecture.source import ROOT


def test_drawings_are_those_of_the_code() -> None:
    """Catches a grid or layout that has changed under a drawing, and a drawing changed by hand."""
    spec = spec_from_file_location("pictures", ROOT / "docs" / "pictures.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    drawn = module.pictures()
    folder = ROOT / "docs" / "images"
    assert {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.svg")} == drawn
    page = (ROOT / "docs" / "schemes.md").read_text(encoding="utf-8")
    assert [name for name in drawn if f"images/{name}" not in page] == []
