"""``engine.autoscale`` in a run: what a step measured goes to the ``Autoscaler``, and what that decides to
``EngineCount``. Each decision is a line of the progress and a metric of its step."""

from launch.engine_count import EngineCount, Note
from orchestrator import metrics as names
from orchestrator.autoscale import Autoscaler, Shares
from orchestrator.config import Autoscale
from orchestrator.roles import Metrics


class Autoscaling:
    """Of one rl stage."""

    def __init__(self, settings: Autoscale, count: EngineCount, note: Note, *, overlaps: bool) -> None:
        self._settings, self._count, self._note = settings, count, note
        self._scaler = Autoscaler(settings, overlaps=overlaps)

    def stepped(self, figures: Metrics) -> Metrics:
        """``figures`` of the step (``work.engine_shares``); what is logged beside them."""
        shares = Shares(
            wait=figures[names.TRAINER_WAIT],
            busy=figures[names.ENGINE_BUSY],
            idle=figures[names.ENGINE_IDLE],
        )
        engines = self._count.settled
        decision = self._scaler.stepped(engines, shares)
        if decision is None:
            return {names.ENGINES: engines or 0}
        seen, settings = decision.shares, self._settings
        self._note(
            f"engine.autoscale: {decision.engines} engine(s) instead of {engines}: in the last "
            f"{settings.window} steps the trainers waited {seen.wait:.0%} of the time for generation (target "
            f"{settings.target_wait:.0%}), the engines were idle {seen.idle:.0%}"
        )
        self._count.ask(decision.engines)
        return {names.ENGINES: engines or 0, names.ENGINES_WANTED: decision.engines}
