"""Code that two or more stage scripts share; what the paper claims stays in the scripts.

The rooms, from the ground up: `files`, `run`, `data`; beside each other `llm`, `encode`, `report`; `train`.
A room imports only from those below it.
"""
