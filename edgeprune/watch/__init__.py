"""Frames of a camera, a stream, a file, a folder or a pipe, asked one by one. Needs no PyTorch."""
