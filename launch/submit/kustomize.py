"""Writes ``k8s/``: ``python -m launch.submit.kustomize`` after a change of the renderer; a test compares.

k8s/run.yaml, k8s/target.yaml     what is rendered
k8s/base/                         the objects, one file each kind
k8s/overlays/<feature>/           the patches of one feature
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import get_args

import yaml

from launch.submit import features, manifests
from launch.submit.job import Job
from launch.submit.kube_settings import CONFIG, Feature
from orchestrator.configfile import load_run, read_yaml

K8S = Path(__file__).parents[2] / "k8s"
KUSTOMIZATION = {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization"}
HEADER = "# Written by `python -m launch.submit.kustomize` from k8s/run.yaml and k8s/target.yaml.\n"


def inputs() -> tuple[Job, CONFIG]:
    return Job(run=load_run([K8S / "run.yaml"], [])), CONFIG(**read_yaml(K8S / "target.yaml"))


def files() -> dict[str, str]:
    """Every written file of k8s/, by its path below it."""
    job, settings = inputs()
    found, names = {}, []
    for item in manifests.objects(job, settings):
        names.append(f"{item['kind'].lower()}.yaml")
        found[f"base/{names[-1]}"] = dump(item)
    found["base/kustomization.yaml"] = dump({**KUSTOMIZATION, "resources": names})
    for feature in get_args(Feature):
        patches = [
            {"target": {"kind": kind}, "patch": yaml.safe_dump(operations, sort_keys=False)}
            for kind, operations in features.patches(feature, job, settings)
        ]
        overlay = {**KUSTOMIZATION, "resources": ["../../base"], "patches": patches}
        found[f"overlays/{feature}/kustomization.yaml"] = dump(overlay)
    return found


def dump(item: object) -> str:
    return HEADER + yaml.safe_dump(item, sort_keys=False, width=110)


def main() -> None:
    for folder in ("base", "overlays"):
        shutil.rmtree(K8S / folder, ignore_errors=True)
    for name, text in files().items():
        (K8S / name).parent.mkdir(parents=True, exist_ok=True)
        (K8S / name).write_text(text)


if __name__ == "__main__":
    main()
