"""The machinery of spo: nothing in here is needed to understand the paper.

Importing this package before torch sets how OpenMP's threads wait for each other. By default they
spin, and one other busy process on two cores then makes a training step 20 times slower. A setting
of the user's own wins.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
