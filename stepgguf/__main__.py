"""python -m stepgguf, and the console script: Ctrl+C ends it quietly also while it starts.

numpy's matrix products get one thread, because work is shared out among threads above them: units, experts, rows. So
--threads is what it says, and bytes do not depend on how a product was cut up. torch has threads of its own.
"""

import os
import sys


def run() -> None:
    for variable in ("OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"):  # numpy reads one when it is loaded
        os.environ.setdefault(variable, "1")
    try:
        from stepgguf.cli.main import run as command

        command()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    run()
