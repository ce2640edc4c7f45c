"""LiteLLM against an endpoint whose model counts. Run by `tests.lab.serve_clients`."""

import json
import sys
from importlib.metadata import version

import litellm

checks = 0


def check(condition: object, what: str) -> None:
    global checks
    checks += 1
    if not condition:
        sys.exit(f"failed: {what}")


usual = {"api_base": f"{sys.argv[1]}/v1", "api_key": "none", "max_tokens": 3, "temperature": 0}
said = [{"role": "system", "content": "x"}, {"role": "user", "content": "ab"}]
chat = litellm.completion(model="openai/counting", messages=said, **usual)
check(chat.choices[0].message.content == "cde" and chat.usage.completion_tokens == 3, "a chat")
options = {"stream": True, "stream_options": {"include_usage": True}}
chunks = list(litellm.completion(model="openai/counting", messages=said, **options, **usual))
check("".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "cde", "a stream")
text = litellm.text_completion(model="text-completion-openai/counting", prompt="ab", **usual)
check(text.choices[0].text == "cde", "a completion")
long = [{"role": "user", "content": "a" * 2000}]
try:
    litellm.completion(model="openai/counting", messages=long, **usual)
    check(False, "an error of a long chat")
except litellm.ContextWindowExceededError:
    check(True, "which LiteLLM knows as that of the context")
try:
    litellm.completion(model="openai/other", messages=said, **usual)
    check(False, "an error of an unknown model")
except litellm.NotFoundError:
    check(True, "which LiteLLM knows")
print(json.dumps({"version": version("litellm"), "checks": checks}))
