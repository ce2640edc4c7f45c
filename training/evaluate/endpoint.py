"""Whether an endpoint can evaluate log-likelihoods. No torch."""

from cluster.endpoint_client import Endpoint, exchange, reason

PROMPT = "The name of the"


def echo_problem(endpoint: Endpoint) -> str | None:
    """Why the endpoint does not return the log-probabilities of a prompt, in its own words; None: it does.

    Sends what lm_eval sends for a log-likelihood, with a prompt of a few tokens.

    Raises:
        UserError: it does not answer.
    """
    body = {
        "model": endpoint.model,
        "prompt": PROMPT,
        "max_tokens": 1,
        "temperature": 0,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    }
    status, answer = exchange(f"{endpoint.url}/completions", body)
    if status != 200:
        return reason(status, answer)
    try:
        logprobs = answer["choices"][0]["logprobs"]
        # The prompt's tokens and one more; for each but the first, the likeliest token too.
        complete = len(logprobs["token_logprobs"]) > 2 and all(logprobs["top_logprobs"][1:])
    except (KeyError, IndexError, TypeError):
        complete = False
    return None if complete else "it answers echo=true without the prompt's logprobs and top_logprobs"
