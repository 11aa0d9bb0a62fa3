"""`judge:` the judge, the figure of its grades that is optimised, and its budget."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from evomerge.study.section import PathText, Section, Text, folder_or_name, require

JUDGE_MODEL = "EVOMERGE_JUDGE_MODEL"  # the environment's name for `judge.model`


class JudgeSection(Section):
    """The judge, and which of its figures is optimised."""

    kind: Literal["rules", "learned", "llm", "cascade", "local", "lm-eval"] = Field(
        default="rules",
        description="rules: offline; llm: a server; learned: `file`, from `evomerge judge fit`; "
        "cascade: learned everywhere, llm where it decides which candidates are in a "
        "generation's better half; local: `model` in process; lm-eval: set by lm-eval tasks.",
    )
    metric: Literal["grade", "correct", "score"] = Field(
        default="grade",
        description="grade: 1 to 5; correct: the share of closed tasks that are right; "
        "score: lm-eval's weighted mean.",
    )
    file: PathText | None = Field(
        default=None,
        description="With learned and cascade: the file that `evomerge judge fit` wrote.",
    )
    error: float = Field(
        default=0.1,
        gt=0,
        lt=1,
        examples=[0.1],
        description="With cascade: how often a generation's better half may differ from the llm "
        "judge's.",
    )
    model: Text | None = Field(
        default=None,
        description="With llm: the server's name for the model (null: $EVOMERGE_JUDGE_MODEL, or "
        "the only one it lists); with local: a model folder.",
    )
    base_url: Text | None = Field(
        default=None,
        description="With llm: any OpenAI-compatible server; null: $OPENAI_BASE_URL, or OpenAI. "
        "The key comes from $OPENAI_API_KEY.",
    )
    template: Text | None = Field(
        default=None,
        description="With llm, cascade and local: a prompt of your own, with {input} and {answer}, "
        "and optionally {output} and {eval_aspect}.",
    )
    votes: int = Field(
        default=1, ge=1, description="How many times an answer is graded; the grade is the median."
    )
    temperature: float = Field(
        default=0.0, ge=0, description="Sampling temperature of the replies."
    )
    reply_tokens: int = Field(
        default=1024, ge=1, description="Longest reply, in tokens; a reasoning model needs more."
    )
    concurrency: int = Field(
        default=16, ge=1, le=1024, description="Maximum number of concurrent requests."
    )
    requests_per_minute: float | None = Field(
        default=None, gt=0, description="Maximum number of requests per minute; null: no limit."
    )
    max_requests: int | None = Field(
        default=None,
        gt=0,
        description="The study's budget of requests: when it is spent, the run pauses, and resumes "
        "once it is raised.",
    )
    max_tokens: int | None = Field(
        default=None, gt=0, description="The study's budget of tokens, in prompts and replies."
    )
    max_cost: float | None = Field(
        default=None,
        gt=0,
        description="The study's budget of money, in the currency of the prices.",
    )
    input_price: float = Field(
        default=0.0, ge=0, description="Price of a million tokens of prompts."
    )
    output_price: float = Field(
        default=0.0, ge=0, description="Price of a million tokens of replies."
    )
    retries: int = Field(
        default=6,
        ge=0,
        description="Retries of a request after 408, 409, 425, 429, 5xx, a timeout or a broken "
        "connection; then the run pauses.",
    )
    back_off: float = Field(
        default=1.0,
        ge=0,
        description="Seconds before the first retry, doubled each time up to 60; a Retry-After "
        "header takes precedence.",
    )
    timeout: float = Field(
        default=120.0, gt=0, examples=[120], description="Seconds for the whole of one reply."
    )
    asks: int = Field(
        default=3,
        ge=1,
        description="How many times a reply is requested before the answer counts as not graded "
        "and the run pauses.",
    )

    @field_validator("model")
    @classmethod
    def _local_path(cls, model: str | None, info: ValidationInfo) -> str | None:
        if model is None or info.data.get("kind") != "local":
            return model
        return folder_or_name(model, info)

    @field_validator("base_url")
    @classmethod
    def _no_secret(cls, url: str | None) -> str | None:
        # not shown, because it may hold a key
        plain = url is None or not set("@?#") & set(url)
        need = "Write http://HOST:PORT/v1; a key belongs in the environment, in OPENAI_API_KEY."
        require(plain, "", "contains more than a host and a path", None, need)
        return url

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kind in ("learned", "cascade"):
            need = f"Name the file that `evomerge judge fit` wrote: `kind: {self.kind}` needs it."
            require(self.file is not None, "file", "is missing", None, need)
        require(
            self.file is None or self.kind in ("learned", "cascade"),
            "file",
            "applies only to `kind: learned` or `cascade`",
            self.file,
            "Set that kind, or remove the file.",
        )
        for part in ("{input}", "{answer}"):
            require(
                self.template is None or part in self.template,
                "template",
                f"does not contain {part}",
                self.template,
                f"Write {part} where it goes.",
            )
        require(
            self.max_cost is None or self.input_price + self.output_price > 0,
            "max_cost",
            "needs the prices of the judge's tokens",
            self.max_cost,
            "Set judge.input_price and judge.output_price, each for a million tokens.",
        )
        if self.kind == "local":
            need = "Name the model folder of the local judge."
            require(self.model is not None, "model", "is missing", None, need)
        require(
            self.metric != "correct" or self.kind == "rules",
            "metric",
            f"cannot be correct: the {self.kind} judge gives grades; only rules say right or wrong",
            self.metric,
            "Use grade.",
        )
        return self
