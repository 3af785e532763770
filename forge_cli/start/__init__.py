"""The first minutes: what is here, a run file that fits it, and run files of other tools."""
