"""The models: Titans (MAC, MAG, MAL, LMM) and the Transformer baselines, written as if there were one process."""

from titans_pretrain.model.init import initialize, weight_decay_applies
from titans_pretrain.model.titans import Titans

__all__ = ["Titans", "initialize", "weight_decay_applies"]
