"""Rollouts and units become records: every number stays beside its token, every row beside its prompt."""

from dataclasses import replace

import torch

from orchestrator.batch import Prompt, Rollout, ScoredRollout, StopReason
from orchestrator.collate import collate, collate_examples, collate_scores
from orchestrator.examples import Unit
from tests.fakes import prompt, rollout

EOS = 9


def test_rollouts_are_stacked_column_by_column():
    """One of two turns and a shorter one that was cut: prompt 1 2, said 5 9, told 3, said 6; 4, said 7."""
    first = Rollout(
        uid="0/0/0", prompt=prompt(0), tokens=(1, 2, 5, EOS, 3, 6), text="",
        action_mask=(False, False, True, True, False, True), logprobs=(0.0, 0.0, -0.5, -0.25, 0.0, -2.0),
        versions=(0, 0, 3, 3, 0, 4), stop=StopReason.EOS,
    )  # fmt: skip
    second = Rollout(
        uid="0/1/0", prompt=Prompt(uid="0/1", row=1, tokens=(4,), text="", label=None), tokens=(4, 7),
        text="", action_mask=(False, True), logprobs=(0.0, -1.0), versions=(0, 4), stop=StopReason.LENGTH,
    )  # fmt: skip
    scored = [
        ScoredRollout(rollout=r, reward=reward, scores={"reference": torch.tensor(r.logprobs) * 2})
        for r, reward in ((first, 1.5), (second, -2.0))
    ]
    batch = collate(scored, pad_id=0)
    assert batch.tokens.tolist() == [[1, 2, 5, 9, 3, 6], [4, 7, 0, 0, 0, 0]]
    assert batch.attention_mask.int().tolist() == [[1] * 6, [1, 1, 0, 0, 0, 0]]
    assert batch.action_mask.int().tolist() == [[0, 0, 1, 1, 0, 1], [0, 1, 0, 0, 0, 0]]
    assert batch.rollout_logprobs.tolist() == [[0, 0, -0.5, -0.25, 0, -2], [0, -1, 0, 0, 0, 0]]
    assert batch.versions.tolist() == [[0, 0, 3, 3, 0, 4], [0, 4, 0, 0, 0, 0]]
    assert batch.rewards.tolist() == [1.5, -2.0] and batch.stopped.tolist() == [True, False]
    assert collate_scores(scored)["reference"].tolist() == [[0, 0, -1, -0.5, 0, -4], [0, -2, 0, 0, 0, 0]]


def test_groups_are_the_prompts_whatever_the_order_of_the_rows():
    """BUGS B5: by uid. Row 0 in two epochs is two prompts."""
    asked = [prompt(0), prompt(1), prompt(0, uid="1/0")]
    order = [(0, 1), (1, 0), (0, 0), (2, 0), (1, 1), (2, 1)]
    scored = [ScoredRollout(rollout=rollout(asked[p], k), reward=0.0) for p, k in order]
    assert collate(scored, pad_id=0).groups.tolist() == [0, 1, 0, 2, 1, 2]


def test_an_end_of_sequence_that_is_also_the_padding_is_attended_to_and_trained():
    """BUGS A7: the tokenizer's pad_id is its eos_id, and a prompt holds one too."""
    ended = rollout(replace(prompt(), tokens=(EOS, 2)), response=(5, EOS))
    longer = rollout(prompt(1), response=(5, 6, 7))
    batch = collate([ScoredRollout(rollout=r, reward=0.0) for r in (ended, longer)], pad_id=EOS)
    rows = ((EOS, 2, 5, EOS), (False, False, True, True)), ((1, 2, 5, 6, 7), (False,) * 2 + (True,) * 3)
    examples = collate_examples([Unit(rows=(row,)) for row in rows], pad_id=EOS)
    for records in (batch, examples):
        assert records.tokens[0].tolist() == [EOS, 2, 5, EOS, EOS]
        assert records.attention_mask[0].tolist() == [True] * 4 + [False]
        assert records.action_mask[0].tolist() == [False, False, True, True, False]
