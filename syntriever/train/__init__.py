"""The training loop of both stages and what it keeps: batches, checkpoints, log, best epoch. May import all other
rooms but `llm`.
"""
