"""litellm: a context that is too small raises its ContextWindowExceededError, in every dialect, by which those who use
it choose another model or a shorter conversation."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

from tests.clients.agents.stage import KEY, MODEL, stage, thought

CLIENT = Path(__file__).with_name("litellm_client.py")
SETTINGS = {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}


def main() -> int:
    with tempfile.TemporaryDirectory() as folder, stage(lambda prompt: thought("Rain."), n_ctx=4096) as scene:
        venv.create(folder, with_pip=True)
        python = Path(folder, "bin", "python")
        subprocess.run([python, "-m", "pip", "install", "--quiet", "litellm"], check=True, capture_output=True)
        output = scene.run([python, "-I", CLIENT, scene.url, KEY, MODEL], SETTINGS)
        calls = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
        for call in calls:
            scene.check(f"{call['name']}: {call['raised']}", call["raised"] == "ContextWindowExceededError")
        scene.check(f"{len(calls)} calls were made", len(calls) == 7)
        return 0 if scene.passed else 1


if __name__ == "__main__":
    sys.exit(main())
