"""Rows -> prompts: sources, templates, lengths, and what a user's mistakes are answered with."""

import gzip
import json
from pathlib import Path

import pytest
from datasets import Dataset
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from pgrpo.config import ConfigError, DataConfig, MessageConfig, PromptConfig, load_config
from pgrpo.data import load_prompts
from pgrpo.training.prompts import held_out_prompts

CHAT = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{{ mood }}"
CHAT += "{% if add_generation_prompt %}[assistant]{% endif %}"
ROWS = [{"question": f"{a}+{a}", "answer": 2 * a} for a in range(5)]


def make_tokenizer(chat_template: str | None = CHAT) -> PreTrainedTokenizerFast:
    """One token a character; 0 is unknown, 1 is bos, which the tokenizer puts first."""
    vocab = {"?": 0, "<s>": 1} | {chr(code): code for code in range(33, 126) if chr(code) != "?"} | {" ": 32}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", unk_token="?", chat_template=chat_template
    )


def codes(text: str) -> list[int]:
    return [ord(c) for c in text]


def raw(template: str = "{question}=") -> PromptConfig:
    return PromptConfig(template=template)


def chat(*contents: str) -> PromptConfig:
    return PromptConfig(messages=[MessageConfig("user", content) for content in contents])


def data(path: object = "unused", **keys) -> DataConfig:
    return DataConfig(path=str(path), **keys)


def load(rows=ROWS, prompt=None, tokenizer=None, **keys):
    return load_prompts(data(**keys), prompt or raw(), tokenizer or make_tokenizer(), dataset=rows)


# Sources


def test_every_source_gives_the_same_prompts(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n")
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    Dataset.from_list(ROWS).to_parquet(tmp_path / "a.parquet")
    Dataset.from_list(ROWS).to_csv(tmp_path / "a.csv")
    (tmp_path / "rows.py").write_text(f"def make(split):\n    return {ROWS!r} if split == 'train' else []\n")
    expected = load().prompts
    assert [p.text for p in expected] == ["0+0=", "1+1=", "2+2=", "3+3=", "4+4="]
    assert load(Dataset.from_list(ROWS)).prompts == expected
    for source in ("a.jsonl", "a.json", "a.parquet", "rows.py:make"):
        assert load_prompts(data(tmp_path / source), raw(), make_tokenizer()).prompts == expected, source
    from_csv = load_prompts(data(tmp_path / "a.csv"), raw(), make_tokenizer()).prompts
    assert [p.token_ids for p in from_csv] == [p.token_ids for p in expected]
    assert from_csv[3].columns == {"question": "3+3", "answer": "6"}  # CSV has no types: all is text


def test_text_keeps_its_form_in_files(tmp_path: Path):
    rows = [{"question": "2024-01-02", "answer": "007"}, {"question": "NA", "answer": "1.0"}]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "a.csv").write_text("question,answer\n2024-01-02,007\nNA,1.0\n")
    for name in ("a.jsonl", "a.csv"):
        loaded = load_prompts(data(tmp_path / name), raw(), make_tokenizer())
        assert [p.columns for p in loaded.prompts] == rows, name


def test_a_folder_is_read_as_the_hub_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    Dataset.from_list(ROWS).to_parquet(folder / "train.parquet")
    Dataset.from_list(ROWS[:2]).to_parquet(folder / "test.parquet")
    assert len(load_prompts(data(folder), raw(), make_tokenizer()).prompts) == 5
    held_out = load_prompts(data(folder, eval_split="test"), raw(), make_tokenizer(), held_out=True)
    assert len(held_out.prompts) == 2
    with pytest.raises(ConfigError, match=r"split nope\): cannot be loaded.*nope"):
        load_prompts(data(folder, split="nope"), raw(), make_tokenizer())


