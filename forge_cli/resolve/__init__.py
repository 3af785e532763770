"""From the text of a run file, and the layers below it, to one frozen Plan."""
