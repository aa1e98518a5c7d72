"""Measurements and the demo model's training; nothing here is installed."""
