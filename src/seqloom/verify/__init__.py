"""Proof that a split run equals one device."""

from seqloom.verify.compare import MEASURES, Verdict
from seqloom.verify.verify import Case, verify, verify_here

__all__ = ["MEASURES", "Case", "Verdict", "verify", "verify_here"]
