"""Interventions: deltas that are added to rows of hidden states."""
