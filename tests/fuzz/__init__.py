"""Hostile inputs, made from a seed, for every reader that takes a stranger's file or number.

    python -m tests.fuzz --inputs 5000 --seed 1

An input is right when its command succeeds, or ends with exit code 2 and one line on stderr. It is
wrong when the process dies, a traceback is shown, 10 seconds pass, 2 GB of memory are used, another
program is started, or a file is opened that the input may not reach.

Each process runs under a limit of its address space, as docs/untrusted-bundles.md tells users to
set one. What asks for more has to end in one line, too.

`kinds/` has a file per kind of input; each is found by its name. `case.py` says what an input is,
`seeds.py` makes the good files that are altered, `worker.py` runs inputs in a process of its own,
`judge.py` watches that process, and `report.py` counts.
"""
