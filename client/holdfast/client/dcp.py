"""Holdfast as a storage back end of ``torch.distributed.checkpoint``: `HoldfastReader` and `HoldfastWriter`."""

from holdfast.client.dcp_reader import HoldfastReader
from holdfast.client.dcp_writer import HoldfastWriter

__all__ = ["HoldfastReader", "HoldfastWriter"]
