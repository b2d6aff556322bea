"""Kinds of task and ways with long rows, which spec, data and checkpoints name alike."""

from typing import Literal

TaskKind = Literal["causal_lm", "preference", "reward", "classification", "regression"]
WRITING = ("causal_lm", "preference")  # whose model answers with text
PAIRED = ("preference", "reward")  # whose rows have a chosen and a rejected answer
ANSWERED = ("causal_lm", *PAIRED)  # whose rows have answers in words
Overflow = Literal["error", "drop", "truncate_prompt", "truncate_answer"]  # what is done with rows that are too long
