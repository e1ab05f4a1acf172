"""Distributed pretraining of Titans language models (arXiv 2501.00663)."""

__version__ = "0.1.0"
