"""A file per kind of input: WEIGHT, its share of a run, and `make`, which writes one."""
