"""`bench`: bundles timed side by side, their energy and memory, and whether backends agree."""
