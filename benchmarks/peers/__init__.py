"""Our dense decoder against the same decoder from other exporters."""
