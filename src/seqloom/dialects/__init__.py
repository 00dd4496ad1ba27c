"""Settings of other systems as plans with notes. Importing this package leaves torch unloaded."""

from seqloom.dialects.ledger import Note, Verdict
from seqloom.dialects.translate import DIALECTS, translate
from seqloom.dialects.translation import Translation, notes_as_json

__all__ = ["DIALECTS", "Note", "Translation", "Verdict", "notes_as_json", "translate"]
