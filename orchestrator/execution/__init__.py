"""Where steps run and what is recorded: executors, failures, the run folder, jobs sent to a
cluster.
"""
