"""How ranks divide the work: the grid of ranks, and what they agree on."""

from titans_pretrain.parallel.grid import Axis, Grid

__all__ = ["Axis", "Grid"]
