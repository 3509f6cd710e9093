import os

# PyTensor logs the errors of rewrites and goes on without them. Here they are errors.
flags = [os.environ.get("PYTENSOR_FLAGS"), "on_opt_error=raise"]
os.environ["PYTENSOR_FLAGS"] = ",".join(filter(None, flags))
