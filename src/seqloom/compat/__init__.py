"""The faces that users of other systems know, thin over seqloom's own rooms; the only room with state of a process."""
