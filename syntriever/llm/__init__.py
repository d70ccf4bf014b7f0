"""Asking a language model: requests through a ledger, within limits of cost, to any teacher. May import `data`,
`run` and `files`; knows nothing of encoders.
"""
