"""Each role built and stepped in this process, as Ray workers are: plain classes, one rank."""

import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from actors import heads, vocabulary
from actors.actor import Actor
from actors.critic import Critic
from actors.learner import Learner
from actors.model import ScoreModel
from actors.reference import Reference
from actors.reward import Judge, RewardLearner
from actors.training_state import NonFiniteStateError
from actors.worker import Worker
from orchestrator.algorithms import ppo
from orchestrator.batch import Batch, Examples, Experience, Loss, Minibatch, PolicyOutput
from orchestrator.config import Model, Optimizer
from orchestrator.roles import WeightReceipt
from tests import tiny
from tests.fakes import prompt, rollout

LENGTHS = [6, 3, 5]
OPTIMIZER = Optimizer(learning_rate=1e-2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(path=tiny.save(tmp_path_factory.mktemp("policy"), tiny.llama()), dtype="float32")


def ready(worker: Worker) -> Worker:
    worker.setup(0, 1, *worker.rendezvous(), threads=1, seed=5, timeout_s=60)
    return worker


def columns() -> dict[str, Tensor]:
    """Three ragged rows; the first two tokens of each are a prompt."""
    torch.manual_seed(1)
    positions = torch.arange(max(LENGTHS))
    attended = positions < torch.tensor(LENGTHS)[:, None]
    tokens = torch.randint(1, tiny.VOCAB, attended.shape) * attended
    return {"tokens": tokens, "attention_mask": attended, "action_mask": attended & (positions >= 2)}


def batch() -> Batch:
    given = columns()
    return Batch(
        **given,
        rollout_logprobs=torch.zeros(given["tokens"].shape),
        rewards=torch.zeros(3),
        groups=torch.arange(3),
        versions=torch.zeros(given["tokens"].shape, dtype=torch.int64),
        stopped=torch.ones(3, dtype=torch.bool),
        baselines=None,
    )


def experience(advantages: Tensor, old_logprobs: Tensor | None = None) -> Experience:
    return Experience(
        **columns(),
        rollout_logprobs=torch.zeros(advantages.shape),
        old_logprobs=old_logprobs,
        advantages=advantages,
        old_values=None,
        returns=advantages,
        ref_logprobs=None,
    )


def minibatch(records: Experience | Examples, weights: Tensor | None = None) -> Minibatch:
    mask = records.action_mask
    return Minibatch(
        records=records,
        rows=torch.arange(len(mask)),
        weights=mask / mask.sum() if weights is None else weights,
    )


def policy_gradient(policy: PolicyOutput, part: Experience) -> Loss:
    old = policy.logprobs.detach() if part.old_logprobs is None else part.old_logprobs
    ratio = (policy.logprobs - old).exp()
    return Loss(values=-ratio * part.advantages, metrics={"ratio": ratio.detach()})


def squared_error(values: Tensor, part: Experience) -> Loss:
    return Loss(values=(values - part.returns).square(), metrics={"value": values.detach()})


def bradley_terry(scores: Tensor, part: Examples) -> Loss:
    """[b] per pair, half on each side: row 2i is chosen, row 2i+1 rejected."""
    margin = scores[0::2] - scores[1::2]
    values = -torch.nn.functional.logsigmoid(margin).repeat_interleave(2)
    return Loss(values=values, metrics={"accuracy": (margin > 0).float().repeat_interleave(2)})


def make_actor(model: Model, **settings: object) -> Actor:
    return ready(Actor(model=model, optimizer=OPTIMIZER, total_steps=10, loss=policy_gradient, **settings))


def weights_of(learner: Learner) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in learner.backend.named_full_parameters()}


def test_scores_are_rows_in_the_order_of_the_micro_batches(model: Model) -> None:
    actor = make_actor(model)
    whole = actor.score(batch(), [[0, 1, 2]])
    parts = actor.score(batch(), [[2], [], [0, 1]])
    assert parts.shape == (3, 6)
    torch.testing.assert_close(parts, whole[[2, 0, 1]], atol=1e-5, rtol=0)
    assert torch.equal(whole != 0, columns()["action_mask"])


