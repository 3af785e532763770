"""Torch code with plain parameters: EMA, freezing, monitoring, masks."""
