"""Strict validation of Kubernetes objects as an API server with fieldValidation=Strict does it, from the
CRDs.

A structural schema becomes JSON Schema: an object with known properties allows no others; a required key
that has a default is never missing, because the server fills defaults in first.
"""

import functools
import gzip
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

CRDS = Path(__file__).parents[2] / "shared" / "cluster" / "crd"  # as KubeRay publishes them
Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
STRINGS = {"type": "object", "additionalProperties": {"type": "string"}}
METADATA = {
    "type": "object",
    "additionalProperties": False,
    "required": ["name"],
    "properties": {"name": {"type": "string"}, "namespace": {"type": "string"}, "labels": STRINGS,
                   "annotations": STRINGS},
}  # fmt: skip


def strict(schema: Any) -> Any:
    """The JSON Schema of one structural schema."""
    out = {
        key: value
        for key, value in schema.items()
        if not key.startswith("x-kubernetes-") and key not in ("default", "description", "nullable", "format")
    }
    if schema.get("x-kubernetes-int-or-string"):
        out.pop("anyOf", None)
        return out | {"type": ["integer", "string"]}
    if "properties" in schema:
        fields = schema["properties"]
        out["required"] = [name for name in schema.get("required", []) if "default" not in fields[name]]
        out["properties"] = {name: strict(field) for name, field in fields.items()}
    if isinstance(schema.get("additionalProperties"), dict):
        out["additionalProperties"] = strict(schema["additionalProperties"])
    elif schema.get("type") == "object" and not schema.get("x-kubernetes-preserve-unknown-fields"):
        out["additionalProperties"] = False
    if "items" in schema:
        out["items"] = strict(schema["items"])
    return out


@functools.cache
def structural(kind: str) -> Any:
    """The schema as KubeRay publishes it."""
    file = CRDS / f"{kind.lower()}s.yaml.gz"
    if not file.exists():
        pytest.skip(f"KubeRay's schema of {kind} is not beside this checkout: {file.name}")
    crd = yaml.load(gzip.decompress(file.read_bytes()), Loader=Loader)
    version = next(v for v in crd["spec"]["versions"] if v["name"] == "v1")
    return version["schema"]["openAPIV3Schema"]


@functools.cache
def validator(kind: str) -> Draft202012Validator:
    schema = strict(structural(kind))
    schema["properties"] |= {
        "metadata": METADATA, "apiVersion": {"const": "ray.io/v1"}, "kind": {"const": kind}
    }  # fmt: skip
    return Draft202012Validator(schema)


def errors(document: dict[str, Any]) -> list[str]:
    """Every violation of the schema, or else of its rules, e.g. "spec/suspend: 'yes' is not of type
    'boolean'"."""
    kind = document["kind"]
    found = validator(kind).iter_errors(document)
    wrong = [f"{'/'.join(map(str, error.absolute_path))}: {error.message}" for error in found]
    return wrong or list(broken_rules(structural(kind), document, ""))


def broken_rules(schema: Any, value: Any, path: str) -> Iterator[str]:
    """The CEL rules (x-kubernetes-validations) of a new object; rules of a change speak of oldSelf."""
    for rule in schema.get("x-kubernetes-validations", []):
        if "oldSelf" not in rule["rule"] and not holds(rule["rule"], value):
            yield f"{path}: {rule['message']}"
    if isinstance(value, dict):
        for key, item in value.items():
            inner = schema.get("properties", {}).get(key) or schema.get("additionalProperties")
            if isinstance(inner, dict):
                yield from broken_rules(inner, item, f"{path}/{key}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from broken_rules(schema.get("items", {}), item, f"{path}/{index}")


def holds(rule: str, value: Any) -> bool:
    """One CEL rule of the small part that KubeRay's CRDs use: has, in, ==, !, && and ||. AssertionError for
    any other."""
    words = re.sub(r"'[^']*'", "", rule)
    words = re.sub(r"has\(self\.\w+\)|\bself\b|\bin\b", "", words)
    assert not words.strip(" ()[],!&|="), f"no evaluator for the CEL rule {rule}"
    python = re.sub(r"has\(self\.(\w+)\)", r"('\1' in self)", rule)
    python = re.sub(r"!(?!=)", " not ", python).replace("&&", " and ").replace("||", " or ")
    return bool(eval(python.strip(), {"__builtins__": {}}, {"self": value}))


def references(document: Any) -> set[tuple[str, str]]:
    """Every ConfigMap, Secret and PersistentVolumeClaim that an object names."""
    found: set[tuple[str, str]] = set()
    if isinstance(document, list):
        return found.union(*map(references, document)) if document else found
    if not isinstance(document, dict):
        return found
    for key, value in document.items():
        if key in ("secretRef", "secretKeyRef"):
            found.add(("Secret", value["name"]))
        elif key == "configMap":
            found.add(("ConfigMap", value["name"]))
        elif key == "persistentVolumeClaim":
            found.add(("PersistentVolumeClaim", value["claimName"]))
        elif key == "authOptions":
            found.add(("Secret", value["secretName"]))
        else:
            found |= references(value)
    return found
