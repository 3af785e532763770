"""The page of a run: figures and tables as one self-contained HTML file, from plain data."""
