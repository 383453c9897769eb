"""What is computed: torch code that runs in any process and knows nothing of Ray.

The rooms `model` and `store` import no torch, so that planning
stays fast.
"""
