"""One file per command: `add` describes its options, `run` calls one function and prints."""
