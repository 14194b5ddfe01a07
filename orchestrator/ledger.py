"""Which prompt comes next, under which uid and seed, and which are settled: resumable, exactly once.

A uid is "epoch/row/sample". Everything random about a sample derives from the run's seed and its uid, so the
same run draws the same samples however many engines it has, in whatever order they finish, and after a
resume.

Prompts are handed out in one fixed order; a step settles the oldest of them. A prompt is

    planned    not handed out, or handed out again after a loss
    running    handed out; when the run dies it is planned again, under the same uid and seed
    finished   its group waits to be trained on; a checkpoint keeps it
    settled    a step used it up

The ledger's state is therefore one number, how many prompts are settled, and the finished groups.
"""

import hashlib
import random
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from orchestrator.batch import Prompt
from orchestrator.finished import Group, plain, restored


def sample_seed(run_seed: int, uid: str) -> int:
    """A 63-bit seed, different for every uid (BUGS E4: never ``seed + i``)."""
    digest = hashlib.blake2b(f"{run_seed}/{uid}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """One prompt that a step used up: trained on, or dropped by the run's filter."""

    uid: str
    step: int


class Ledger:
    """Endless epochs over the prompts, each in an order of its own."""

    def __init__(self, prompts: Sequence[Prompt], *, seed: int) -> None:
        if not prompts:
            raise ValueError("the prompt set is empty; give rl.prompts at least one row")
        self._prompts = prompts
        self._seed = seed
        self.forget()

    def forget(self) -> None:
        """As if nothing had been trained: before the state of a checkpoint is restored."""
        self._num_settled = 0
        self._history: list[Settled] = []
        self._finished: dict[str, Group] = {}  # by the uid of the prompt

    async def once(
        self, prompts: Sequence[Prompt], sample: Callable[[Sequence[Prompt]], Awaitable[Sequence[Group]]]
    ) -> list[Group]:
        """The group of each prompt: the one that is finished, or what ``sample`` answers of those that are
        not, finished from now on."""
        unfinished = [prompt for prompt in prompts if prompt.uid not in self._finished]
        if unfinished:
            for prompt, group in zip(unfinished, await sample(unfinished), strict=True):
                self._finished[prompt.uid] = group
        return [self._finished[prompt.uid] for prompt in prompts]

    def prompts(self) -> Iterator[Prompt]:
        """From the first unsettled prompt on; never ends."""
        epoch, position = divmod(self._num_settled, len(self._prompts))
        while True:
            order = list(range(len(self._prompts)))
            random.Random(sample_seed(self._seed, f"order/{epoch}")).shuffle(order)
            for index in order[position:]:
                prompt = self._prompts[index]
                yield replace(prompt, uid=f"{epoch}/{prompt.row}")
            epoch, position = epoch + 1, 0

    def settle(self, prompts: Sequence[Prompt], step: int) -> None:
        """The step that used these prompts up has been published."""
        for prompt in prompts:
            self._finished.pop(prompt.uid, None)
        self._history += [Settled(uid=prompt.uid, step=step) for prompt in prompts]
        self._num_settled += len(prompts)

    @property
    def history(self) -> Sequence[Settled]:
        """What this process has settled, oldest first."""
        return self._history

    def state(self) -> dict[str, Any]:
        counts = {"num_settled": self._num_settled, "num_prompts": len(self._prompts), "seed": self._seed}
        finished = {uid: plain(group) for uid, group in self._finished.items()}
        return {**counts, "finished": finished} if finished else dict(counts)

    def restore(self, state: dict[str, Any]) -> None:
        """Raises ValueError when the state belongs to another prompt set or seed: the order would differ."""
        for name, mine in (("num_prompts", len(self._prompts)), ("seed", self._seed)):
            if state[name] != mine:
                raise ValueError(
                    f"the checkpoint's ledger has {name}={state[name]}, this run {mine}; "
                    "resume with the same prompts and seed"
                )
        self.forget()
        self._num_settled = state["num_settled"]
        self._finished = {uid: restored(rows) for uid, rows in state.get("finished", {}).items()}
