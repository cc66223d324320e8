"""The command line: what can be typed, and what a process exits with. The work is in ``train`` and ``commands``.

Exit codes: 0 done, 1 the run failed, 2 the input is wrong, 130 after Ctrl-C, 143 after SIGTERM.
Nothing heavy is imported here: ``pgrpo --help`` answers at once.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import traceback
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Annotated, Literal

import typer

import pgrpo
from pgrpo.config import Config, ConfigError, load_config, redact
from pgrpo.early import check_checkpoint, check_early, check_folder_to_write, check_model_folder, config_of_run
from pgrpo.process.signals import kill_children, tell
from pgrpo.tracking import Terminal

app = typer.Typer(
    help="GRPO that computes each prompt once.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
ConfigOption = Annotated[
    str, typer.Option("--config", "-c", help="YAML file, or the name of one that comes with pgrpo.")
]
AnyConfigOption = Annotated[
    str | None, typer.Option("--config", "-c", help="YAML file, or the name of one that comes with pgrpo.")
]
RunOption = Annotated[Path | None, typer.Option(help="Run folder: its config.yaml, and its newest checkpoint.")]
CheckpointOption = Annotated[
    str | None,
    typer.Option(
        help="`auto` (the newest checkpoint of run_dir), `best` (kept by checkpoint.keep_best), or the folder of a checkpoint, or "
        "of a run (its newest). Default: the model itself, with --run `auto`."
    ),
]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Keys that replace the file's.")]
RunDir = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Run folder (run_dir in its config).")]


def _load(config: str, overrides: list[str] | None) -> Config:
    return load_config(config, overrides or [])


def _load_one(overrides: list[str] | None, **sources: str | Path | None) -> Config:
    """The config of the one source that is given: a YAML, a run folder, or a model's folder or hub name."""
    given = {kind: str(source) for kind, source in sources.items() if source is not None}
    if len(given) != 1:
        raise ConfigError(f"give one of {', '.join(f'--{kind}' for kind in sources)}; {len(given)} were given")
    ((kind, source),) = given.items()
    if kind == "config":
        return load_config(source, overrides or [], trains=False)
    if kind == "run":
        file = config_of_run(Path(source), "--run ")
        return load_config(file, [f"run_dir={json.dumps(source)}", *(overrides or [])], trains=False)
    # A model alone: a prompt is the user's message.
    values = {"model": {"path": source}, "prompt": {"messages": [{"role": "user", "content": "{prompt}"}]}}
    values |= {"run_dir": "none", "train": {"steps": 1}, "data": {"path": "none"}}
    return load_config(values, overrides or [], rewards_from_python=True)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"pgrpo {metadata.version('pgrpo')}")
        raise typer.Exit


@app.callback()
def top(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """GRPO that computes each prompt once."""


@app.command()
def train(
    config: ConfigOption,
    overrides: Overrides = None,
    resume: Annotated[
        str | None,
        typer.Option(
            help="`auto` (the newest checkpoint of run_dir, if there is one), `best` (kept by "
            "checkpoint.keep_best), or the folder of a checkpoint, or of a run (its newest)."
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Remove what an earlier run wrote into run_dir, and begin anew.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved config and the plan, and stop.")
    ] = False,
) -> None:
    """Train. On several GPUs: torchrun --nproc-per-node 8 -m pgrpo train --config ..."""
    resolved = _load(config, overrides)
    if dry_run:
        check_model_folder(resolved)
        check_checkpoint(resolved, "--resume", resume)
        from pgrpo.commands.plan import plan

        plan(resolved)
    else:
        pgrpo.train(resolved, resume=resume, overwrite=overwrite)


@app.command()
def check(config: ConfigOption, overrides: Overrides = None) -> None:
    """Try config, data, template and rewards on a few samples; prove grouped == repeated on this model."""
    check_early(resolved := _load(config, overrides))
    from pgrpo.commands.check import check

    check(resolved)


@app.command("eval")
def evaluate(
    overrides: Overrides = None,
    config: AnyConfigOption = None,
    run: RunOption = None,
    checkpoint: CheckpointOption = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for samples.jsonl and summary.json. Default: eval/step_N in run_dir."),
    ] = None,
) -> None:
    """Pass@1, pass@k and mean rewards on the held-out split, sampled and greedy, with confidence intervals."""
    check_early(resolved := _load_one(overrides, config=config, run=run))
    check_checkpoint(resolved, "--checkpoint", checkpoint)
    from pgrpo.commands.evaluate import evaluate

    evaluate(resolved, checkpoint or ("auto" if run else None), out)


@app.command()
def generate(
    overrides: Overrides = None,
    config: AnyConfigOption = None,
    run: RunOption = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder of a model, such as an export, or a hub name, without a config: rows have a column `prompt`."
        ),
    ] = None,
    checkpoint: CheckpointOption = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Rows for the config's prompt, as data.path reads, or a .txt with a line for its only column. Default: a chat."
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Completions of each prompt.")] = 1,
    rewards: Annotated[bool, typer.Option(help="Score the completions with the config's rewards.")] = True,
    out: Annotated[Path | None, typer.Option(help="JSONL file to write, with a completion a row.")] = None,
) -> None:
    """Print what a model writes: in a chat, or for the prompts of a file, with rewards beside the texts."""
    check_early(resolved := _load_one(overrides, config=config, run=run, model=model), data_from_python=True)
    check_checkpoint(resolved, "--checkpoint", checkpoint)
    if prompts is not None and not prompts.is_file():
        what = "is a folder; give a file of rows" if prompts.is_dir() else "there is no such file; correct the path"
        raise ConfigError(f"--prompts {prompts}: {what}")
    if prompts is None and (out or samples > 1):
        raise ConfigError("--out and --samples go with --prompts FILE; a chat has neither")
    if out is not None and (out.is_dir() or not out.absolute().parent.is_dir()):
        what = f"there is no folder {out.parent}; make it, or give another file"
        raise ConfigError(f"--out {out}: {'is a folder; give a file' if out.is_dir() else what}")
    if out is not None:
        check_folder_to_write(out.parent, "--out ")
    from pgrpo.commands.generate import generate

    own = {override.partition("=")[0] for override in overrides or []}
    may_lower = {"data.max_prompt_tokens", "rollout.max_completion_tokens"} - own if model else ()
    generate(
        resolved, checkpoint or ("auto" if run else None), prompts,
        samples=samples, rewards=rewards, out=out, may_lower=may_lower,
    )  # fmt: skip


