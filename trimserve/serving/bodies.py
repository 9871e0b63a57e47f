"""A request's body: read within its limit, parsed as strictly as any JSON of strangers, and checked."""

import difflib
import re
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from trimserve.errors import UsageError
from trimserve.files.checked_json import parse_json
from trimserve.serving.fields import NOT_HONOURED, Fields
from trimserve.serving.problems import ApiError, bad_field

if TYPE_CHECKING:
    from starlette.requests import Request

F = TypeVar("F", bound=Fields)
# msgspec: "Expected `float` <= 2.0 - at `$.temperature`", and the same of an entry: "$.stop[0]".
_PLACE = re.compile(r" - at `\$(?:\.(?P<field>\w+))?(?P<rest>[^`]*)`$")
_MISSING = re.compile(r"missing required field `(\w+)`")


async def read_body(request: "Request", limit: int) -> bytes:
    """The bytes of a request.

    Raises:
        ApiError: 413, more than `limit`.
    """
    declared = request.headers.get("content-length", "0")
    if declared.isascii() and declared.isdigit() and int(declared) > limit:
        raise _too_long(limit)
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise _too_long(limit)
        parts.append(part)
    return b"".join(parts)


def _too_long(limit: int) -> ApiError:
    return ApiError(
        413,
        f"the request should have at most {limit:,} bytes and has more: send it in parts, or start the "
        "server with a larger --max-body.",
        code="request_too_large",
    )


def parse_fields(body: bytes, kind: type[F]) -> F:
    """Check the JSON of a body against what a route reads.

    Raises:
        ApiError: 400: not JSON, or a field that is unknown, missing, wrong or not honoured, by name.
    """
    try:
        content = parse_json(body, "the request", advice="send a JSON object.", error=UsageError)
    except UsageError as error:
        raise ApiError(400, str(error), code="invalid_json") from error
    if not isinstance(content, dict):
        raise ApiError(400, "the request should be a JSON object: send one.", code="invalid_json")
    # A field that is null is one that was left out, for every client.
    given = {name: value for name, value in content.items() if value is not None}
    return _convert(_honoured(given, kind), kind)


def _honoured(given: dict[str, Any], kind: type[F]) -> dict[str, Any]:
    """The fields that are read; others must ask for nothing."""
    known, others = kind.__struct_fields__, NOT_HONOURED[kind]
    honoured: dict[str, Any] = {}
    for name, value in given.items():
        if name in known:
            honoured[name] = value
        elif name not in others:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
            advice = f"did you mean {near[0]}?" if near else "leave it out."
            raise bad_field(name[:100], f"unknown field {name[:100]!r}: {advice}", "unknown_field")
        elif not any(type(value) is type(off) and value == off for off in others[name]):
            raise bad_field(
                name, f"{name} is not supported by this server: leave it out.", "unsupported_field"
            )
    return honoured


def _convert(given: dict[str, Any], kind: type[F]) -> F:
    try:
        return msgspec.convert(given, kind)
    except (msgspec.ValidationError, RecursionError) as error:
        said = str(error)
        if missing := _MISSING.search(said):
            raise bad_field(missing[1], f"{missing[1]} is missing: give it.", "missing_field") from error
        place = _PLACE.search(said)
        param = place["field"] if place and place["field"] else None
        where = f"{param}{place['rest']}" if place and param else "the request"
        reason = _PLACE.sub("", said).replace("`", "")
        reason = reason[:1].lower() + reason[1:]
        raise ApiError(
            400, f"{where} is not what it should be ({reason}): mend it.", param=param, code="invalid_value"
        ) from error