def test_held_out(tmp_path: Path):
    (tmp_path / "train.json").write_text(json.dumps(ROWS))
    (tmp_path / "test.json").write_text(json.dumps(ROWS[3:]))
    loaded = load_prompts(
        data(tmp_path / "train.json", eval_path=str(tmp_path / "test.json")), raw(), make_tokenizer(), held_out=True
    )
    assert [p.text for p in loaded.prompts] == ["3+3=", "4+4="]
    with pytest.raises(ConfigError, match=r"set data.eval_path or data.eval_split"):
        load_prompts(data(tmp_path / "train.json"), raw(), make_tokenizer(), held_out=True)
    with pytest.raises(ConfigError, match=r"data.eval_split=test has no effect on the file .*set data.eval_path"):
        load_prompts(data(tmp_path / "train.json", eval_split="test"), raw(), make_tokenizer(), held_out=True)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"question": "1"}\n\n{"question": 1\n', r"a\.jsonl, line 3: not JSON: .*column"),
        ("a.jsonl", '{"question": "1"}\n[1]\n', r"a\.jsonl, line 2: a row must be a JSON object, not list"),
        ("a.json", '[{"question": "1"},\n', r"a\.json, line 2: not JSON"),
        ("a.json", '{"question": "1"}\n{"question": "1"}', r"a\.json, line 2: not JSON: .*\.jsonl"),
        ("a.json", '{"question": ["1"]}', r"must be a JSON list of objects, not dict"),
        ("a.json", "[1]", r"row 0 must be a dict"),
        ("a.csv", "question,answer\n1,2\n3\n", r"a\.csv, line 3: not 2 fields"),
        ("a.csv", "question,answer\n1,2,3\n", r"a\.csv, line 2: not 2 fields"),
        ("a.parquet", "no", r"a\.parquet: not Parquet"),
        ("a.jsonl", "\n", r"data\.path=.*a\.jsonl has no rows"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: str, message: str):
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_prompts(data(tmp_path / name), raw(), make_tokenizer())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"question": "é"}\n{"question": "ü"}\n'.encode("utf-16"), r"a\.jsonl, line 1: not UTF-8 .*save the file as"),
        ("a.jsonl", b'{"question": "a"}\n{"question": "\xfc"}\n', r"a\.jsonl, line 2: not UTF-8 .*iconv .* a\.jsonl\)"),
        ("a.csv", b"question,answer\n1,2\n\xfc,4\n", r"a\.csv, line 3: not UTF-8"),
        ("a.json", b'[{"question": "a"},\n{"question": "\xfc"}]', r"a\.json, line 2: not UTF-8"),
        ("a.jsonl.gz", gzip.compress(b'{"question": "a"}\n{"question": "\xfc"}\n'), r"a\.jsonl\.gz, line 2: not UTF-8"),
        ("a.jsonl.gz", gzip.compress(b'{"question": "a"}\n' * 99)[:-20], r"a\.jsonl\.gz: cannot be read"),
        ("a.jsonl.gz", b'{"question": "a"}\n', r"a\.jsonl\.gz: cannot be read \(Not a gzipped file"),
        ("a.jsonl", b'{"question": "1"}\n{"question": "\\ud83d"}\n', r"a\.jsonl: row 1 has a lone surrogate \('\\ud83d'\)"),
        ("a.json", b'[{"question": [{"content": "\\udc00"}]}]', r"a\.json: row 0 has a lone surrogate"),
        ("a.jsonl", b'{"question": ' + b"[" * 100_000 + b"\n", r"a\.jsonl, line 1: nested too deeply"),
        ("a.json", b"[" * 100_000, r"a\.json: nested too deeply"),
        ("a.txt", b"question\n", r"a\.txt: files are read if they end in \.jsonl, \.json, \.csv, \.tsv, \.parquet \(or"),
    ],
    ids=["utf-16", "latin-1", "csv", "json", "gz", "gz cut off", "no gz", "half a pair", "half inside", "deep", "deep json", "txt"],
)  # fmt: skip
def test_files_in_another_encoding_and_rows_that_are_no_text(tmp_path: Path, name: str, content: bytes, message: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_prompts(data(tmp_path / name), raw(), make_tokenizer())


def test_rows_of_python_with_half_a_surrogate_pair():
    with pytest.raises(ConfigError, match=r"^dataset: row 1 has a lone surrogate \('\\ud83d'\)"):
        load([ROWS[0], {"question": "1", "answer": "a\ud83d"}])


def test_tabs_and_gzip_are_read(tmp_path: Path):
    text = "".join(json.dumps(row) + "\n" for row in ROWS)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    tabbed = "question\tanswer\r\n" + "".join(f"{row['question']}\t{row['answer']}\r\n" for row in ROWS)
    (tmp_path / "a.tsv").write_bytes(b"\xef\xbb\xbf" + tabbed.encode())
    (tmp_path / "b.tsv.gz").write_bytes(gzip.compress(tabbed.encode()))
    expected = load(ROWS).prompts
    assert load_prompts(data(tmp_path / "a.jsonl.gz"), raw(), make_tokenizer()).prompts == expected
    for name in ("a.tsv", "b.tsv.gz"):
        got = load_prompts(data(tmp_path / name), raw(), make_tokenizer()).prompts
        assert [p.token_ids for p in got] == [p.token_ids for p in expected]
        assert got[3].columns == {"question": "3+3", "answer": "6"}


def test_no_more_than_the_first_rows_are_looked_at(tmp_path: Path):
    """``eval.rows`` of them: one that is far too long, or no chat, behind them stops nothing."""
    rows = [*ROWS[:3], {"question": "1" * 500, "answer": "1"}, {"question": None, "answer": "1"}]
    loaded = load_prompts(data(max_prompt_tokens=20), raw(), make_tokenizer(), first=3, dataset=rows)
    assert [p.columns for p in loaded.prompts] == ROWS[:3]
    with pytest.raises(ConfigError, match=r"row 3 of dataset: the prompt has 50\d tokens"):
        load_prompts(data(max_prompt_tokens=20), raw(), make_tokenizer(), first=4, dataset=rows)
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = [f"data.eval_path={tmp_path / 'held.jsonl'}", "data.max_prompt_tokens=20", "prompt.template='{question}='"]
    config = load_config("quickstart", [*keys, "prompt.messages=[]", "eval.rows=3"])
    assert [p.columns for p in held_out_prompts(config, make_tokenizer())] == ROWS[:3]


def test_missing_file():
    with pytest.raises(ConfigError, match=r"data\.path: no file /nowhere/a\.jsonl"):
        load_prompts(data("/nowhere/a.jsonl"), raw(), make_tokenizer())


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("mke", r"data\.path: no function `mke` in .*rows\.py; did you mean `make`\?"),
        ("broken", r"rows\.py:broken raised ZeroDivisionError: division by zero \(called with 'train'\)"),
        ("nothing", r"must be a sequence of rows \(dicts\), not NoneType"),
    ],
)
def test_bad_functions(tmp_path: Path, function: str, message: str):
    source = "def make(split): return []\ndef broken(split): return 1 / 0\ndef nothing(split): pass\n"
    (tmp_path / "rows.py").write_text(source)
    with pytest.raises(ConfigError, match=message):
        load_prompts(data(f"{tmp_path / 'rows.py'}:{function}"), raw(), make_tokenizer())


