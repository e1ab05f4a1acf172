"""Running a trained model: the exported folder, the tokenizer, prefill and decode, sampling."""
