"""The OpenAPI page: the routes' own types, also of bodies that the routes read by themselves."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

_REF = "#/components/schemas/{model}"


def reads(model: type[BaseModel]) -> dict[str, Any]:
    """For `openapi_extra` of a route that reads its body by `read_json`."""
    schema = {"$ref": _REF.format(model=model.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def describe(api: FastAPI, title: str, version: str, bodies: list[type[BaseModel]]) -> None:
    """Serve `/openapi.json` with the schemas of `bodies` added."""

    def openapi() -> dict[str, Any]:
        if api.openapi_schema is None:
            page = get_openapi(title=title, version=version, routes=api.routes)
            _, schemas = models_json_schema([(body, "validation") for body in bodies], ref_template=_REF)
            components = page.setdefault("components", {})
            components["schemas"] = {**schemas.get("$defs", {}), **components.get("schemas", {})}
            components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            page["security"] = [{"key": []}]
            api.openapi_schema = page
        return api.openapi_schema

    api.openapi = openapi  # type: ignore[method-assign]
