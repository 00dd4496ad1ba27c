"""Every error seqloom raises on purpose.

    SeqloomError
    ├── ConfigError        a setting is unknown, of the wrong type, or missing
    ├── DataError          text, tokens or a batch cannot be used as given
    ├── ModelError         a model cannot be run exactly under any plan yet
    ├── PlanError          a plan cannot be honoured; carries every reason and the nearest legal plan
    ├── DialectError       settings of another system cannot be translated; carries every reason and note
    ├── CheckpointError    a checkpoint is incomplete, or is not this model's
    ├── NumericsError      a loss or a gradient is not finite
    ├── CommunicationError a collective failed: a peer died or stalled
    └── WorkerError        a worker process of a local run failed; names its rank

Each message is one sentence that holds the fact, the limit and the way out.
"""

from collections.abc import Sequence


class SeqloomError(Exception):
    """Base of all errors that are meant to be read by a user."""


class ConfigError(SeqloomError):
    """A setting is unknown, of the wrong type, or missing."""


class DataError(SeqloomError):
    """Text, tokens or a batch cannot be used as given."""


class ModelError(SeqloomError):
    """A model, or a feature of it, that seqloom cannot run exactly."""


class PlanError(SeqloomError):
    """A plan that cannot be honoured.

    `reasons` holds every reason at once; `nearest` is the legal plan closest to the one asked
    for, printed as text, or None when no plan of this size is legal.
    """

    def __init__(self, reasons: str | Sequence[str], nearest: str | None = None) -> None:
        self.reasons = (reasons,) if isinstance(reasons, str) else tuple(reasons)
        self.nearest = nearest
        advice = f" Try {nearest}." if nearest else ""
        super().__init__(" Also: ".join(self.reasons) + advice)


class CheckpointError(SeqloomError):
    """A checkpoint is incomplete, or does not belong to this model and plan."""


class NumericsError(SeqloomError):
    """A loss or a gradient is not finite."""


class CommunicationError(SeqloomError):
    """A collective failed because a peer process died or stopped answering."""


class WorkerError(SeqloomError):
    """A worker process of a local run failed. `rank` says which one."""

    def __init__(self, rank: int, message: str, trace: str = "") -> None:
        self.rank = rank
        self.trace = trace
        super().__init__(message)


class DialectError(SeqloomError):
    """Settings of another system that cannot be translated.

    `reasons` holds every reason at once; `notes` what became of each option until then.
    """

    def __init__(self, reasons: str | Sequence[str], notes: Sequence[object] = ()) -> None:
        given = (reasons,) if isinstance(reasons, str) else reasons
        self.reasons = tuple(" ".join(reason.split()) for reason in given)  # values of files may hold line ends
        self.notes = tuple(notes)
        super().__init__(" Also: ".join(self.reasons))


def counted(number: int, noun: str) -> str:
    """A number with what it counts, as messages say it; noun: in the singular.

    >>> counted(1, "process"), counted(4096, "token"), counted(0, "entry")
    ('1 process', '4,096 tokens', '0 entries')
    """
    if number != 1:
        noun = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}es" if noun.endswith(("s", "ch")) else f"{noun}s"
    return f"{number:,} {noun}"
