"""Rows, templates, tokens and batches."""
