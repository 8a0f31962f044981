"""python -m stepgguf, and the console script: Ctrl+C ends it quietly also while it starts."""

import sys


def run() -> None:
    try:
        from stepgguf.cli.main import run as command

        command()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    run()
