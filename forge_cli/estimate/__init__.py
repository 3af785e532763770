"""Memory arithmetic, without torch."""
