"""`mixlora-exp collect` for a checkout."""

from checkout import run

if __name__ == "__main__":
    run("collect")
