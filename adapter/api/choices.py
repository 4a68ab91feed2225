"""Several choices for one prompt, each with a seed of its own."""

import hashlib

from adapter.api.schemas import GenerateRequest


def choices_of(request: GenerateRequest, count: int) -> list[GenerateRequest]:
    """The requests for `count` choices.

    With a seed, choice i has one that follows from it and i, so that it does not depend on the
    number of choices; the first choice has the request's own. Without, the engine draws each.
    """
    if request.seed is None or count == 1:
        return [request] * count
    seeds = [choice_seed(request.seed, index) for index in range(count)]
    return [request.model_copy(update={"seed": seed}) for seed in seeds]


def choice_seed(seed: int, index: int) -> int:
    """The seed of a choice: 53 bits, which every JSON reader keeps."""
    if index == 0:
        return seed
    digest = hashlib.sha256(f"{seed}/{index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 11
