"""OpenAI's Python client against an endpoint whose model counts. Run by `tests.lab.serve_clients`."""

import json
import sys

import openai

client = openai.OpenAI(base_url=f"{sys.argv[1]}/v1", api_key="none", max_retries=0)
checks = 0


def check(condition: object, what: str) -> None:
    global checks
    checks += 1
    if not condition:
        sys.exit(f"failed: {what}")


usual = {"model": "counting", "max_tokens": 3, "temperature": 0}
said = [{"role": "developer", "content": "x"}, {"role": "user", "content": [{"type": "text", "text": "ab"}]}]
check(client.models.retrieve("counting").id == "counting", "models.retrieve")
answer = client.completions.create(prompt="ab", logprobs=5, n=2, **usual)
check([choice.text for choice in answer.choices] == ["cde", "cde"], "n")
check(max(answer.choices[0].logprobs.top_logprobs[0].values()) <= 0, "top_logprobs")
check(len(answer.choices[0].logprobs.top_logprobs[0]) == 5, "five of them")
answer = client.completions.create(prompt=["ab", "mn"], **usual)
check([choice.text for choice in answer.choices] == ["cde", "opq"], "a list of prompts")
chunks = client.completions.create(prompt="ab", stream=True, stream_options={"include_usage": True}, **usual)
chunks = list(chunks)
check("".join(chunk.choices[0].text for chunk in chunks[:-1]) == "cde", "a stream")
check(chunks[-1].usage.completion_tokens == 3, "its usage")
chat = client.chat.completions.create(messages=said, logprobs=True, top_logprobs=20, **usual)
check(chat.choices[0].message.content == "cde", "a chat")
check(len(chat.choices[0].logprobs.content[0].top_logprobs) == 20, "its top_logprobs")
with client.chat.completions.stream(messages=said, stop="e", **usual) as stream:
    final = stream.get_final_completion()
check(final.choices[0].message.content == "cd", "a chat's stream, gathered by the client")
for kind, wrong in (
    (openai.BadRequestError, {"prompt": "a" * 2000}),
    (openai.BadRequestError, {"prompt": "a", "temperature": 9}),
    (openai.NotFoundError, {"prompt": "a", "model": "gpt-9"}),
):
    try:
        client.completions.create(**usual | wrong)
        check(False, f"{kind.__name__} of {wrong}"[:80])
    except kind as error:
        long = len(wrong["prompt"]) > 9
        check(not long or (error.code == "context_length_exceeded" and error.param == "prompt"), "its code")
print(json.dumps({"version": openai.__version__, "checks": checks}))
