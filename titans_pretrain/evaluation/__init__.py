"""What a model can do beyond its mean loss: perplexity by position, needles in haystacks, facts scattered over prose."""
