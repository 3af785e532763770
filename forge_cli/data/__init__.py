"""Rows: from files and the hub to finished training rows; everything here runs without torch."""
