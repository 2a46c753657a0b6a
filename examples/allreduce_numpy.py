#!/usr/bin/env python3
"""Averages a NumPy array over all ranks, without torch:

mpirun -n 4 python allreduce_numpy.py
"""

import numpy as np

import smdistributed_rs

with smdistributed_rs.init() as world:
    gradient = np.full(1_000_000, world.rank, dtype=np.float32)
    world.all_reduce(gradient, "avg")
    assert (gradient == (world.size - 1) / 2).all()

    losses = world.gather(np.array([0.5 + world.rank]))
    if world.rank == 0:
        print(f"{world.size} ranks, found by {world.how}: {world.describe()}")
        print(f"average {gradient[0]}, losses {losses.ravel()}")
