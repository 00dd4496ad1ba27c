"""Pictures of a run: what was split how, what it cost, and whether it equals one device."""

from seqloom.report.page import write_report
from seqloom.report.record import read_folder

__all__ = ["read_folder", "write_report"]
