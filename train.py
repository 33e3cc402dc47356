"""Train an adapter, reload it, score it: `python train.py method=mixlora model=... task=multi`."""

import sys

from mixlora_exp.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
