"""The embedded model: a genuine small Step-3.5 checkpoint, trained by train.py on what tasks.py makes up."""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "model"
