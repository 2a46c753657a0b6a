"""`smddprun`: starts the ranks of a job by the mpirun that is there, and prepares each rank. See `main`."""
