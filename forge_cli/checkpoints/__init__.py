"""The run folder on disk: checkpoints that are whole or absent, and the lock. Torch-free."""
