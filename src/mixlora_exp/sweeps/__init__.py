"""Many runs: sweeps, their status, and hyperparameter search."""
