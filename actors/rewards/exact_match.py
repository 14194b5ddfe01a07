"""1 for the reference answer and 0 for anything else: the judge of tasks with one right answer."""


def score(response: str, prompt: str, label: str | None) -> float:
    """1.0 when response and label are equal but for white space around them, else 0.0.

    Raises ValueError without a label: a reward that is 0 everywhere would train nothing and say nothing.
    """
    if label is None:
        raise ValueError(
            f"exact_match has no label for the prompt {prompt[:60]!r}; set label_key to the answer's column"
        )
    return float(response.strip() == label.strip())
