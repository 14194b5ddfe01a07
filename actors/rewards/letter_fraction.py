"""The share of letters in a response: a reward without model or label, for benchmarks on any prompts.

It rises within a few steps on any policy, and says nothing about quality.
"""


def score(response: str, prompt: str, label: str | None) -> float:
    """ "ab1!" -> 0.5. An empty response gets 0.0."""
    return sum(character.isalpha() for character in response) / max(1, len(response))
