"""The sections that say what is learned: data, prompts, environments and rewards. A recipe consists of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from omegaconf import MISSING

from pgrpo.config.fields import MOST_SECONDS, MOST_TOKENS, number


@dataclass
class ImageConfig:
    min_pixels: int | None = number(None, least=1, most=2**30)
    """A smaller image is enlarged to about this many pixels before the model sees it. None: as the model's image processor has it.
    Refused for models whose images all have one size."""
    max_pixels: int | None = number(None, least=1, most=2**30)
    """A larger image is reduced to about this many pixels before the model sees it: fewer pixels are fewer tokens. None: as the
    model's image processor has it. Refused for models whose images all have one size."""
    max_file_pixels: int = number(50_000_000, least=4, most=2**31)
    """A file with more pixels (width times height) is an error, before it is decoded."""
    allowed_hosts: list[str] = field(default_factory=list)
    """Hosts that images are fetched from where rows have URLs. A redirect to another host is refused."""


@dataclass
class DataConfig:
    path: str = MISSING
    """Data set: a .jsonl, .json, .csv, .tsv (each also with .gz behind it, all UTF-8) or .parquet file (relative to the recipe,
    then to the current folder), a hub name, or a Python function that returns rows (`file.py:function` or `module:function`)."""
    name: str | None = None
    """Configuration of a hub data set (gsm8k has `main`)."""
    split: str = "train"
    """Split of a hub data set, or the argument of a Python function."""
    eval_path: str | None = None
    """Held-out data set. None takes `data.path`."""
    eval_split: str | None = None
    """Held-out split. Needed for evaluation unless `data.eval_path` names another file."""
    revision: str | None = None
    """Branch, tag or commit of a hub data set."""
    shuffle: bool = True
    """A new seeded order in each epoch. False keeps the order of the rows."""
    max_prompt_tokens: int = number(1024, least=1, most=MOST_TOKENS)
    """The longest prompt, in tokens, those of its images included."""
    overlong: Literal["error", "drop", "truncate"] = "error"
    """A longer prompt stops the run, is dropped, or keeps its last `max_prompt_tokens` tokens. Dropped and truncated prompts are
    counted."""
    image: ImageConfig = field(default_factory=ImageConfig)


@dataclass
class MessageConfig:
    role: Literal["system", "user", "assistant"] = MISSING
    """Role of the message. If the last message is the assistant's, the completion continues it."""
    content: str = MISSING
    """Text with `{column}` placeholders. `{{` is a literal brace."""


@dataclass
class PromptConfig:
    template: str | None = None
    """Raw prompt with `{column}` placeholders (`{column.field}` for a field of a column). Give this or `messages`."""
    messages: list[MessageConfig] = field(default_factory=list)
    """Chat prompt, rendered with the model's chat template."""
    messages_column: str | None = None
    """Column that already holds a conversation: a list of messages (`role` and `content`, or ShareGPT's `from` and `value`), or its
    JSON."""
    answer_column: str | None = None
    """Where conversations end with the assistant's answer: the name of a new column for it, which rewards read (`args.column`).
    None: such a conversation is an error."""
    images_column: str | None = None
    """Column with the prompt's image, or a list of them: paths, URLs, bytes, PIL images or those of `datasets`. `<image>` in a
    message marks the place of each, in order; without marks all are in front of the first user message. Needs a vision-language
    model."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Extra arguments of the chat template (`enable_thinking: false`)."""


@dataclass
class EnvironmentConfig:
    factory: Any = None
    """Class of the environment (or another callable that makes one): `module:Class` or `path/to/file.py:Class`. Or a mapping of
    names to such classes; then a row's column `environment` has the name of its class. None: no environment."""
    args: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments for the class; with a mapping, for each of the classes."""
    history: Literal["append", "fork"] | None = None
    """Where the chat template writes earlier turns in another way once there is a new message (Qwen3 drops old reasoning): `append`
    keeps them as they were sampled; `fork` lets the history as it is written then begin another sample of the episode, which is
    what the model reads when it is served. None: append results of tools, fork where an environment speaks as the user."""
    max_turns: int = number(8, least=1, most=10**4)
    """Turns of the model in an episode. Calls of the last turn still run, so that an environment sees them."""
    max_tool_calls: int = number(16, least=1, most=10**6)
    """Calls of tools in an episode. A turn's calls beyond it do not run and end the episode."""
    max_episode_tokens: int | None = number(None, least=1, most=MOST_TOKENS)
    """Tokens of an episode behind its prompt: what the model writes and what it is told, images included.
    `rollout.max_completion_tokens` limits one turn. None: `max_turns` turns of that length, for all together."""
    max_images: int = number(0, least=0, most=10**4)
    """Images that tools and the environment may give in an episode, beside those of its prompt. Needs a vision-language model. One
    that is above it is a failure of its call; with 0 an image stops the run."""
    overlong: Literal["cut", "end"] = "cut"
    """The text of a tool that does not fit `max_episode_tokens` is cut so that another turn fits, and an image that does not fit is
    left out with a note; or the episode ends (`length`)."""
    call_timeout_s: float = number(60.0, above=0, most=MOST_SECONDS)
    """Maximum seconds of one call of a tool or environment; a longer one ends its episode (`timeout`)."""
    episode_timeout_s: float = number(600.0, above=0, most=MOST_SECONDS)
    """Maximum seconds of all calls of an episode together; sampling does not count."""
    on_error: Literal["tell", "end"] = "tell"
    """A tool that raises: the model is told, or the episode ends (`environment`) and takes no part in the update."""
    on_bad_call: Literal["tell", "end"] = "tell"
    """A call that cannot be parsed, of an unknown tool or with wrong arguments: the model is told, or the episode ends
    (`parse_error`)."""
    secrets: list[str] = field(default_factory=list)
    """Names of environment variables that tools and environments of a config may see. They run in worker processes, which see only
    these and a few of the system, such as `PATH` and `HOME`."""


@dataclass
class RewardConfig:
    function: str = MISSING
    """Built-in name (`exact_match`, ...), `module:function` or `path/to/file.py:function` (relative to the recipe, then
    to the current folder)."""
    weight: float = number(1.0, least=-1e6, most=1e6)
    """Factor in the total reward."""
    args: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments for the function. `column: reward_model.ground_truth` names a field of a column."""
    style: Literal["text", "messages"] = "text"
    """What your own function gets as completions and prompts: texts, or lists of messages, as TRL gives to its functions
    (`c[0]["content"]`)."""
    timeout_s: float = number(600.0, above=0, most=MOST_SECONDS)
    """Maximum seconds of one call of your own function; then its process is killed. For `math` set `args.timeout_s`."""


@dataclass
class RewardsConfig:
    functions: list[RewardConfig] = field(default_factory=list)
    """Reward functions; the total reward is their weighted sum."""
    on_error: Literal["raise", "mask"] = "raise"
    """A reward that fails stops the run and shows the sample (`raise`), or leaves the sample out, counted (`mask`)."""
    bad_gold: Literal["error", "drop"] = "error"
    """A row whose right answer a built-in reward cannot read, such as `proof` for `math`, stops the run before it begins
    (`error`), or is left out, counted (`drop`). All rows are looked at."""
