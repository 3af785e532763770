"""Carries a plan out; owns the run folder."""
