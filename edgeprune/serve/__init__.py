"""An HTTP server for bundles, with the interface of OpenAI's chat completions. Needs no PyTorch."""
