"""Programs that measure seqloom against its limits and its peers; each writes a dated record (docs/benchmarks.md)."""
