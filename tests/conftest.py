import gc
import os

# PyTensor logs the errors of rewrites and goes on without them. Here they are errors. Where
# variables were made, which it notes for each of them, is of no use to a test and takes time.
flags = [os.environ.get("PYTENSOR_FLAGS"), "on_opt_error=raise,traceback__limit=0"]
os.environ["PYTENSOR_FLAGS"] = ",".join(filter(None, flags))

# Each worker has a core of its own, and the matrices are small
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# Graphs are full of cycles, and looking for them after every 2,000 objects takes time too
gc.set_threshold(200_000, 20, 20)
