"""How much is worked on at once: what the workers keep to and the plan counts with, so it needs no
torch.
"""

BLOCK_ROWS = {"cpu": 512, "cuda": 4096}
"""Rows of a block, by kind of device. 512 x 28672 numbers of fp64 are 112 MiB; a GPU, which copies
a factor for every block it solves for, takes more at once. Part of the result: sums over blocks
round accordingly.
"""
PRODUCT_TOKENS = 1024
"""Tokens of one fp32 product: rounding is at most about 6e-5 of such a sum, and adding it in fp64
costs less than the product.
"""
PANEL = 128
"""Columns that pivoting takes before it updates the matrix: what its memory traffic is divided
by.
"""
EVALUATED_AT_ONCE = 64
"""Windows that a worker takes through the layers together, for which it reads the weights once:
what bounds their hidden states, however long the text is.
"""
TOLD_AT_ONCE = {"cpu": 4, "cuda": EVALUATED_AT_ONCE}
"""Evaluation windows of a worker behind which it tells what it has found, by kind of device: on a
CPU reading the weights takes little of the time of so many.
"""
CONVERTED_BYTES = 64 * 2**20
"""Of a mapped weight matrix, so much at most is converted to the type of the forward passes at a
time.
"""
