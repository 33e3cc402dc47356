"""`mixlora-exp tables` for a checkout."""

import sys

from mixlora_exp.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["tables", *sys.argv[1:]]))
