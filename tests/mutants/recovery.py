"""Mutants of what a run does when something dies, fills up or does not answer: bugs of the same kinds as those
of the list, which has no rows for them."""

from tests.mutants.record import Mutant

FLEET, RECOVERY, NUMBERS = "tests/test_fleet.py", "tests/test_recovery.py", "tests/test_numbers.py"
KEEP_GOING, REWARD = "tests/test_keep_going.py", "tests/test_remote_reward.py"
FOLDER, SECRETS = "tests/test_run_folder.py", "tests/test_secrets.py"

RECOVERED = (
    Mutant(
        name="one restart more than allowed",
        file="actors/budget.py",
        old="if len(self._taken) >= self._restarts:",
        new="if len(self._taken) > self._restarts:",
        tests=(f"{KEEP_GOING}::test_a_driver_is_started_again_as_often_as_allowed",),
    ),
    Mutant(
        name="a run that was refused is started again",
        file="launch/keep_going.py",
        old="if code in (0, REFUSED) or asked:",
        new="if code == 0 or asked:",
        tests=(f"{KEEP_GOING}::test_a_driver_is_started_again_as_often_as_allowed",),
    ),
    Mutant(
        name="a run that was asked to stop is started again",
        file="launch/keep_going.py",
        old="if code in (0, REFUSED) or asked:",
        new="if code in (0, REFUSED):",
        tests=(f"{KEEP_GOING}::test_a_run_that_was_asked_to_stop_stays_down",),
    ),
    Mutant(
        name="steps that are done again are in the log twice",
        file="launch/recovery.py",
        old='kept = [line for line in whole if json.loads(line)["step"] <= step]',
        new="kept = whole",
        tests=(f"{RECOVERY}::test_a_step_that_is_done_again_is_in_the_log_once_and_a_torn_line_is_forgotten",),
    ),
    Mutant(
        name="a full disk tears the log of what was trained",
        file="launch/recovery.py",
        old="                stream.truncate(before)\n",
        new="",
        tests=(f"{RECOVERY}::test_a_full_disk_leaves_the_log_as_it_was_and_the_next_write_has_all_of_it",),
    ),
    Mutant(
        name="trainers without a checkpoint go on from different steps",
        file="launch/recovery.py",
        old="all_of_them=journal.newest is None",
        new="all_of_them=False",
        tests=(f"{RECOVERY}::test_a_lost_trainer_is_rebuilt_and_training_goes_on_from_the_checkpoint",),
    ),
    Mutant(
        name="spent restarts end the run without a checkpoint",
        file="launch/recovery.py",
        old="                await journal.save_now()\n",
        new="                pass\n",
        tests=(f"{RECOVERY}::test_spent_restarts_end_the_stage_after_a_checkpoint",),
    ),
    Mutant(
        name="a stranger with the pid of a dead worker is killed",
        file="launch/leftovers.py",
        old="if process.create_time() <= written and _is_ours(process):",
        new="if process.create_time() <= written:",
        tests=(f"{RECOVERY}::test_leftovers_of_a_killed_driver_are_ended_and_nobody_else",),
    ),
    Mutant(
        name="a pid of another machine is killed on this one",
        file="launch/leftovers.py",
        old='if line["node"] != socket.gethostname() or line["role"] == "driver":',
        new='if line["role"] == "driver":',
        tests=(f"{RECOVERY}::test_leftovers_of_a_killed_driver_are_ended_and_nobody_else",),
    ),
    Mutant(
        name="two runs write into one directory",
        file="launch/run_folder.py",
        old="fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        new="fcntl.flock(self._lock, fcntl.LOCK_SH | fcntl.LOCK_NB)",
        tests=(
            f"{FOLDER}::test_a_second_run_on_a_directory_is_refused_within_two_seconds_and_changes_nothing",
        ),
    ),
    Mutant(
        name="the second SIGTERM waits as the first does",
        file="launch/graceful.py",
        old="        if self.asked:\n",
        new="        if False:\n",
        tests=(f"{FOLDER}::test_the_second_sigterm_ends_the_process_at_once",),
    ),
    Mutant(
        name="skipped steps never end the run",
        file="orchestrator/numbers.py",
        old="if self.in_a_row > IN_A_ROW or self.total > self._allowed:",
        new="if self.in_a_row > IN_A_ROW:",
        tests=(f"{NUMBERS}::test_too_many_skipped_steps_end_the_run",),
    ),
    Mutant(
        name="an infinite weight counts as a number",
        file="actors/training_state.py",
        old="return torch.stack(ends).isfinite().all() if ends",
        new="return torch.stack(ends).isnan().logical_not().all() if ends",
        tests=(f"{NUMBERS}::test_one_number_that_is_not_finite_is_found_wherever_it_lies",),
    ),
    Mutant(
        name="a dead reward service is asked every time",
        file="actors/remote_reward.py",
        old="            if self._failures < BREAKS_AFTER:\n                return True\n",
        new="            if self._failures >= 0:\n                return True\n",
        tests=(f"{REWARD}::test_a_dead_service_is_left_alone_while_another_answers_and_asked_again_later",),
    ),
    Mutant(
        name="samples and token follow a redirect",
        file="actors/remote_reward.py",
        old="    def redirect_request(self, *_: Any) -> None:\n        return None\n",
        new="",
        tests=(f"{REWARD}::test_a_redirect_is_not_followed",),
    ),
    Mutant(
        name="a tracker that is down fills the memory",
        file="launch/sidecar.py",
        old="if not self._off and self._queue.qsize() < self._capacity:",
        new="if not self._off:",
        tests=("tests/test_tracking.py::test_what_the_queue_cannot_hold_is_dropped_and_counted",),
    ),
    Mutant(
        name="a traceback shows a secret",
        file="orchestrator/secret.py",
        old="            record.exc_text = redact(record.exc_text)\n",
        new="            pass\n",
        tests=(f"{SECRETS}::test_what_is_logged_holds_no_secret_tracebacks_included",),
    ),
    Mutant(
        name="what is finished at once shares micro-batches",
        file="actors/group.py",
        old="[len(group) for group in groups]\n        ranks",
        new="[len(rollouts)]\n        ranks",
        tests=("tests/test_group.py::test_who_waits_with_a_group_does_not_change_its_company",),
    ),
    Mutant(
        name="what is judged at once shares micro-batches",
        file="actors/reward.py",
        old="for group in groups)\n            rewards[MODEL]",
        new="for group in [rollouts])\n            rewards[MODEL]",
        tests=("tests/test_workers.py::test_groups_that_are_judged_in_one_call_share_no_micro_batch",),
    ),
)  # fmt: skip
