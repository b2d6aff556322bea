"""Objectives: what the loss is and what a prediction is."""
