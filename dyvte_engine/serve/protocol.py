"""What requests may hold. Fields that are not here are refused by name, unless they are null; none is ever ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

Int = Annotated[int, Field(strict=True)]
Number = Annotated[float, Field(strict=True)]
Flag = Annotated[bool, Field(strict=True)]


def _unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair, which is no text") from None
    return text


def _temperature(value: float) -> float:
    if 0 < value < 1e-6:  # logits divided by it would be infinite
        raise ValueError("0 is greedy; accepted above it: 1e-6 to 10")
    return value


Text = Annotated[str, Field(strict=True), AfterValidator(_unicode)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, given: Any) -> Any:
        """Clients write null for what they do not use."""
        return {k: v for k, v in given.items() if v is not None} if isinstance(given, dict) else given


class TextPart(_Body):
    type: Literal["text"]
    text: Text


class ImageUrl(_Body):
    url: Text
    detail: Literal["auto"] = "auto"


class VideoUrl(_Body):
    url: Text


class ImagePart(_Body):
    type: Literal["image_url"]
    image_url: ImageUrl


class VideoPart(_Body):
    type: Literal["video_url"]
    video_url: VideoUrl


Part = Annotated[TextPart | ImagePart | VideoPart, Field(discriminator="type")]


class Message(_Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[Part], Field(min_length=1, max_length=256)]


class JsonSchema(_Body):
    name: Text = ""
    description: Text = ""
    json_schema: dict[str, Any] = Field(alias="schema")
    strict: Flag = True


class ResponseFormat(_Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_where_needed(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema goes with type 'json_schema', and only with that")
        return self


class StructuredOutputs(_Body):
    """vLLM's notation. Exactly one of them."""

    choice: Annotated[list[Text], Field(min_length=1, max_length=256)] | None = None
    regex: Text | None = None
    json_schema: dict[str, Any] | None = Field(None, alias="json")

    @model_validator(mode="after")
    def _one_of_them(self) -> StructuredOutputs:
        if sum(given is not None for given in (self.choice, self.regex, self.json_schema)) != 1:
            raise ValueError("exactly one of choice, regex and json must be given")
        return self


class StreamOptions(_Body):
    include_usage: Flag = False
    continuous_usage_stats: Flag = False  # vLLM's: the counts so far in every event


class _Generation(_Body):
    model: Text | None = None
    policy: Text | None = None
    max_tokens: Annotated[Int, Field(ge=1)] | None = None
    min_tokens: Annotated[Int, Field(ge=0)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=10), AfterValidator(_temperature)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[Int, Field(ge=-1)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] = 0.0
    repetition_penalty: Annotated[Number, Field(ge=0.01, le=100)] | None = None
    logit_bias: Annotated[dict[str, Annotated[Number, Field(ge=-100, le=100)]], Field(max_length=1024)] | None = None
    stop: Text | list[Text] | None = None
    ignore_eos: Flag = False
    seed: Annotated[Int, Field(ge=-(2**63), lt=2**63)] | None = None
    n: Annotated[Int, Field(ge=1)] = 1
    stream: Flag = False
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    user: Text | None = None  # who asks, for the client's own records

    @model_validator(mode="after")
    def _fit_together(self) -> _Generation:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        if self.response_format is not None and self.structured_outputs is not None:
            raise ValueError("response_format and structured_outputs are given; accepted: one of the two")
        return self


class ChatRequest(_Generation):
    messages: Annotated[list[Message], Field(min_length=1, max_length=1024)]
    max_completion_tokens: Annotated[Int, Field(ge=1)] | None = None
    logprobs: Flag = False
    top_logprobs: Annotated[Int, Field(ge=0)] | None = None
    video_fps: Annotated[Number, Field(gt=0, le=1000)] = 2.0

    @model_validator(mode="after")
    def _consistent(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if len({self.max_tokens, self.max_completion_tokens} - {None}) > 1:
            raise ValueError("max_tokens and max_completion_tokens differ; give one")
        return self


class CompletionRequest(_Generation):
    prompt: Text | Annotated[list[Text], Field(min_length=1)]
    logprobs: Annotated[Int, Field(ge=0)] | None = None
    echo: Literal[False] = False
    best_of: Literal[1] = 1


class TokenizeRequest(_Body):
    model: Text | None = None
    prompt: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=1024)] | None = None
    add_special_tokens: Flag = True

    @model_validator(mode="after")
    def _one_of_two(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("prompt or messages must be given, not both")
        return self
