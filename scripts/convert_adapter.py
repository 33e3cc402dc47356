"""`mixlora-exp convert IN OUT` for a checkout."""

from checkout import run

if __name__ == "__main__":
    run("convert")
