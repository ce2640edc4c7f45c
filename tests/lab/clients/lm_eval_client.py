"""lm-eval's clients of endpoints, several prompts in a request, before a model that counts.

Run by `tests.lab.serve_clients`, which gives the endpoint's URL and the folder of its tokenizer.
"""

import json
import sys
from importlib.metadata import version
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.models.api_models import JsonChatStr
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

checks = 0


def check(found: object, expected: object) -> None:
    global checks
    checks += 1
    if found != expected:
        sys.exit(f"failed: {found!r} is not {expected!r}")


def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, each, index) for index, each in enumerate(arguments)]


def after(letter: str, number: int) -> str:
    return "".join(chr(ord(letter) + step) for step in range(1, number + 1))


url, tokenizer = sys.argv[1:]
letters = "abcdefghijklm"
options = {"until": ["\n"], "max_gen_toks": 3}
for size in (2, 5):
    usual = {"model": "counting", "max_length": 512, "batch_size": size, "num_concurrent": 2}
    client = LocalCompletionsAPI(f"{url}/v1/completions", "huggingface", tokenizer=tokenizer, **usual)
    likely = [(letter, after(letter, 2)) for letter in letters]
    for pairs, greedy in ((likely, True), ([(letter, "zz") for letter in letters], False)):
        scores = client.loglikelihood(requests("loglikelihood", pairs))
        check([(score > -1, found) for score, found in scores], [(greedy, greedy)] * len(pairs))
    texts = client.generate_until(requests("generate_until", [(each, options) for each in letters]))
    check(texts, [after(letter, 3) for letter in letters])
    chat = LocalChatCompletion(f"{url}/v1/chat/completions", **usual)  # it sends one chat in a request itself
    said = [JsonChatStr(json.dumps([{"role": "user", "content": letter}])) for letter in letters]
    texts = chat.generate_until(requests("generate_until", [(each, options) for each in said]))
    check(texts, [after(letter, 3) for letter in letters])
print(json.dumps({"version": version("lm_eval"), "checks": checks}))
