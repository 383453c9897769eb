"""What is computed: torch code that runs in any process and knows nothing of Ray.

`families`, `checkpoint`, `files`, `shards` and `config_patch` import no torch, so that planning
stays fast.
"""
