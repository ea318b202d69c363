"""Training of denoisers: configuration, batches, loss, averaging, processes and checkpoints."""
