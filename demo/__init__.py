"""Makes the demo checkpoint: its corpus, its tokenizer, its training and its scores."""
