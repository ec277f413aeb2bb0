"""Schema migrations, run by `lockstep-server migrate` and at every start."""
