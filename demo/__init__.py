"""Makes the demo checkpoints: corpus, tokenizer, training and scores."""
