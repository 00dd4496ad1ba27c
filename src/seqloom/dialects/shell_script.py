"""What has been read of a script."""

from dataclasses import dataclass, field

from seqloom.dialects.ledger import Unread
from seqloom.dialects.shell_values import unmarked

SLURM = ("SLURM_NNODES", "SLURM_JOB_NUM_NODES")
"""Variables that #SBATCH --nodes sets."""


@dataclass(frozen=True)
class Launch:
    """A command of the script: its words after expansion, those not known here as Unread, and its line."""

    words: tuple[str | Unread, ...]
    line: int


@dataclass
class Script:
    """A script as far as it was followed.

    launches: commands that start a program, in order. files: here-documents it writes, by name.
    exported: variables handed to the environment.
    """

    variables: dict[str, tuple[str, ...]] = field(default_factory=dict)
    launches: list[Launch] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    exported: set[str] = field(default_factory=set)

    @property
    def unused(self) -> dict[str, str]:
        """Variables that are set and never read, with their values."""
        return {
            name: unmarked(" ".join(words))
            for name, words in self.variables.items()
            if name not in self.used and name.split("[")[0] not in self.used and name not in SLURM
        }
