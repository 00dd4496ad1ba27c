"""Settings of other systems as plans with notes. Importing this package leaves torch unloaded."""

from seqloom.dialects.ledger import Ledger, Note, Verdict
from seqloom.dialects.translate import DIALECTS, translate
from seqloom.dialects.translation import Translation, long_enough, notes_as_json
from seqloom.dialects.unsaid import UNSAID

__all__ = [
    "DIALECTS",
    "UNSAID",
    "Ledger",
    "Note",
    "Translation",
    "Verdict",
    "long_enough",
    "notes_as_json",
    "translate",
]
