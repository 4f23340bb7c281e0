"""How a tool is described to an LLM, and how it is called with the arguments that the LLM chose."""

import inspect
from collections.abc import Callable
from typing import Any

from .base import Result, Tools


def llm_parameters(tool: Callable[..., Any]) -> list[inspect.Parameter]:
    """Return the parameters that the LLM fills in, all of them text. Keyword-only ones are the agent's own."""
    return [one for one in inspect.signature(tool).parameters.values() if one.kind is not one.KEYWORD_ONLY]


def schema(name: str, tool: Callable[..., Any]) -> dict[str, Any]:
    """Describe a tool as LLM APIs want it: its name, the first line of its docstring, its parameters."""
    parameters = llm_parameters(tool)
    required = [one.name for one in parameters if one.default is one.empty]
    properties = {one.name: {"type": "string"} for one in parameters}
    about = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    description = (inspect.getdoc(tool) or "").partition("\n")[0]
    return {"type": "function", "function": {"name": name, "description": description, "parameters": about}}


def find_problem(name: str, arguments: dict[str, Any], tools: Tools) -> str:
    """Return why the LLM cannot call a tool like that, in words meant for it; "" if it can."""
    if name not in tools:
        return f"there is no tool {name}; there are {', '.join(tools)}"
    try:
        inspect.Signature(llm_parameters(tools[name])).bind(**arguments)
    except TypeError as error:  # a missing argument, or one too many
        return f"{name}: {error}"
    return ""


def call_tool(tool: Callable[..., Result], arguments: dict[str, Any], **own: Any) -> Result:
    """Call a tool with the LLM's arguments, and with those of the agent's own that it takes."""
    takes = inspect.signature(tool).parameters
    return tool(**arguments, **{name: value for name, value in own.items() if name in takes})
