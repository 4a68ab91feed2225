"""How the API says that there is no answer."""

from typing import Any

from pydantic import BaseModel


class FieldProblem(BaseModel):
    """What is wrong with one field, as FastAPI words it."""

    type: str
    loc: list[str | int]
    msg: str


class Problem(BaseModel):
    """Why there is no answer; a list where fields of the request are wrong."""

    detail: str | list[FieldProblem]


def problems(model: type[BaseModel] = Problem) -> dict[int | str, dict[str, Any]]:
    """What the description of a call says of every status that is no success."""
    return {codes: {"model": model} for codes in ("4XX", "5XX")}
