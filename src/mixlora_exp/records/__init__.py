"""Records of runs: writing, verifying, reading, printing."""