def test_function_files_that_cannot_be_loaded(tmp_path: Path):
    (tmp_path / "rows.py").write_text("import no_such_thing\n")
    with pytest.raises(ConfigError, match=r"cannot load .*rows\.py: ModuleNotFoundError: .*no_such_thing"):
        load_prompts(data(f"{tmp_path / 'rows.py'}:make"), raw(), make_tokenizer())
    with pytest.raises(ConfigError, match=r"data\.path: cannot import module `no_such_thing`"):
        load_prompts(data("no_such_thing:make"), raw(), make_tokenizer())


# Templates


def test_raw_prompt_gets_one_bos():
    prompts = load(prompt=raw("{question}=")).prompts
    assert prompts[2].token_ids == [1, *codes("2+2=")]
    assert (prompts[2].index, prompts[2].messages, prompts[2].columns) == (2, None, ROWS[2])
    mixed = load([{"q": "<s>a"}, {"q": "b"}, {"q": "<s>c"}], raw("{q}")).prompts
    assert [p.token_ids for p in mixed] == [[1, ord("a")], [1, ord("b")], [1, ord("c")]]


def test_chat_prompt():
    prompt = chat("{question}, {answer:03d} {{x}}")
    prompt.chat_template_kwargs = {"mood": "!"}
    loaded = load(prompt=prompt).prompts[3]
    assert loaded.messages == [{"role": "user", "content": "3+3, 006 {x}"}]
    assert loaded.text == "<s>[user]3+3, 006 {x}![assistant]"
    assert loaded.token_ids == [1, *codes("[user]3+3, 006 {x}![assistant]")]  # the template's bos, no second one


