"""The Python face of Forge."""
