"""Scores of a run on a set of rows."""
