"""Pictures of a run: what was split how, what it cost, and whether it equals one device."""

from seqloom.report.page import write_report

__all__ = ["write_report"]
