"""The base of every settings class: frozen, unknown keys refused, a docstring under each field is its
help."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0, le=1)]
RoleName = Literal["actor", "critic", "reward", "reference", "engine"]
Aggregate = Literal["token_mean", "sequence_mean", "constant_length"]


class Settings(BaseModel):
    """Never assigned after load; there is no second default anywhere."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True
    )