def test_actor_and_reference_score_at_the_sampling_temperature(model: Model) -> None:
    """BUGS A11: logits / T, not logprobs / T."""
    given = columns()
    logits = AutoModelForCausalLM.from_pretrained(model.path)(input_ids=given["tokens"][:1]).logits[0] / 0.7
    expected = logits.log_softmax(-1)[1:5].gather(-1, given["tokens"][0, 2:, None]).squeeze(-1)
    for worker in (make_actor(model, temperature=0.7), ready(Reference(model=model, temperature=0.7))):
        torch.testing.assert_close(worker.score(batch(), [[1], [0]])[1, 2:], expected, atol=1e-5, rtol=0)


def test_reference_agrees_with_the_actor_it_came_from(model: Model) -> None:
    reference = ready(Reference(model=model))
    plan = [[1, 2], [], [0]]
    torch.testing.assert_close(
        reference.score(batch(), plan), make_actor(model).score(batch(), plan), atol=1e-5, rtol=0
    )
    assert reference.score(batch(), [[]]).shape == (0, 6)


def test_the_first_update_after_scoring_has_ratio_one(model: Model) -> None:
    actor = make_actor(model, temperature=0.7)
    old = actor.score(batch(), [[0, 1, 2]])
    figures = actor.update(minibatch(experience(torch.ones(3, 6), old)), [[0], [1, 2]])
    assert figures["ratio"] == pytest.approx(1.0, abs=1e-6)
    assert figures["loss"] == pytest.approx(-1.0, abs=1e-6)
    assert figures["num_tokens"] == 8


def test_an_update_moves_every_parameter(model: Model) -> None:
    """BUGS D8. Token 0 never occurs in the rows, but the softmax pushes it down too."""
    actor = make_actor(model)
    before = weights_of(actor)
    actor.update(minibatch(experience(torch.ones(3, 6))), [[0, 1, 2]])
    for name, tensor in weights_of(actor).items():
        assert (tensor != before[name]).any(), name


def test_nan_off_the_mask_changes_nothing(model: Model) -> None:
    """BUGS C5, for the policy and the value loss."""
    mask = columns()["action_mask"]
    for make in (
        lambda: make_actor(model),
        lambda: ready(Critic(model=model, optimizer=OPTIMIZER, total_steps=10, loss=squared_error)),
    ):
        answers = []
        for hole in (0.0, math.nan):
            learner = make()
            figures = learner.update(minibatch(experience(torch.where(mask, 1.5, hole))), [[0, 2], [1]])
            answers.append((figures, weights_of(learner)))
        assert answers[0][0] == answers[1][0]
        assert all(torch.equal(tensor, answers[1][1][name]) for name, tensor in answers[0][1].items())


def test_micro_batches_are_positions_in_the_rows_of_the_minibatch(model: Model) -> None:
    """Rows 2 and 0, of 3 and 4 actions, one after the other: what is trained is theirs."""
    records = experience(torch.tensor([[4.0], [90.0], [2.0]]).expand(3, 6))
    rows = torch.tensor([2, 0])
    weights = records.action_mask[rows] / 7
    part = Minibatch(records=records, rows=rows, weights=weights)
    figures = make_actor(model).update(part, [[0], [1]])
    assert figures["num_tokens"] == 7
    assert figures["loss"] == pytest.approx(-(3 * 2 + 4 * 4) / 7, abs=1e-5)


def test_metrics_are_means_when_weights_do_not_sum_to_one(model: Model) -> None:
    """Under constant_length the loss keeps its divisor; a ratio of 1 is still reported as 1."""
    actor = make_actor(model)
    records = experience(torch.ones(3, 6))
    figures = actor.update(minibatch(records, records.action_mask / 100), [[0], [1, 2]])
    assert figures["loss"] == pytest.approx(-8 / 100)
    assert figures["ratio"] == pytest.approx(1.0)


