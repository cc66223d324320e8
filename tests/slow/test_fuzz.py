"""500 damaged configs, recipes and overrides: each is refused with exit code 2 and one clear line, or is a valid dry run."""

from __future__ import annotations

import contextlib
import io
import re
import shutil
import signal
import sys
from collections import Counter
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path

import huggingface_hub.constants
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pgrpo import cli
from pgrpo.config import Config, load_config
from pgrpo.config.source import hints, valid_keys

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
CHATTY = [c for c in CONFIGS if "chat_template_kwargs" in c.read_text()]  # at odds with a recipe that has a raw prompt
RAW = [r for r in RECIPES if "\n  template:" in r.read_text()]
TOOLED = [c for c in CONFIGS if "\nenvironment:" in c.read_text()]  # has keys without effect for a recipe without tools
CALLING = [r for r in RECIPES if "\ntools:" in r.read_text()]
PAIRS = [
    (config, recipe)
    for config in CONFIGS
    for recipe in RECIPES
    if not (config in CHATTY and recipe in RAW) and (config not in TOOLED or recipe in CALLING)
]
EXAMPLES = 500

SCALARS = [
    "no", "yes", "on", "off", "y", "true", "False", "null", "~", "010", "0o17", "0123456", "0x1F", "0b11", "1_000",
    "+5", "-0", "12:30:45", "1:2", "2024-01-01", "2024-01-01T12:00:00Z", "1e-6", "1e6", "1E400", "1e-400", "-1", "0",
    "1", "2", "3", "7", "17", "0.5", "1.0", ".5", "5.", "-0.5", ".nan", ".NaN", ".inf", "-.inf", "nan", "inf",
    "1000000", "2147483648", "9223372036854775808", "99999999999999999999999999", "1" + "0" * 400, "9" * 5000,
    "0." + "1" * 400, "''", '""', '" "', '"8"', "'1.0'", "text", "two words", "x" * 100_000, "größe", "数", "🙂",
    "\u202eevil", "\u2028", "\x1b[31m", "\x00", "\x07", "\x85", '"\\ud800"', '"\\x00"', '"\\n"', '"\\u202e"', "a: b",
    "a:b", "a #b", "#", "@x", "`x`", "%x", "%", "!", "&a 1", "*a", "&a", "!!python/object:x.Y {}",
    '!!python/object/apply:os.system ["true"]', "!!python/name:os.system", "!!int 3", "!!str 3", "!!float 1",
    "!!binary aGk=", "!!set {a}", "!own 3", "[]", "{}", "[1, 2]", "[1]", "[a, b]", "[null]", "[[1]]", "[0.9, 0.99]",
    "[0.9, 1.0]", "[0.9]", "{a: 1}", "{a: 1, a: 2}", "{1: 2}", "{null: 1}", "{[a]: 1}", "{a: {b: {c: 1}}}",
    "[{function: exact_match}]", "[{function: nope}]", "[{}]", "[x", "{x", "]", "}", "'open", '"open', "|", ">",
    "- a", "? a", "<<: {a: 1}", "${train.steps}", "${seed}", "${nope}", "${a.b.c}", "${", "$", "${}",
    "${oc.env:PGRPO_FUZZ_NONE}", "${oc.env:PGRPO_FUZZ_NONE,8}", "${oc.env:PATH}", "${now:%Y}", "${nope:1}", "\\${x}",
    "???", "[" * 2000, "{" * 500, "{a: " * 300 + "1" + "}" * 300, "../../x", "/", "~/x", "~nobody/x", "nope.py:f",
    "pgrpo:nope", "a" * 300, "grpo", "gspo", "dapo", "vllm", "cpu", "linear", "cosine", "k1", "token_mask",
    "sequence", "batch", "full", "drop", "repeated", "mask", "float32", "bfloat16", "flash4", "(redacted)",
    "{question}", "{", "}}", "{nope}", "{0}", "{a.b}", "{a!r:>9}",
]  # fmt: skip
LINES = [
    "\tseed: 1", "seed:\t1", "seed: 1\nseed: 1", "---", "--- \nseed: 2", "...", "%YAML 9.9", "%TAG ! x", "nonsense",
    "- item", ":", "? \n: 1", "1: 2", "null: 1", "[a]: 1", "{}: 1", "? [a, b]\n: 1", "<<: *a", "<<: {seed: 1}",
    "base: &a {x: 1}", "  x: 1", "train: 5", "train:", "model: []", "rewards: {functions: {}}",
    "rewards: {functions: [exact_match]}", "prompt: x", "num_generations: 8", "learning_rate: 1e-6",
    "trainer.n_gpus: 8", "train.steps: 5", "secret_keys: [a]", "run_dir: null", "\ufeffseed: 1",
    "!!python/object:x.Y {}", "recipe: addition", "recipe: nope", "recipe: [addition]", "recipe: ../recipes",
    "eval: {every: 5}", "loss: {preset: gspo}", "loss: {kl_estimator: k1}", "loss: {ref_refresh_every: 5}",
    "model: {lora_rank: 8}", "optim: {schedule: linear, warmup_steps: 10000000}",
    "checkpoint: {keep_best: eval/reward}", "train: {updates_per_step: 7}", "rollout: {prompts_per_step: 7}",
    "rollout: {group_size: 1}",
]  # fmt: skip
BYTES = [
    b"\xff\xfe", b"\x00", b"\xef\xbb\xbf", b"\r\n", b"\r", b"\x80", b"\t", b"\xed\xa0\x80", b"#", b"\\", b"'", b'"',
    b"{", b"\xc2\x85",
]  # fmt: skip
DAMAGE = ["number"] * 6 + ["value"] * 3 + ["drop"] * 2
DAMAGE += ["rename", "duplicate", "indent", "line", "bytes", "cut", "nest", "add"]
SECTIONS = sorted({key.partition(".")[0] for key in valid_keys()})
KEYS = [key.replace("[i]", "[0]") for key in valid_keys()]

