"""Latency and agreement of every engine on a machine with an NVIDIA GPU."""
