"""python -m lorakit."""

from lorakit.cli import run

if __name__ == "__main__":
    run()
