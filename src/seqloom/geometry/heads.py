"""How attention heads are split over ranks, each query head beside the key/value head it reads."""

from dataclasses import dataclass

from seqloom.geometry.span import Span, even_bounds


@dataclass(frozen=True)
class HeadSplit:
    """The heads of a layer over `parts` ranks; any numbers, even or not.

    Query head h reads key/value head h // (heads / kv_heads), as grouped attention has it. A part
    takes consecutive query heads, as even as can be: whole groups where `parts` divides the
    key/value heads. A key/value head goes to each part whose query heads read it, and no other.
    """

    heads: int
    kv_heads: int
    parts: int

    @property
    def group(self) -> int:
        """How many query heads read each key/value head."""
        return self.heads // self.kv_heads

    def queries(self, part: int) -> Span:
        """The query heads of one part.

        >>> [HeadSplit(5, 5, 2).queries(part) for part in (0, 1)]
        [Span(start=0, stop=2, step=1), Span(start=2, stop=5, step=1)]
        """
        bounds = even_bounds(self.heads, self.parts)
        return Span(bounds[part], bounds[part + 1])

    def keys(self, part: int) -> Span:
        """The key/value heads that the query heads of one part read.

        >>> HeadSplit(8, 2, 4).keys(3)    # query heads 6 and 7
        Span(start=1, stop=2, step=1)
        """
        queries = self.queries(part)
        return Span(queries.start // self.group, -(-queries.stop // self.group))

    def reads(self, part: int) -> tuple[int, ...] | None:
        """For each query head of a part, its key/value head, counted from the part's first.

        None where these are regular groups: equally many query heads for each key/value head, in
        order, as a kernel for grouped heads takes them.

        >>> HeadSplit(12, 4, 3).reads(0), HeadSplit(12, 4, 3).reads(1)    # 4 query heads each, in groups of 3
        ((0, 0, 0, 1), None)
        """
        queries, first = self.queries(part), self.keys(part).start
        read = tuple(head // self.group - first for head in range(queries.start, queries.stop))
        counts = {read.count(head) for head in read}
        return None if len(counts) == 1 else read
