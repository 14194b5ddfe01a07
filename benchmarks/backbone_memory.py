"""Peak memory of the training roles: four workers against one shared backbone, and whether they say the same.

    python benchmarks/backbone_memory.py --model models/smollm2 --out benchmarks/results/backbone_cpu.json

Every worker is a process with the allocator's settings of a worker under Ray, and does what a PPO step asks
of it on the same rows: all score, then actor and critic take two optimizer steps, all at the same time where
they are apart. The peak is that of the sum over the processes (PSS: shared pages are split among those that
map them), sampled four times a second.
Three layouts: separate roles that train all their weights, separate roles with LoRA, the shared backbone. The
weights are equal: one LoRA reward model, trained for a step, is the reward of all three.
"""

import argparse
import json
import multiprocessing
import os
import tempfile
import threading
import time
from pathlib import Path

from launch.environment import MODEL_ENV

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", **MODEL_ENV}
import torch

from actors.actor import Actor
from actors.backbone import Backbone
from actors.critic import Critic
from actors.reference import Reference
from actors.reward import Judge, RewardLearner
from benchmarks.peak_memory import memory
from orchestrator.batch import Examples, Loss, Minibatch
from orchestrator.config import Adapter, Model, Optimizer

ROWS, WIDTH, MICRO = 4, 128, 2
OPTIMIZER = Optimizer(learning_rate=1e-4)


def rows():
    tokens = torch.randint(100, 40000, (ROWS, WIDTH), generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(ROWS, WIDTH, dtype=torch.bool)
    mask[:, WIDTH // 2 :] = True
    return Examples(tokens=tokens, attention_mask=mask | True, action_mask=mask)


PLAN = [list(range(start, start + MICRO)) for start in range(0, ROWS, MICRO)]


def policy_loss(policy, part):
    return Loss(values=-policy.logprobs, metrics={})


def value_loss(values, part):
    return Loss(values=(values - 1).square(), metrics={})


def prefer(scores, part):
    return Loss(values=-torch.nn.functional.logsigmoid(scores), metrics={})


def ready(worker):
    worker.setup(0, 1, *worker.rendezvous(), threads=1, seed=5, timeout_s=120)
    return worker


def minibatch(records):
    mask = records.action_mask
    return Minibatch(records=records, rows=torch.arange(ROWS), weights=mask / mask.sum())


def work(role, model, reward, pipe):
    """One process: load, wait for the others, score, step; answers its scores."""
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1"}
    settings = {"model": model, "optimizer": OPTIMIZER, "total_steps": 9}
    if role == "actor":
        worker = Actor(**settings, loss=policy_loss)
    elif role == "critic":
        worker = Critic(**settings, loss=value_loss)
    elif role == "reference":
        worker = Reference(model=model.frozen())
    elif role == "reward":
        judged = model.frozen().model_copy(update={"path": f"{reward}/model"})
        worker = Judge(model=judged, functions={}, micro_batch_tokens=MICRO * WIDTH)
    else:
        worker = Backbone(
            **settings, loss=policy_loss, value_loss=value_loss, value_coef=0.1, head_rate=None,
            reward_adapter=f"{reward}/model_adapter", reward_model=None, functions={},
        )  # fmt: skip
    ready(worker)
    pipe.send("ready")
    pipe.recv()
    records = rows()
    said = {}
    if role == "backbone":
        said = {"actor": worker.score(records, PLAN), "reference": worker.score_reference(records, PLAN)}
        said |= {"critic": worker.score_values(records, PLAN), "reward": worker.score_rewards(records, PLAN)}
    elif role == "reward":
        said = {"reward": torch.tensor(worker.score(records.tokens.tolist()))}
    else:
        said = {role: worker.score(records, PLAN)}
    pipe.send({name: scores.numpy() for name, scores in said.items()})
    pipe.recv()
    if role in ("actor", "critic", "backbone"):
        worker.update(minibatch(records), PLAN)
        worker.update(minibatch(records), PLAN)
    pipe.send("stepped")
    pipe.recv()


def measure(roles, model, reward):
    """(peak bytes of the sum, what every role said)."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for role in roles:
        ours, theirs = context.Pipe()
        process = context.Process(target=work, args=(role, model, reward, theirs), daemon=True)
        process.start()
        theirs.close()  # so that a process that dies ends the wait for its answer
        pipes.append(ours)
        processes.append(process)
    peak, done = 0, threading.Event()

    def watch():
        nonlocal peak
        while not done.is_set():
            peak = max(peak, sum(memory(process.pid)[0] for process in processes))
            time.sleep(0.25)

    watcher = threading.Thread(target=watch)
    watcher.start()
    said = {}
    for _ in range(3):  # ready, scored, stepped
        for pipe in pipes:
            answer = pipe.recv()
            said |= answer if isinstance(answer, dict) else {}
        for pipe in pipes:
            pipe.send("go on")
    done.set()
    watcher.join()
    for process in processes:
        process.join()
    return peak, said


def train_reward(model, folder):
    learner = ready(RewardLearner(model=model, optimizer=OPTIMIZER, total_steps=2, loss=prefer))
    weights = torch.full((ROWS,), 1 / ROWS)
    learner.update(Minibatch(records=rows(), rows=torch.arange(ROWS), weights=weights), PLAN)
    learner.export(folder / "model")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="models/smollm2")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    whole = Model(path=arguments.model, dtype="float32")
    lora = whole.model_copy(update={"adapter": Adapter(rank=8)})
    four = ["actor", "critic", "reward", "reference"]
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("spawn")
        trainer = context.Process(target=train_reward, args=(lora, Path(folder)))
        trainer.start()
        trainer.join()
        found = {
            "separate": measure(four, whole, folder),
            "shared": measure(["backbone"], lora, folder),
        }
        write(arguments, found)
        found["separate_lora"] = measure(four, lora, folder)
        write(arguments, found)


def write(arguments, found):
    """Again after each layout, so that what was measured is there."""
    peaks = {name: round(peak / 2**30, 3) for name, (peak, _) in found.items()}
    shared, separate = found["shared"][1], found["separate"][1]
    report = {
        "model": Path(arguments.model).name, "dtype": "float32", "rows": ROWS, "tokens": WIDTH,
        "micro_batch": MICRO, "peak_gib": peaks,
        "shared_over": {n: round(peaks["shared"] / peak, 3) for n, peak in peaks.items() if n != "shared"},
        "largest_difference_of_scores": {n: float(abs(shared[n] - separate[n]).max()) for n in shared},
    }  # fmt: skip
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
