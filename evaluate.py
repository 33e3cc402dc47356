"""Score an adapter that exists: `python evaluate.py run=outputs/NAME protocol=lm_eval`."""

from mixlora_exp.cli.evaluate import main

if __name__ == "__main__":
    main()
