"""A micro-batch must hold what is never cut: a row, or all rows that one loss compares.

``orchestrator/balance.py`` would say so at the first row that is too long, in the middle of a run; here it is
said before anything starts.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from orchestrator.batch import Prompt
from orchestrator.config import RL, Run
from orchestrator.examples import Unit


@dataclass(frozen=True, slots=True, kw_only=True)
class Together:
    """Rows that stay in one micro-batch: Together(rows=2, width=40) costs 80 tokens."""

    rows: int
    width: int  # tokens of the longest

    @property
    def tokens(self) -> int:
        return self.rows * self.width


def refuse_small_budgets(run: Run, units: Mapping[str, Sequence[Unit]], prompts: Sequence[Prompt]) -> None:
    """``units`` of each supervised stage, held-out ones too; ``prompts`` of the rl stage. ValueError."""
    asked = [item for stage, own in units.items() if own for item in _supervised(run, stage, own)]
    if run.rl is not None and prompts:
        longest = max(len(prompt.tokens) for prompt in prompts) + run.rl.sampling.max_new_tokens
        asked += [("rl", role, part) for role, part in _rl(run, run.rl, longest)]
    for stage, role, part in asked:
        budget = getattr(run.roles, role).micro_batch_tokens
        if part.tokens > budget:
            raise ValueError(
                f"roles.{role}.micro_batch_tokens={budget} cannot hold {part.rows} row(s) of {part.width} "
                f"tokens, which {stage} keeps together; set it to {part.tokens} or more, or lower "
                f"{'rl.sampling.max_new_tokens' if stage == 'rl' else 'model.max_length'}"
            )


def _supervised(run: Run, stage: str, units: Sequence[Unit]) -> Iterator[tuple[str, str, Together]]:
    packed = run.sft is not None and run.sft.packing and stage == "sft"
    largest = max((_part(unit, packed=packed) for unit in units), key=lambda part: part.tokens)
    roles = ["reward" if stage == "reward_model" else "actor"]
    if stage == "preference" and run.preference is not None and run.preference.objective.needs_reference:
        roles.append("reference")
    for role in roles:
        yield stage, role, largest


def _part(unit: Unit, *, packed: bool) -> Together:
    """Packed rows lie one after the other; a mismatched row (kto) is scored by itself."""
    if packed:
        return Together(rows=1, width=unit.num_tokens)
    own = Together(rows=len(unit.rows), width=max(len(tokens) for tokens, _ in unit.rows))
    other = Together(rows=1, width=0 if unit.mismatched is None else len(unit.mismatched[0]))
    return max(own, other, key=lambda part: part.tokens)


def _rl(run: Run, rl: RL, longest: int) -> Iterator[tuple[str, Together]]:
    """A loss over pairs reads both; whoever only scores takes each row for itself."""
    yield "actor", Together(rows=2 if rl.algorithm.steps_on_groups else 1, width=longest)
    if run.placement.backbone == "separate":
        for role in sorted(rl.algorithm.roles()):
            yield role, Together(rows=1, width=longest)
