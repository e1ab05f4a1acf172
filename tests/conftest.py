"""One thread a process, also when pytest is called by hand: the tensors are tiny, the ranks of a test share the cores, and
threads that wait for each other cost minutes."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
