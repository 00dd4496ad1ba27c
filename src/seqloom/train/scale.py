"""The factor that keeps float16 gradients from vanishing, and how it follows overflow."""

from dataclasses import dataclass
from math import isfinite

from seqloom.train.step import StepReport


@dataclass(frozen=True)
class LossScale:
    """What losses are multiplied by before backward, and gradients divided by after it.

    value: a power of two, so that both are exact, as long as the first one is. finite_steps: steps in a row
    whose gradients were finite.
    """

    value: float
    finite_steps: int = 0

    def overflowed(self, report: StepReport) -> bool:
        """Whether a step is to be left out: its gradients left float16's range, and a smaller scale may keep them in.

        The report is the same on every rank, so all leave the step out or none.
        """
        return isfinite(report.loss) and not isfinite(report.gradient_norm) and self.value > 1

    def after(self, report: StepReport, window: int) -> "LossScale":
        """The scale of the next step: half after an overflow, twice after `window` finite steps in a row."""
        if not isfinite(report.gradient_norm):
            return LossScale(max(1.0, self.value / 2))
        if self.finite_steps + 1 < window:
            return LossScale(self.value, self.finite_steps + 1)
        return LossScale(self.value * 2)