def test_entropy_is_there_only_when_the_loss_asks(model: Model) -> None:
    given, weights = experience(torch.ones(3, 6)), torch.ones(3, 6)
    assert make_actor(model).output(given, weights).entropy is None
    entropy = make_actor(model, entropy=True).output(given, weights).entropy
    assert torch.equal(entropy > 0, given.action_mask)


def test_a_token_wise_loss_computes_its_logits_once(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same step as where every block of logits is computed twice, to rounding."""
    monkeypatch.setattr(heads, "LOGITS_KEPT", 0)
    monkeypatch.setattr(heads, "LOGITS_PER_BLOCK", 2 * tiny.VOCAB)
    algorithm = ppo.CONFIG(kl_coef=0.1, kl_in="loss", kl_estimator="k3", entropy_coef=0.01)
    advantages = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    records = replace(experience(advantages, torch.full((3, 6), -5.0)), ref_logprobs=torch.full((3, 6), -4.0))
    records = replace(records, kl_coef=0.1)
    projections, steps = [], []
    plain = vocabulary._logits
    monkeypatch.setattr(
        vocabulary, "_logits", lambda *given: projections.append(len(given[0])) or plain(*given)
    )
    for token_wise in (False, True):
        actor = ready(
            Actor(
                model=model, optimizer=OPTIMIZER, total_steps=10, loss=algorithm.policy_loss, entropy=True,
                token_wise=token_wise,
            )
        )  # fmt: skip
        projections.clear()
        figures = actor.update(minibatch(records), [[0], [], [1, 2]])
        steps.append((figures, weights_of(actor), sum(projections)))
    (twice, before, many), (once, after, few) = steps
    assert many == 2 * few and twice.keys() == once.keys()
    assert once == pytest.approx(twice, rel=1e-5)
    for name, weight in after.items():
        torch.testing.assert_close(weight, before[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("token_wise", [False, True])
def test_a_loss_that_is_not_finite_steps_nothing(
    model: Model, token_wise: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heads, "LOGITS_KEPT", 0)
    actor = make_actor(model, token_wise=token_wise)
    before = weights_of(actor)
    advantages = torch.ones(3, 6)
    advantages[1] = torch.inf
    figures = actor.update(minibatch(experience(advantages)), [[0], [1], [2]])
    assert figures["skipped_steps"] == 1 and not math.isfinite(figures["loss"])
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights_of(actor).items())


def test_a_loss_of_another_shape_than_its_weights_is_refused(model: Model) -> None:
    actor = make_actor(model)
    with pytest.raises(ValueError, match=r"loss has shape \(3, 6\) but its weights \(3,\)"):
        actor.update(minibatch(experience(torch.ones(3, 6)), torch.full((3,), 1 / 3)), [[0, 1, 2]])
    with pytest.raises(ValueError, match="got no micro-batch"):
        actor.update(minibatch(experience(torch.ones(3, 6))), [])


def test_probe_is_every_token_but_the_first_at_temperature_one(model: Model) -> None:
    actor = make_actor(model, temperature=0.5)
    logits = AutoModelForCausalLM.from_pretrained(model.path)(input_ids=torch.tensor([[3, 9, 4]])).logits[0]
    by_hand = [logits[0].log_softmax(-1)[9].item(), logits[1].log_softmax(-1)[4].item()]
    assert actor.logprobs([3, 9, 4]) == pytest.approx(by_hand, abs=1e-5)


class Ledger:
    """A sender that writes down what it was given."""

    refused = False

    def refuse(self) -> None:
        self.refused = True

    def send(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> WeightReceipt:
        sums = {name: int(tensor.numel()) for name, tensor in named_tensors}
        return WeightReceipt(version=version, checksums=sums, who="ledger", num_bytes=4 * sum(sums.values()))


def test_weights_are_sent_under_their_hugging_face_names(model: Model) -> None:
    actor = make_actor(model)
    with pytest.raises(RuntimeError, match="before open_channel"):
        actor.send_weights(1)
    actor.sender = Ledger()
    receipt = actor.send_weights(2)
    theirs = AutoModelForCausalLM.from_pretrained(model.path)
    assert receipt.checksums == {name: p.numel() for name, p in theirs.named_parameters()}  # tied ones once
    assert actor.backend.parameter_shapes() == [
        (name, tuple(p.shape)) for name, p in theirs.named_parameters()
    ]


def test_a_weight_that_is_not_finite_is_not_sent(model: Model) -> None:
    actor = make_actor(model)
    actor.sender = Ledger()
    with torch.no_grad():
        list(actor.backend.engine.module.parameters())[-1].view(-1)[0] = math.inf
    with pytest.raises(NonFiniteStateError, match="nothing is sent to the engines"):
        actor.send_weights(1)
    assert actor.sender.refused  # and the engines, which wait already, wait no longer


def test_a_critic_learns_the_returns(model: Model) -> None:
    critic = ready(Critic(model=model, optimizer=OPTIMIZER, total_steps=60, loss=squared_error))
    assert critic.score(batch(), [[0, 1, 2]]).abs().max() == 0.0
    records = experience(torch.arange(6.0).expand(3, 6) / 5)
    first, *_, last = [critic.update(minibatch(records), [[0, 1], [2]])["loss"] for _ in range(60)]
    by_hand = (4 + 9 + 16 + 25 + 4 + 4 + 9 + 16) / 25 / 8  # (t / 5)^2 of the 8 tokens t = 2,3,4,5 / 2 / 2,3,4
    assert first == pytest.approx(by_hand, abs=1e-5)
    assert last < first / 20


def test_a_reward_learner_learns_to_prefer_and_its_export_serves(model: Model, tmp_path: Path) -> None:
    learner = ready(RewardLearner(model=model, optimizer=OPTIMIZER, total_steps=20, loss=bradley_terry))
    chosen, rejected = [3, 9, 4, 7], [3, 9, 5]
    examples = Examples(
        tokens=torch.tensor([chosen, [*rejected, 0]]),
        attention_mask=torch.tensor([[True] * 4, [True] * 3 + [False]]),
        action_mask=torch.tensor([[False, False, True, True], [False, False, True, False]]),
    )
    for _ in range(20):  # a micro-batch without rows still holds a pair
        figures = learner.update(minibatch(examples, torch.full((2,), 0.5)), [[0, 1], []])
    assert figures["accuracy"] == 1.0 and figures["loss"] < 0.1 and figures["num_tokens"] == 3
    learner.export(tmp_path)
    scores = learner.score(examples, [[1, 0]]).tolist()
    judge = ready(
        Judge(functions={}, model=model.model_copy(update={"path": str(tmp_path)}), micro_batch_tokens=8)
    )
    assert judge.score([rejected, chosen]) == pytest.approx(scores, abs=1e-5)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert theirs(input_ids=torch.tensor([chosen])).logits.item() == pytest.approx(scores[1], abs=1e-5)


def test_rewards_do_not_depend_on_the_company_a_sequence_keeps(model: Model) -> None:
    sequences = [[3, 9, 4, 7, 8, 2], [5], [6, 6, 6], [1, 2]]
    judge = ready(Judge(functions={}, model=model, micro_batch_tokens=12))
    together = judge.score(sequences)
    assert together == pytest.approx([judge.score([tokens])[0] for tokens in sequences], abs=1e-5)
    assert len(set(together)) == 4
    assert judge._micro_batches([6, 1, 3, 2, 0]) == [[1, 2, 3], [0]]


def test_model_and_functions_judge_one_rollout_together(model: Model) -> None:
    functions = {"right": "exact_match", "letters": "letter_fraction"}
    judge = ready(Judge(model=model, functions=functions, micro_batch_tokens=64))
    said = [replace(rollout(prompt(), 0), text="b"), replace(rollout(prompt(), 1, response=(7,)), text="b2")]
    rewards = judge.score_groups([said])
    assert rewards["right"] == [1.0, 0.0] and rewards["letters"] == [1.0, 0.5]
    theirs = AutoModelForSequenceClassification.from_pretrained(model.path, num_labels=1, pad_token_id=0)
    theirs.score.weight.data.copy_(judge.scorer.model.score.weight)
    by_hand = [theirs(input_ids=torch.tensor([r.tokens])).logits.item() for r in said]
    assert rewards["model"] == pytest.approx(by_hand, abs=1e-5)
    empty = replace(said[0], tokens=())
    assert math.isnan(judge.score_groups([[empty]])["model"][0])  # refused where rewards are weighed


def test_groups_that_are_judged_in_one_call_share_no_micro_batch(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which of them are finished at once is chance, and the last bits of a score depend on its company."""
    judge = ready(Judge(model=model, functions={}, micro_batch_tokens=64))
    groups = [[rollout(prompt(n), k, response=(9,) * (n + k + 1)) for k in range(2)] for n in range(2)]
    company: list[tuple[int, ...]] = []
    scorer = judge.scorer

    def forward(tokens: Tensor, mask: Tensor) -> Tensor:
        company.append(tuple(mask.sum(1).tolist()))
        return scorer(tokens, mask)

    monkeypatch.setattr(judge, "scorer", forward)
    together = judge.score_groups(groups)["model"]
    assert company == [(3, 4), (4, 5)]
    assert together == [score for group in groups for score in judge.score_groups([group])["model"]]


def test_functions_judge_without_a_model() -> None:
    judge = ready(Judge(model=None, functions={"right": "exact_match"}, micro_batch_tokens=64))
    assert judge.score_groups([[rollout(prompt())]]) == {"right": [1.0]}


def test_actor_and_reference_give_the_whole_distribution(model: Model) -> None:
    """Of plain Transformers' logits / T at every action; zeros elsewhere."""
    given = columns()
    logits = AutoModelForCausalLM.from_pretrained(model.path)(input_ids=given["tokens"][:1]).logits[0] / 0.7
    expected = logits.log_softmax(-1)[1:5]
    actor = make_actor(model, temperature=0.7, distribution=True)
    for worker in (actor, ready(Reference(model=model, temperature=0.7))):
        found = worker.distributions(batch(), [[1], [], [0]])
        assert found.shape == (2, 6, tiny.VOCAB)
        torch.testing.assert_close(found[1, 2:], expected, atol=1e-5, rtol=0)
        assert not found[1, :2].any() and not found[0, 3:].any()

    def toward_token_3(policy: PolicyOutput, part: Experience) -> Loss:
        return Loss(values=-policy.distribution[..., 3], metrics={})

    actor.loss = toward_token_3
    losses = [actor.update(minibatch(experience(torch.ones(3, 6))), [[0, 1], [2]])["loss"] for _ in range(5)]
    assert losses[-1] < losses[0] / 2  # its gradient reaches the weights


def test_heads_are_equal_on_all_ranks(model: Model) -> None:
    seeds = [ScoreModel.load(model, head_seed=5).model.score.weight for _ in range(2)]
    assert torch.equal(*seeds)
    assert torch.equal(
        ready(Judge(functions={}, model=model, micro_batch_tokens=9)).scorer.model.score.weight, seeds[0]
    )


def test_a_worker_says_who_it_is_and_keeps_its_rank(model: Model) -> None:
    actor = make_actor(model)
    line = actor.describe()
    assert (line.role, line.rank) == ("actor", 0) and line.pid > 0 and line.node
    with pytest.raises(ValueError, match="already rank 0 of 1"):
        actor.setup(1, 2, "127.0.0.1", 29700, threads=1, seed=0, timeout_s=5)


def test_a_closed_worker_makes_room_for_the_next(model: Model) -> None:
    make_actor(model).close()
    assert (
        make_actor(model).update(minibatch(experience(torch.ones(3, 6))), [[0, 1, 2]])["skipped_steps"] == 0.0
    )
