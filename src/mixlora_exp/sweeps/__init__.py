"""Many runs: launched, counted, searched over."""
