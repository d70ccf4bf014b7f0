"""Datasets in BEIR layout: corpus, queries, judgements, and where they are downloaded from. May import `run`
and `files`.
"""
