"""One record of one run: written, verified, read, printed."""
