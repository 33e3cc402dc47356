"""Train an adapter, reload it, score it: `python train.py method=mixlora model=... task=multi`."""

from mixlora_exp.cli.train import main

if __name__ == "__main__":
    main()