def test_fields_of_columns_in_templates(tmp_path: Path):
    rows = [{"reward_model": {"ground_truth": "34", "n": 2}, "choices": {"text": ["yes", "no"]}}] * 2
    Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    prompt = raw("{reward_model.ground_truth} {reward_model.n:03d} {choices.text.1}")
    assert load_prompts(data(tmp_path / "a.parquet"), prompt, make_tokenizer()).prompts[1].text == "34 002 no"
    assert load(rows, chat("{choices.text.0}")).prompts[0].messages == [{"role": "user", "content": "yes"}]
    assert load([{"a.b": "1", "a": {"b": "2"}}], raw("{a.b}")).prompts[0].text == "1"  # a column of that very name
    with pytest.raises(
        ConfigError, match=r"row 1: the data has no column `choices\.text\.1`; choices\.text has a list"
    ):
        load([rows[0], {"reward_model": None, "choices": {"text": ["yes"]}}], raw("{choices.text.1}"))
    with pytest.raises(ConfigError, match=r"^dataset, row 1: no `reward_model\.n`; it has no values; prompt"):
        load([rows[0], {"reward_model": None}], raw("{reward_model.n}"))


def test_a_last_assistant_message_is_gone_on_with():
    prompt = PromptConfig(messages=[MessageConfig("user", "{question}"), MessageConfig("assistant", "Well")])
    assert load(prompt=prompt).prompts[1].text == "<s>[user]1+1[assistant]Well"


def test_messages_column(tmp_path: Path):
    chats = [[{"role": "system", "content": "be brief"}, {"role": "user", "content": "{hi}"}]] * 2
    Dataset.from_list([{"chat": c} for c in chats]).to_parquet(tmp_path / "a.parquet")
    prompt = PromptConfig(messages_column="chat")
    loaded = load_prompts(data(tmp_path / "a.parquet"), prompt, make_tokenizer()).prompts
    assert loaded[1].text == "<s>[system]be brief[user]{hi}[assistant]"
    assert loaded[1].messages == chats[1]
    for bad, message in [
        ("hi", r"row 0, column `chat`: must be a list of messages or its JSON, not 'hi'"),
        ([{"role": "user"}], r"row 0, column `chat`: a message is a dict with `role` and `content`"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], r"ends with an assistant message"),
    ]:
        with pytest.raises(ConfigError, match=message):
            load([{"chat": bad}], prompt)
    with pytest.raises(ConfigError, match=r"prompt\.messages_column: the data has no column `chat`; it has question"):
        load(prompt=prompt)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{qestion}", r"no column `\{qestion\}`; it has question, answer; write \{\{"),
        (r"\boxed{}", r"no column `\{\}`"),
        ("{question!r}", r"no column `\{question!r\}`"),
        ("{question.x}", r"row 0: the data has no column `question\.x`; question has a str"),
        ("{nothing.x}", r"no column `\{nothing\.x\}`"),
        ("{question", r"prompt\.template: .* in '\{question'; write \{\{"),
        ("{question:03d}", r"prompt\.template: row 0: \{question:03d\}: Unknown format code 'd'"),
    ],
)
def test_bad_templates(template: str, message: str):
    with pytest.raises(ConfigError, match=message):
        load(prompt=raw(template))


