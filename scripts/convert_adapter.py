"""`mixlora-exp convert IN OUT` for a checkout: an adapter of the official packages to PEFT's."""

import sys

from mixlora_exp.cli.convert import run
from mixlora_exp.system.guarded import guarded

if __name__ == "__main__":
    sys.exit(guarded(run, sys.argv[1:], resumes=False))
