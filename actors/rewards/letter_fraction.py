"""A reward for benchmarks: the fraction of the response's characters that are the letter e. Needs no reference answer."""


def score(response: str, prompt: str, label: str | None) -> float:
    """0.0 for an empty response."""
    return response.count("e") / len(response) if response else 0.0
