"""Stands for an agent program: finds its server in the settings that it was given, as the real one does, asks it once
in its dialect and prints what it saw as JSON. Run under the name of the agent.

Its last argument says what it does then: exit-N; wait, until a signal, whose number it prints before it exits with 5.
"""

import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

QUESTION = "How many 'r's are in the word strawberry?"
MESSAGES = [{"role": "user", "content": QUESTION}]


def say(found):
    sys.stdout.write(json.dumps(found) + "\n")
    sys.stdout.flush()


def post(url, key, body):
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    request.add_header("authorization", f"Bearer {key}")
    with urllib.request.urlopen(request) as response:
        return json.load(response)


def chat(url, key, model):
    body = {"model": model, "messages": MESSAGES, "temperature": 0}
    return post(f"{url}/chat/completions", key, body)["choices"][0]["message"]["content"]


def claude(env, args):
    body = {"model": env["ANTHROPIC_MODEL"], "max_tokens": 1000, "messages": MESSAGES, "temperature": 0}
    content = post(env["ANTHROPIC_BASE_URL"] + "/v1/messages", env["ANTHROPIC_AUTH_TOKEN"], body)["content"]
    return content[0]["text"], int(env["CLAUDE_CODE_MAX_CONTEXT_TOKENS"]), env["CLAUDE_CONFIG_DIR"]


def codex(env, args):
    config = {}
    while args[:1] == ["-c"]:
        name, _, value = args[1].partition("=")
        config[name] = json.loads(value)
        del args[:2]
    provider = "model_providers." + config["model_provider"]
    assert config[provider + ".wire_api"] == "responses"
    body = {"model": config["model"], "input": MESSAGES, "temperature": 0}
    found = post(config[provider + ".base_url"] + "/responses", env[config[provider + ".env_key"]], body)
    texts = [part["text"] for item in found["output"] if item["type"] == "message" for part in item["content"]]
    return texts[0], config["model_context_window"], env["CODEX_HOME"]


def opencode(env, args):
    config = json.loads(env["OPENCODE_CONFIG_CONTENT"])
    name, _, model = config["model"].partition("/")
    assert config["enabled_providers"] == [name]
    options = config["provider"][name]["options"]
    key = env[options["apiKey"].removeprefix("{env:").removesuffix("}")]
    answer = chat(options["baseURL"], key, model)
    return answer, config["provider"][name]["models"][model]["limit"]["context"], None


def qwen(env, args):
    settings = json.loads(Path(env["QWEN_CODE_SYSTEM_SETTINGS_PATH"]).read_text())
    assert settings["security"]["auth"]["selectedType"] == "openai"
    answer = chat(env["OPENAI_BASE_URL"], env["OPENAI_API_KEY"], env["OPENAI_MODEL"])
    return answer, settings["model"]["generationConfig"]["contextWindowSize"], env["QWEN_HOME"]


def pi(env, args):
    folder = Path(env["PI_CODING_AGENT_DIR"])
    assert [args[0], args[2]] == ["--provider", "--model"]
    provider = json.loads((folder / "models.json").read_text())["providers"][args[1]]
    (model,) = [model for model in provider["models"] if model["id"] == args[3]]
    del args[:4]
    command = provider["apiKey"].removeprefix("!")
    key = subprocess.run(command, shell=True, capture_output=True, text=True, check=True).stdout.strip()
    return chat(provider["baseUrl"], key, model["id"]), model["contextWindow"], str(folder)


def wait():
    def end(number, _):
        say({"signal": number})
        os._exit(5)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        assert signal.getsignal(number) != signal.SIG_IGN, "it inherits that a signal is ignored"
        signal.signal(number, end)
    say("waiting")
    while True:
        signal.pause()


def main(name, args):
    ask = {"claude": claude, "codex": codex, "opencode": opencode, "qwen": qwen, "pi": pi}[name]
    answer, n_ctx, folder = ask(os.environ, args)
    saw = {"answer": answer, "n_ctx": n_ctx, "folder": folder, "args": args, "cwd": os.getcwd(), "env": {**os.environ}}
    say(saw)
    if args[-1:] == ["wait"]:
        wait()
    sys.exit(int(args[-1].removeprefix("exit-")) if args[-1:] and args[-1].startswith("exit-") else 0)


main(sys.argv[1], sys.argv[2:])
