"""CPUs: a whole layer in one compiled call, by numba (`pip install kvprofile[fast]`); without it the torch back ends serve."""
