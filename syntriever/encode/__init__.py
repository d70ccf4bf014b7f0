"""From the name of an encoder to vectors on disk and the passages nearest to a query. May import `data`, `run`
and `files`.
"""
