"""Model families behind one interface, and the loader of their Hugging Face checkpoints."""
