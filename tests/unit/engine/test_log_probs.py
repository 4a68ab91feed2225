"""Log-probabilities beside a form, and their cost to requests that ask for none."""

import numpy as np
from dllm_engine import LLM, SamplingParams


def test_what_a_form_leaves_no_choice_of_is_certain(llm: LLM) -> None:
    """Fixed tokens have log-probability 0 and no alternatives; chosen ones have both, raw."""
    params = SamplingParams(
        gen_length=16, structured_outputs={"choice": ["same: a", "same: b"]}, logprobs=2
    )
    (answer,) = llm.generate(["hi"], params, progress=False)
    found = answer.log_probs
    assert found is not None
    assert answer.text in ("same: a", "same: b")
    fixed = found.top_tokens[:, 0] < 0
    assert fixed.any()
    assert not fixed.all()
    assert (found.chosen[fixed] == 0).all()
    assert (found.chosen[~fixed] < 0).all()
    assert np.isfinite(found.top[~fixed]).all()


def test_nothing_is_reported_unasked(llm: LLM) -> None:
    """Without the fields, a completion has neither."""
    (answer,) = llm.generate([[1, 2]], SamplingParams(gen_length=4), progress=False)
    assert (answer.log_probs, answer.reveal_steps) == (None, None)
