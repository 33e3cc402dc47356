"""`mixlora-exp gpu-check` for a checkout."""

from checkout import run

if __name__ == "__main__":
    run("gpu-check")
