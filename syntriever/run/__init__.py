"""What every script shares as a command: exit codes, options, the record of a run and whether it is stale,
progress, and several processes on one run. May import `files`.
"""
