"""python -m stepgguf"""

from stepgguf.cli.main import run

run()
