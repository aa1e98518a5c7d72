"""A small InternVL that needs its tiles, and what leaving some of them out costs."""
