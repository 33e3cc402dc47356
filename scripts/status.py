"""`mixlora-exp status` for a checkout."""

import sys

from mixlora_exp.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["status", *sys.argv[1:]]))
