"""Solvers for the per-layer counts: `joint` (fast), `exact` (small cases), `paper` (per sample).

Each is a function of a `Problem` and returns a `Solution`; `edgeprune.calib.schedule.solve` poses
the problem from what calibration measured and picks one of them by name.
"""
