"""What is done with a run that has ended: talking to it, judging it, merging, averaging, exporting."""
