"""What the values of settings may be: types that pydantic checks."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, PlainValidator

from seqloom.errors import PlanError
from seqloom.plan import Plan
from seqloom.train.wording import shown


def read_plan(value: object) -> Plan:
    if isinstance(value, Plan):
        return value
    if not isinstance(value, str):
        raise ValueError(f"plan is {shown(value)}; it must be a string such as 'ring=2 ulysses=2'.")
    try:
        return Plan.parse(value)
    except PlanError as error:
        raise ValueError(str(error)) from error


PlanText = Annotated[Plan, PlainValidator(read_plan), PlainSerializer(str, return_type=str)]
Count = Annotated[int, Field(ge=1)]
Amount = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]
Rate = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
Seconds = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Decay = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Globs = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(strict=False)]


class Section(BaseModel):
    """Frozen; unknown keys and values of another type are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