@pytest.mark.faults
@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "a.jsonl",
            '{"question": "1", "answer": "1"}\n\n{"quesiton": "2", "answer": "2"}\n',
            r"a\.jsonl, line 3: no `question`",
        ),
        (
            "a.json",
            '[{"question": "1"}, {"quesiton": "2", "answer": "2"}]',
            r"data\.path=.*a\.json, row 1: no `question`",
        ),
        ("a.jsonl", '{"question": "1"}\n{"question": null, "answer": null}\n', r"a\.jsonl, line 2: `question` is null"),
    ],
)
def test_a_row_without_a_column_of_the_prompt_is_shown_with_its_place_and_keys(tmp_path: Path, name, text, message):
    (tmp_path / name).write_text(text)
    there = "`question`, `answer`" if "null" in message else "`quesiton`, `answer`"
    with pytest.raises(ConfigError, match=rf"{message}; it has {there}; prompt\.messages\[0\] needs it$"):
        load_prompts(data(tmp_path / name), chat("{question}"), make_tokenizer())


def test_null_and_empty_prompts():
    with pytest.raises(ConfigError, match=r"^dataset, row 1: no `q`; it has `p`; prompt\.template needs it$"):
        load([{"q": "a"}, {"p": "b"}], raw("{q}"))
    with pytest.raises(ConfigError, match=r"prompt\.template: the prompt of row 1 is empty"):
        load([{"q": "a"}, {"q": " "}], raw("{q}"))
    with pytest.raises(ConfigError, match="dataset has no rows"):
        load([])


def test_a_character_that_the_tokenizer_has_no_id_for_names_the_prompt():
    """As the quick start's tokenizer, which has no unknown token either."""
    model = Tokenizer(models.WordLevel({"1": 0, "+": 1, "=": 2}))
    model.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    with pytest.raises(ConfigError, match=r"the model's tokenizer cannot encode the prompt '1\+2=' \(.*UNK.*\)"):
        load([{"q": "1+1"}, {"q": "1+2"}], raw("{q}="), PreTrainedTokenizerFast(tokenizer_object=model))


def test_no_chat_template_names_the_raw_prompt():
    with pytest.raises(ConfigError, match=r"no chat template; give a raw prompt with prompt\.template"):
        load(prompt=chat("{question}"), tokenizer=make_tokenizer(chat_template=None))


def test_chat_template_errors():
    prompt = chat("{question}")
    for name, message in [("enable_thinking", "is not used by the model's chat"), ("tokenize", "is set by pgrpo")]:
        prompt.chat_template_kwargs = {name: True}
        with pytest.raises(ConfigError, match=rf"prompt\.chat_template_kwargs: `{name}` {message}"):
            load(prompt=prompt)
    with pytest.raises(ConfigError, match=r"prompt\.messages: .* rejects the messages: no users"):
        load(prompt=chat("{question}"), tokenizer=make_tokenizer("{{ raise_exception('no users') }}"))


def test_exactly_one_kind_of_prompt():
    for prompt in (PromptConfig(), PromptConfig(template="a", messages_column="b")):
        with pytest.raises(ConfigError, match=r"exactly one of prompt\.template, prompt\.messages, prompt\.messages_c"):
            load(prompt=prompt)


# Lengths


def test_overlong_prompts():
    rows = [{"q": "a" * n} for n in (3, 6, 4, 9)]  # one more token each: bos
    with pytest.raises(
        ConfigError, match=r"row 1 of dataset: .* 7 tokens, data\.max_prompt_tokens is 5.*data\.overlong"
    ):
        load(rows, raw("{q}"), max_prompt_tokens=5)
    kept = load(rows, raw("{q}"), max_prompt_tokens=5, overlong="drop")
    assert ([p.index for p in kept.prompts], kept.dropped, kept.truncated) == ([0, 2], 2, 0)
    with pytest.raises(ConfigError, match=r"dropped all 4 rows of dataset: every prompt is longer"):
        load(rows, raw("{q}"), max_prompt_tokens=2, overlong="drop")
    cut = load([{"q": "abcdefg"}, {"q": "xyz"}], raw("{q}"), max_prompt_tokens=4, overlong="truncate")
    assert ([p.token_ids for p in cut.prompts], cut.dropped, cut.truncated) == (
        [codes("defg"), [1, *codes("xyz")]],
        0,
        1,
    )
    assert cut.prompts[0].text.replace(" ", "") == "defg"
