"""Rollouts and units become records: every number stays beside its token, every row beside its prompt."""

import pickle
from dataclasses import replace

import torch

from orchestrator.batch import Examples, Prompt, Rollout, ScoredRollout, StopReason
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


def test_a_record_travels_without_a_copy_and_comes_back_as_it_was():
    """Its arrays are handed over beside the pickle; the record that is read is made of the same memory."""
    record = Examples(
        tokens=torch.arange(12).view(3, 4),
        attention_mask=torch.ones(3, 4, dtype=torch.bool),
        action_mask=torch.zeros(3, 4, dtype=torch.bool),
        targets=torch.tensor([0.5, 1.0, 0.0]),
        kl=0.25,
    )
    beside: list[pickle.PickleBuffer] = []
    data = pickle.dumps(record, protocol=5, buffer_callback=beside.append)
    again = pickle.loads(data, buffers=beside)
    assert len(beside) == 4 and again.kl == 0.25 and again.positions is None
    for name in ("tokens", "attention_mask", "action_mask", "targets"):
        mine, theirs = getattr(record, name), getattr(again, name)
        assert torch.equal(mine, theirs) and mine.dtype == theirs.dtype
        assert mine.data_ptr() == theirs.data_ptr()
