"""Proof that a split run equals one device."""

from seqloom.verify.compare import MEASURES, Verdict
from seqloom.verify.oracle import Trajectory
from seqloom.verify.parting import Parting
from seqloom.verify.verify import Case, verify, verify_here

__all__ = ["MEASURES", "Case", "Parting", "Trajectory", "Verdict", "verify", "verify_here"]
