"""`mixlora-exp status` for a checkout."""

from checkout import run

if __name__ == "__main__":
    run("status")