@app.command()
def bench(
    config: ConfigOption,
    overrides: Overrides = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(
            metavar="P,R,G[,N]",
            help="Prompt and completion tokens, group size, groups. Default: 512,32,8. May be repeated.",
        ),
    ] = None,
    checkpointing: Annotated[
        Literal["none", "matmuls", "attention", "full"],
        typer.Option(help="What the backward of each layer recomputes."),
    ] = "none",
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="Use random weights; needs only the model's config.json.")
    ] = False,
    repeats: Annotated[int, typer.Option(min=1, help="Timed rounds; the median is reported.")] = 5,
) -> None:
    """Time grouped against repeated prompts on this machine."""
    shapes = [_shape(text) for text in shape or ["512,32,8"]]
    from pgrpo.commands.bench import bench
    from pgrpo.commands.bench_report import Shape

    settings = _load(config, overrides)
    bench(
        settings,
        [Shape(*sizes) for sizes in shapes],
        recompute=checkpointing,
        random_weights=random_weights,
        repeats=repeats,
    )


def _shape(text: str) -> list[int]:
    numbers = text.split(",")
    if len(numbers) not in (3, 4) or not all(n.isdecimal() and int(n) > 0 for n in numbers):
        raise ConfigError(
            f"--shape {text}: give prompt tokens, completion tokens, group size and groups, as 512,32,8,1"
        )
    return [int(n) for n in numbers]


@app.command()
def plot(
    run_dirs: Annotated[list[Path], typer.Argument(metavar="RUN_DIR...", help="Run folders.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the plot. Default: the run folder; for several runs the current folder."),
    ] = None,
) -> None:
    """Draw a run: one PNG and one HTML page in its folder. Several runs: one PNG, in this folder."""
    from pgrpo.commands.plot import plot

    plot(run_dirs, out)


@app.command()
def export(
    run_dir: RunDir,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    step: Annotated[int | None, typer.Option(help="Step of the checkpoint. Default: the newest.")] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="Precision of the written weights.")
    ] = "float32",
) -> None:
    """Write a checkpoint as a Hugging Face folder."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("pgrpo export writes from one process: start it without torchrun")
    from pgrpo.commands.export import export

    export(run_dir, out, step, dtype)


@app.command()
def init(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of a config or recipe, such as quickstart.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files of these names.")] = False,
) -> None:
    """Copy a config, its recipe and what that uses, or a recipe alone, to the current folder, to edit."""
    from pgrpo.commands.init import init

    init(name, overwrite)


@app.command()
def doctor() -> None:
    """Versions, GPUs, and which attention kernels can run here, or why not."""
    from pgrpo.commands.doctor import doctor

    doctor()


def main() -> None:
    """Run the command line. The one place that decides what a process exits with."""
    logging.lastResort = Terminal()
    signal.signal(signal.SIGTERM, _stop)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell's background job ignores it
        signal.signal(signal.SIGINT, _stop)
    try:
        app()  # exits by itself with 0, with 2 on a wrong command line, with 130 on Ctrl-C
    except ConfigError as error:
        _fail(2, str(error), lines=True)
    except Exception as error:
        kind = "" if type(error) is RuntimeError else f"{type(error).__name__}: "
        _fail(1, f"{kind}{error}")


def _stop(signum: int, frame: FrameType | None) -> None:
    """Handles signals until training puts its own handler on top, which saves first. It raises an exception, so that whatever is
    open is closed, but not inside of the imports: there nothing is open, and libraries take the exception for a package that is
    missing and go on without it."""
    name = signal.Signals(signum).name
    if _imports(frame):
        try:
            kill_children()
        finally:
            tell(f"pgrpo: {name}: stopped, nothing was begun yet\n")
            os._exit(128 + signum)
    tell(f"pgrpo: {name}: stopping\n")
    if signum == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(128 + signum)


def _imports(frame: FrameType | None) -> bool:
    """Whether this file, or the function of ``pgrpo`` that it calls, is importing the rest of the package."""
    importer = None
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            importer = frame.f_back
        frame = frame.f_back
    return importer is not None and importer.f_globals["__name__"] in (__name__, pgrpo.__name__)


def _fail(code: int, message: str, *, lines: bool = False) -> None:
    if os.environ.get("PGRPO_DEBUG") == "1":
        print(redact(traceback.format_exc()), end="", file=sys.stderr)
    message = redact(message)
    if not lines:
        message = "; ".join(line.strip() for line in message.splitlines() if line.strip())
    hint = " (PGRPO_DEBUG=1 shows where)" if code == 1 else ""
    print(f"pgrpo: {message}{hint}", file=sys.stderr)
    sys.exit(code)
