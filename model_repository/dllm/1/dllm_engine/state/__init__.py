"""Host state of running requests, and the batch of one step made from it."""
