"""Tokenised shards on disk and the stream of training sequences read from them."""
