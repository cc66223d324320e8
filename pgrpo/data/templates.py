"""Templates of a recipe: texts with ``{column}`` placeholders. They are strict: a missing column or an empty value is an error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from string import Formatter
from typing import Any

from pgrpo.config import ConfigError, PromptConfig
from pgrpo.config.columns import value_of

Row = dict[str, Any]


class NoValueError(ConfigError):
    """Row ``index`` has no value in ``column``, which ``key`` needs."""

    def __init__(self, key: str, column: str, index: int) -> None:
        super().__init__(f"{key}: column `{column}` is empty (null) in row {index}")
        self.key, self.column, self.index = key, column, index


def template_columns(prompt: PromptConfig) -> list[str]:
    """The columns that a prompt is made of, by the names that it gives. ConfigError for a template that cannot be parsed."""
    texts = {f"prompt.messages[{i}]": message.content for i, message in enumerate(prompt.messages)}
    if prompt.template:
        texts["prompt.template"] = prompt.template
    names = [column for key, text in texts.items() for _, column, *_ in _parts(text, key) if column is not None]
    return list(dict.fromkeys([*names, *filter(None, (prompt.messages_column, prompt.images_column))]))


def _parts(text: str, key: str) -> list[tuple[str, str | None, str | None, str | None]]:
    """Literal text, column, format and conversion of each part of a template."""
    try:
        return list(Formatter().parse(text))
    except ValueError as error:
        raise ConfigError(f"{key}: {error} in {text!r}; write {{{{ and }}}} for literal braces") from error


def compile_template(
    text: str, columns: Sequence[str], key: str, guard: Callable[[str], str] = str
) -> Callable[[Row, int], str]:
    """Compile ``text`` with ``{column}``, ``{column.field}`` and ``{column:format}`` placeholders into a function
    ``(row, row number) -> text``. ``guard`` is applied to what stands for a placeholder."""
    parts = _parts(text, key)
    for _, column, _, conversion in parts:
        if column is not None and (conversion or not {column, column.split(".")[0]} & {*columns}):
            written = column + (f"!{conversion}" if conversion else "")
            raise ConfigError(no_column(key, f"{{{written}}}", columns) + "; write {{ and }} for literal braces")

    def fill(row: Row, index: int) -> str:
        out = []
        for literal, column, spec, _ in parts:
            out.append(literal)
            if column is None:
                continue
            value = column_of(row, column, key, index)
            if value is None:
                raise NoValueError(key, column, index)
            try:
                out.append(guard(format(value, spec or "")))
            except (ValueError, TypeError) as error:
                raise ConfigError(f"{key}: row {index}: {{{column}:{spec}}}: {error}") from error
        return "".join(out)

    return fill


def column_of(row: Row, column: str, key: str, index: int) -> Any:
    try:
        return value_of(row, column)
    except KeyError as error:
        raise ConfigError(f"{key}: row {index}: {error.args[0]}") from None


def no_column(key: str, column: str, columns: Sequence[str]) -> str:
    return f"{key}: the data has no column `{column}`; it has {', '.join(columns)}"
