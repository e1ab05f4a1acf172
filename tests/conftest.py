"""Settings that must stand before torch and triton are loaded, also when pytest is called by hand."""

import os

# One thread a process: the tensors are tiny, the ranks of a test share the cores, and threads that wait for each other cost
# minutes.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Triton kernels run in its interpreter, on the CPU: no test needs a GPU. Read when triton is first loaded.
os.environ["TRITON_INTERPRET"] = "1"
