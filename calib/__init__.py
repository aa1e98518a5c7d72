"""Calibration: what a model loses without visual tokens, and the schedule that loses least."""
