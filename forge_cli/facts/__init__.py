"""Shapes of known models, read without weights and without the network."""
