"""`mixlora-exp figures` for a checkout."""

import sys

from mixlora_exp.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["figures", *sys.argv[1:]]))
