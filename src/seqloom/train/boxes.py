"""Boxes of whole tensors as `torch.distributed.checkpoint` writes and reads them, under any plan.

Any object may say which chunks it holds (torch/distributed/_checkpointable.py); what is saved in other boxes than
it is loaded in, torch cuts. Only its look-ups, which expect tensors, are replaced here.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner, Metadata
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from seqloom.model import Piece


@dataclass
class Boxes:
    """What this rank holds of one whole tensor of `shape`: a tensor by the offset of its box, perhaps none."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    def size(self) -> torch.Size:
        """The whole shape, by the name that torch asks for it."""
        return torch.Size(self.shape)

    def copy(self) -> "Boxes":
        """The same on the CPU, in memory of its own."""
        return Boxes(self.shape, self.dtype, {at: part.to("cpu", copy=True) for at, part in self.parts.items()})

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(at), part.size()) for at, part in self.parts.items()]

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, TensorProperties(dtype=self.dtype), self.size()),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return self.parts[tuple(index.offset or ())]


def boxes(pieces: Iterable[Piece], prefix: str = "", suffix: str = "") -> dict[str, Boxes]:
    """Pieces as boxes by the names that a checkpoint has, those of one name together; they share memory."""
    found: dict[str, Boxes] = {}
    for piece in pieces:
        held = found.setdefault(f"{prefix}{piece.name}{suffix}", Boxes(piece.shape, piece.tensor.dtype))
        if piece.tensor.numel():
            held.parts[piece.offset] = piece.tensor
    return found


def whole(tensor: Tensor) -> Boxes:
    """A tensor that this rank holds whole."""
    return Boxes(tuple(tensor.shape), tensor.dtype, {(0,) * tensor.ndim: tensor})


class SavePlanner(DefaultSavePlanner):
    """torch's planner for a flat state of boxes."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def lookup_object(self, index: MetadataIndex) -> Any:
        """The part that an entry of the plan writes."""
        return self.state_dict[index.fqn].__get_tensor_shard__(index)


class LoadPlanner(DefaultLoadPlanner):
    """torch's planner for a flat state of boxes, which are filled in place."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Take the state as it is; torch would replace what it does not know by None."""
        self.state_dict = self.original_state_dict = state_dict
        self.metadata, self.is_coordinator = metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """The part that an entry of the plan fills."""
        found: Tensor = self.state_dict[index.fqn].__get_tensor_shard__(index)
        return found
