"""The neural long-term memory as functions on tensors: scan a sequence into it, read it, carry its state."""

from titans_pretrain.memory.network import memory_read
from titans_pretrain.memory.pieces import tile_length
from titans_pretrain.memory.scan import expected_path, memory_scan, scan_dtype
from titans_pretrain.memory.state import MemoryOptions, MemoryState, begin_chunk, initial_state

__all__ = [
    "MemoryOptions",
    "MemoryState",
    "begin_chunk",
    "expected_path",
    "initial_state",
    "memory_read",
    "memory_scan",
    "scan_dtype",
    "tile_length",
]
