"""predict's typed signature: how a request body becomes arguments, how a result becomes a body, both as JSON schema.

A function of one parameter takes its value as it is (``[1, 2]``) or named (``{"values": [1, 2]}``); one of several
takes an object. Raw bodies (text, images, bytes, tensors) go to the only parameter without a default. Everything else
is refused with an ``InputError`` that names the field.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from hotset.errors import FunctionError, InputError
from hotset.functions.annotations import codec_of, decode_hook, schema_hook
from hotset.functions.codecs import BodyCodec
from hotset.functions.encoding import EVENT_STREAM, NDJSON, Encoded, encode
from hotset.functions.media import JSON, Body, MediaType, parse_media_type
from hotset.functions.problems import (
    SHOWN_CHARACTERS,
    UNREADABLE,
    input_error,
    is_blank,
    opens_object,
    top_level_keys,
)

if TYPE_CHECKING:
    from hotset.functions.v2_types import Tensors

_BRACE = ord("{")


class Parameter(msgspec.Struct, frozen=True, kw_only=True):
    """One argument of ``predict`` as a request sends it (for a batched function: one item of its list)."""

    name: str
    annotation: Any
    """The type that msgspec decodes to."""
    codec: BodyCodec | None
    """Reads raw bodies for it; None: JSON only."""
    required: bool
    default: Any = None
    keyword_only: bool = False


class Signature:
    """The typed signature of one function; ``inspection.signature_of`` makes it.

    ``name``: the function's name · ``parameters``, keyword-only ones last · ``batched``: ``predict`` takes and returns
    lists, each request brings one item · ``streaming``: ``predict`` yields its results · ``tensors``: the v2 metadata
    where it says more than the types do (a model file's).
    """

    def __init__(
        self,
        *,
        name: str,
        parameters: Sequence[Parameter],
        returns: Any,
        description: str = "",
        batched: bool = False,
        streaming: bool = False,
        tensors: Tensors | None = None,
    ) -> None:
        self.name = name
        self.parameters = tuple(parameters)
        self.returns = returns
        self.tensors = tensors
        self.batched = batched
        self.streaming = streaming
        self._keywords = tuple(parameter.name for parameter in self.parameters if parameter.keyword_only)
        self._positional = len(self.parameters) - len(self._keywords)
        self._carrier = _carrier(self.parameters)
        single = self.parameters[0] if len(self.parameters) == 1 else None
        takes_object = single is not None and _object_like(msgspec.inspect.type_info(single.annotation))
        # Where the value may itself be an object, {"name": ...} counts as named only when the name is there.
        self._named = _decoder(_record(self.parameters, all_required=takes_object))
        self._bare = _decoder(single.annotation) if single is not None else None
        # Where the value is never an object, the body's first character tells which form it has.
        self._certain = None if takes_object else self._bare
        self._schema = self._make_schema(returns, description)

    def decode(self, body: Body, content_type: str = JSON) -> tuple[Any, ...]:
        """A request body -> the arguments in the order of ``parameters``; raises ``InputError``.

        ``body``: bytes or a memoryview of bytes; nothing in the result refers to its memory.
        """
        if content_type == JSON:
            if self._certain is not None and body and body[0] != _BRACE:
                try:
                    return (self._certain.decode(body),)
                except UNREADABLE:
                    pass  # Told in full by _from_json; or it is an object after blanks.
            return self._from_json(body)
        media = parse_media_type(content_type)
        carrier = self._carrier
        if carrier is not None and carrier.codec is not None and carrier.codec.accepts(media, body):
            return self._from_raw(body, media, carrier, carrier.codec)
        if media.is_json or not media.declared:
            return self._from_json(body)
        raise InputError("", f"{media.name[:SHOWN_CHARACTERS]} cannot be read here; send {' or '.join(self.accepts)}")

    def call(self, predict: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        """``predict`` with the arguments that ``decode`` gave, keyword-only ones by name."""
        if not self._keywords:
            return predict(*arguments)
        named = zip(self._keywords, arguments[self._positional :], strict=True)
        return predict(*arguments[: self._positional], **dict(named))

    def call_batch(self, predict: Callable[..., Any], items: Sequence[tuple[Any, ...]]) -> list[Any]:
        """One ``predict`` for the decoded arguments of several requests -> one result for each, in order.

        Raises ``FunctionError`` when ``predict`` does not return one result per item.
        """
        results = self.call(predict, tuple(map(list, zip(*items, strict=True))))
        try:
            count = -1 if isinstance(results, str | bytes | dict) else len(results)
        except TypeError:
            count = -1
        if count != len(items):
            got = f"{count} results" if count >= 0 else f"a {type(results).__name__}"
            raise FunctionError(
                f"{self.name}: predict got {len(items)} items and returned {got}; return one result per item, in order"
            )
        return [results[index] for index in range(count)]

    def encode(self, result: Any, accept: str = "*/*") -> Encoded:
        """A result (of a batch: one request's) -> the answer's content type and body; raises ``FunctionError``."""
        return encode(result, accept)

    def schema(self) -> dict[str, Any]:
        """What the function takes and returns, for people and tools; every value is plain JSON:

        ``name``, ``description`` (docstrings), ``input`` and ``output`` (JSON schemas of one request; ``output`` of
        one item where ``streaming``), ``accepts`` and ``produces`` (content types), ``batched``, ``streaming``.
        """
        return self._schema

    @property
    def accepts(self) -> tuple[str, ...]:
        """Content types of the bodies it reads."""
        codec = self._carrier.codec if self._carrier is not None else None
        return (JSON, *(codec.media_types if codec is not None else ()))

    def _from_json(self, body: Body) -> tuple[Any, ...]:
        try:
            if self._bare is None or (self._certain is not None and opens_object(body)):
                return msgspec.structs.astuple(self._named.decode(body))
            if self._certain is not None:
                return (self._certain.decode(body),)
            return self._named_or_bare(body, self._bare)
        except UNREADABLE as error:
            if is_blank(body) and not any(parameter.required for parameter in self.parameters):
                return tuple(parameter.default for parameter in self.parameters)
            bare = None if self._is_named(body) else self.parameters[0].name
            raise input_error(error, bare, self._fields(), self.accepts, body) from None

    def _named_or_bare(self, body: Body, bare: msgspec.json.Decoder[Any]) -> tuple[Any, ...]:
        try:
            return msgspec.structs.astuple(self._named.decode(body))
        except msgspec.ValidationError as error:
            try:
                return (bare.decode(body),)
            except msgspec.ValidationError:
                if self._is_named(body):
                    raise error from None
                raise

    def _is_named(self, body: Body) -> bool:
        """Whether an unfit body was meant as the object of all parameters, not as the value of the only one."""
        if self._bare is None:
            return True
        if self._certain is not None:
            return opens_object(body)
        return self.parameters[0].name in top_level_keys(body)

    def _from_raw(self, body: Body, media: MediaType, carrier: Parameter, codec: BodyCodec) -> tuple[Any, ...]:
        try:
            value = codec.from_raw(body, media)
        except ValueError as error:
            raise InputError(carrier.name, str(error)) from None
        return tuple(value if parameter is carrier else parameter.default for parameter in self.parameters)

    def _fields(self) -> str:
        names = [p.name if p.required else f"{p.name} (optional)" for p in self.parameters]
        if not names:
            return "no fields"
        return f"{'the field' if len(names) == 1 else 'the fields'} {', '.join(names)}"

    def _make_schema(self, returns: Any, description: str) -> dict[str, Any]:
        record = _record(self.parameters, title=self.name)
        (taken,), definitions = msgspec.json.schema_components([record], schema_hook=schema_hook)
        try:
            (given,), more = msgspec.json.schema_components([returns], schema_hook=schema_hook)
        except (TypeError, NotImplementedError):
            # A result is written by its own type, so its annotation may be anything.
            given, more = {}, {}
        # The record goes to the top level, where tools look for the properties.
        own = definitions.pop(taken["$ref"].rpartition("/")[2])
        codec = codec_of(returns)
        produces = (NDJSON, EVENT_STREAM) if self.streaming else (JSON,) if codec is None else codec.produces
        return {
            "name": self.name,
            "description": description,
            "input": own | ({"$defs": definitions} if definitions else {}),
            "output": given | ({"$defs": more} if more else {}),
            "accepts": list(self.accepts),
            "produces": list(produces),
            "batched": self.batched,
            "streaming": self.streaming,
        }


def _carrier(parameters: Sequence[Parameter]) -> Parameter | None:
    """The parameter that a raw body is for: the only one without a default, or the first when all have one."""
    required = [parameter for parameter in parameters if parameter.required]
    if len(required) == 1:
        return required[0]
    return parameters[0] if parameters and not required else None


def _record(parameters: Sequence[Parameter], title: str = "Input", all_required: bool = False) -> type[msgspec.Struct]:
    """The object form of the arguments."""
    fields: list[Any] = []
    names: dict[str, str] = {}
    for index, parameter in enumerate(parameters):
        # A model file's input may have any name; a field of a record may not.
        field = parameter.name if parameter.name.isidentifier() else f"field_{index}"
        names[field] = parameter.name
        if parameter.required or all_required:
            fields.append((field, parameter.annotation))
        else:
            fields.append((field, parameter.annotation, _default(parameter.default)))
    return msgspec.defstruct(title, fields, kw_only=True, forbid_unknown_fields=True, rename=names)


def _default(value: Any) -> Any:
    """Immutable defaults show in the schema; all others are the very object of the signature, as Python has it."""
    plain = value is None or isinstance(value, bool | int | float | str | bytes)
    return value if plain else msgspec.field(default_factory=lambda: value)


def _decoder(annotation: Any) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(annotation, dec_hook=decode_hook)


def _object_like(info: msgspec.inspect.Type) -> bool:
    """Whether a JSON object can be a value of this type."""
    kinds = msgspec.inspect
    if isinstance(info, kinds.UnionType):
        return any(_object_like(member) for member in info.types)
    if isinstance(info, kinds.Metadata):
        return _object_like(info.type)
    return isinstance(
        info,
        kinds.AnyType
        | kinds.RawType
        | kinds.DictType
        | kinds.StructType
        | kinds.DataclassType
        | kinds.TypedDictType
        | kinds.CustomType,
    )
