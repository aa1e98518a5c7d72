"""Drawings of what the runtime did, on Pillow and numpy alone: `show`, charts, their canvas."""