LEAVES = [
    (f"{section}.{name}", getattr(getattr(Config(), section), name), hint)
    for section in SECTIONS
    if is_dataclass(getattr(Config(), section))
    for name, hint in hints(type(getattr(Config(), section))).items()
]


@dataclass
class Case:
    """A config, its recipe, as bytes, and what is typed behind them."""

    config: bytes
    recipe: bytes
    overrides: list[str]
    kinds: list[str] = field(default_factory=list)


def _values(draw) -> str:
    return draw(st.sampled_from(SCALARS) | st.integers().map(str) | st.floats().map(repr) | st.text(max_size=8))


def _scaled(draw, number: str) -> str:
    """A number of the same type, mostly."""
    factor = draw(st.sampled_from([1, 2, 10, 0.5, 3, 1000, 0, -1]))
    return repr(float(number) * factor) if re.search(r"[.e]", number) else f"{int(number) * factor:g}"


def _typo(draw, key: str) -> str:
    i = draw(st.integers(0, len(key)))
    less, more = key[:i] + key[i + 1 :], f"{key[:i]}x{key[i:]}"
    return draw(st.sampled_from([less, more, key.upper(), f"{key}s", f" {key}", f"x.{key}", f"_{key}"]))


def _damage(draw, text: str) -> tuple[str, bytes]:
    """One mutation of a YAML text: its kind and the bytes."""
    lines = text.splitlines()
    keyed = [i for i, line in enumerate(lines) if re.match(r"\s*(- )?\w+:", line)]
    kind = draw(st.sampled_from(DAMAGE))
    i = draw(st.sampled_from(keyed))
    head, colon, _ = lines[i].partition(":")
    if kind == "value":
        lines[i] = f"{head}: {_values(draw)}"
    elif kind == "number":
        numbers = [j for j in keyed if re.search(r": [\d.e-]+( |$)", lines[j])]
        if numbers:
            i = draw(st.sampled_from(numbers))
            lines[i] = re.sub(r": ([\d.e-]+)", lambda m: f": {_scaled(draw, m[1])}", lines[i], count=1)
    elif kind == "drop":
        del lines[i]
    elif kind == "rename":
        start = re.match(r"[\s-]*", head)
        assert start
        lines[i] = start[0] + _typo(draw, head[start.end() :]) + lines[i][len(head) :]
    elif kind == "duplicate":
        lines.insert(draw(st.integers(0, len(lines))), lines[i])
    elif kind == "indent":
        lines[i] = draw(st.sampled_from(["\t", " ", "  ", "    ", "- ", ""])) + lines[i].lstrip()
    elif kind == "line":
        lines.insert(draw(st.integers(0, len(lines))), draw(st.sampled_from(LINES)))
    elif kind == "nest":
        lines[i : i + 1] = [head + colon, " " * (len(head) + 2) + lines[i].strip("- ")]
    elif kind == "add":
        section, _, name = draw(st.sampled_from([key for key in KEYS if "." in key])).partition(".")
        if f"{section}:" not in lines:
            lines.append(f"{section}:")
        lines.insert(lines.index(f"{section}:") + 1, f"  {name}: {_values(draw)}")
    data = "\n".join(lines).encode("utf-8", "surrogatepass") + b"\n"
    if kind == "bytes":
        at = draw(st.integers(0, len(data)))
        data = data[:at] + draw(st.sampled_from(BYTES) | st.binary(min_size=1, max_size=3)) + data[at:]
    elif kind == "cut":
        data = data[: draw(st.integers(0, len(data)))]
    return kind, data


def _plausible(draw) -> str:
    """An override of the right type, which may be at odds with other keys."""
    key, default, hint = draw(st.sampled_from(LEAVES))
    if isinstance(default, bool):
        value = str(draw(st.booleans())).lower()
    elif isinstance(default, int | float):
        value = _scaled(draw, repr(default or type(default)(1)))
    elif choices := re.findall(r"'(\w+)'", str(hint)):
        value = draw(st.sampled_from(choices))
    else:
        value = draw(st.sampled_from(["null", "text", "[a]", "8", "1.0", "eval/reward"]))
    return f"{key}={value}"


