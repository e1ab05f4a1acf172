"""Commands for finished or running work: summaries, conversion, generation, stability, the speed of the memory."""
