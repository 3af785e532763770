"""Typer commands: parse, call one function, print."""
