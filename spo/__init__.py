"""The machinery of spo: nothing in here is needed to understand the paper.

Importing this package before torch sets how OpenMP's threads wait for each other. By default they
spin for milliseconds, and one other busy process on two cores then makes a training step 20 times
slower. Here they spin for about a microsecond and then sleep (experiments/RESULTS.md has what that
costs and gains). Tensors of many pages get huge ones: generation reads its cache 5% faster.
Settings of the user's own win.
"""

import os

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "passive"
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
