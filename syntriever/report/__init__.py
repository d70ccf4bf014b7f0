"""What results are worth and how they are shown: measures, tests, the judge's report, the page, the model card.
May import `data`, `run` and `files`.
"""
