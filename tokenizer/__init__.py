"""From text to a SentencePiece model (train_tokenizer.py) and from both to shards (build_shards.py)."""