def _override(draw) -> str:
    if draw(st.integers(0, 2)):
        return _plausible(draw)
    key = draw(st.sampled_from(KEYS + SECTIONS))
    if draw(st.integers(0, 3)) == 0:
        key = draw(
            st.sampled_from(
                [_typo(draw, key), f"{key}[0]", f"{key}[99]", f"{key}.x", f"{key}[-1]", f"{key}.", "", f"+{key}"]
            )
        )
    equals = draw(st.sampled_from(["="] * 8 + ["", " = ", ":", "=="]))
    return (key + equals + _values(draw)).lstrip("-")  # with a hyphen in front it would be an option


@st.composite
def cases(draw) -> Case:
    """A shipped config with a shipped recipe, and one to three mutations."""
    config, recipe = draw(st.sampled_from(PAIRS))
    texts = {"config": whole(config), "recipe": recipe.read_text()}
    case = Case(texts["config"].encode(), texts["recipe"].encode(), [])
    for where in draw(st.lists(st.sampled_from(["config", "recipe", "override"]), min_size=1, max_size=3)):
        if where == "override":
            case.overrides.append(_override(draw))
            case.kinds.append("override")
        elif not any(kind.startswith(where) for kind in case.kinds):
            kind, data = _damage(draw, texts[where])
            setattr(case, where, data)
            case.kinds.append(f"{where} {kind}")
    return case


def whole(config: Path) -> str:
    """The config with the recipe beside it, a model that is there, and sizes that every recipe bears."""
    text = re.sub(r"(?m)^recipe: \S+", "recipe: recipe.yaml", config.read_text())
    text = re.sub(r"(?m)^  path: \S+", f"  path: {ROOT / 'benchmarks' / 'qwen3_4b'}", text)
    return re.sub(r"(?m)^  token_budget: .*\n", "", text)


def dry_run(folder: Path, case: Case) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of ``pgrpo train --dry-run``, in this process."""
    (folder / "config.yaml").write_bytes(case.config)
    (folder / "recipe.yaml").write_bytes(case.recipe)
    out, err = io.StringIO(), io.StringIO()
    argv = sys.argv
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    sys.argv = ["pgrpo", "train", "--config", str(folder / "config.yaml"), "--dry-run", *case.overrides]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
            cli.main()
    finally:
        sys.argv = argv
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
    return ended.value.code or 0, out.getvalue(), err.getvalue()  # pyright: ignore[reportReturnType]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for file in (ROOT / "recipes").glob("*.py"):
        shutil.copy(file, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path


@pytest.mark.parametrize(("config", "recipe"), PAIRS, ids=lambda path: path.stem)
def test_undamaged(folder, config, recipe):
    """What is damaged below is a valid dry run before."""
    code, out, err = dry_run(folder, Case(whole(config).encode(), recipe.read_bytes(), []))
    assert code == 0, err
    assert "packed tokens a step" in out


def judge(folder, case, code, out, err):
    """A plan, or one clear line that says where; several only for keys of another trainer, each as clear."""
    assert code in (0, 2), (code, err)
    assert "Traceback" not in out + err
    if code == 0:
        assert "packed tokens a step" in out
        (folder / "again.yaml").write_text(out[: out.rindex("\nmodel  ")])
        load_config(folder / "again.yaml")  # what is shown can be used
    else:
        assert out == ""
        assert err.startswith("pgrpo: ") and err.endswith("\n"), err
        head, *faults = err[7:-1].split("\n")
        if faults:  # a line for each key of another trainer
            assert head == f"{len(faults)} keys are not pgrpo's:", err
        for fault in [fault.removeprefix("  ") for fault in faults] or [head]:
            assert re.fullmatch(r"\S.{9,1199}", fault), err
            assert fault.isprintable(), err
            assert any(name in fault for name in [*KEYS, *SECTIONS, "override", "config.yaml", "recipe.yaml"]), err
            assert re.search(r"[;:,] ", fault), err


def test_fuzz(folder):
    outcomes: Counter[tuple[str, str]] = Counter()

    health = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]

    @settings(max_examples=EXAMPLES, derandomize=True, database=None, deadline=None, suppress_health_check=health)
    @given(cases())
    def fuzz(case):
        code, out, err = dry_run(folder, case)
        judge(folder, case, code, out, err)
        for kind in case.kinds:
            outcomes[kind, "valid" if code == 0 else "refused"] += 1
        outcomes["all", "valid" if code == 0 else "refused"] += 1

    fuzz()
    print(
        f"\n{outcomes['all', 'refused']} refused, {outcomes['all', 'valid']} valid; with each kind of damage (refused, valid):"
    )
    for kind in sorted({kind for kind, _ in outcomes} - {"all"}):
        print(f"  {kind:18} {outcomes[kind, 'refused']:4} {outcomes[kind, 'valid']:4}")
    assert outcomes["all", "refused"] + outcomes["all", "valid"] >= EXAMPLES
    assert min(outcomes["all", "refused"], outcomes["all", "valid"]) >= EXAMPLES // 10  # neither is rare
