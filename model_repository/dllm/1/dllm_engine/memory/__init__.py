"""Memory: the plan made at start, the pages of keys and values, and what each policy keeps."""
