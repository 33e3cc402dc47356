"""`mixlora-exp convert IN OUT` for a checkout."""

import sys

from mixlora_exp.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
