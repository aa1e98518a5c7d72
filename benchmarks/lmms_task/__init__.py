"""The demo's questions as a local task of lmms-eval, and as a file that `compare` reads."""
