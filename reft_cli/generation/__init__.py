"""Answers from a base model with an intervention."""
