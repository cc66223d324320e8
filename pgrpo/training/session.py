"""A run in its folder, around the algorithm: from the lock of the folder to the last checkpoint.

``open_session`` joins the ranks, locks the run folder, handles signals, builds the parts and resumes from a checkpoint. After each
step ``Session`` evaluates, logs and saves. A signal or a failure abandons the unfinished step and saves the last finished one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from pgrpo.checkpoint import CheckpointError, remove, set_aside_after, tidy
from pgrpo.config import Config, ConfigError, check_world_size, to_yaml
from pgrpo.distributed import world as distributed
from pgrpo.distributed.world import World
from pgrpo.process.caches import disk_full
from pgrpo.process.lock import agree_on_run_dir, check_shared, open_run_dir, record_of, run_folder
from pgrpo.process.rng import rng_state, set_rng_state
from pgrpo.process.signals import stop_signals
from pgrpo.process.stopping import Stopped
from pgrpo.tracking import EarlyWarnings, Trackers, check_services, terminal
from pgrpo.tracking.live import entitle, showing
from pgrpo.tracking.record import replacing
from pgrpo.training.build import Parts, build
from pgrpo.training.caller import Callback, Given, Run
from pgrpo.training.checkpointing import Checkpoints
from pgrpo.training.compile_ahead import CompileAhead
from pgrpo.training.evaluation import evaluate_held_out
from pgrpo.training.messages import closing_summary, out_of_memory, summary
from pgrpo.training.progress import Progress
from pgrpo.training.update import NonFiniteError
from pgrpo.types import Group

log = logging.getLogger(__name__)
WINDOW = 10
"""Number of steps whose mean reward is compared with ``train.target_reward``."""


@contextmanager
def open_session(
    config: Config, given: Given = Given(), resume: str | Path | None = None, overwrite: bool = False
) -> Iterator[Session]:
    """A session that is ready for its next step, and is closed at the end. Arguments and errors as in ``grpo.train``."""
    with (
        distributed.start(config.model.fsdp_size, config.model.sequence_parallel_size) as world,
        showing(console := terminal() if world.is_main and config.track.console else None),
        EarlyWarnings() if world.is_main else nullcontext() as early,
        _held_folder(config, world, resume is not None, overwrite),
        stop_signals(world.stop),
        _built(config, world, given) as parts,
    ):
        progress = Progress()
        folder = run_folder(config)
        checkpoints = Checkpoints(folder / "checkpoints", parts.learner, parts.stream, progress)
        with _written_to_the_end(checkpoints):
            tracker_state = checkpoints.restore(resume)
            if progress.step == 0 and tracker_state is None and config.eval.every:
                progress.unlogged = {}  # evaluate the untrained model
            if overwrite and world.is_main:
                for path in record_of(folder):
                    remove(path)
            if resume and world.is_main:
                for name in ("checkpoints", "eval"):
                    set_aside_after(folder / name, progress.step)
            trackers = nullcontext()
            if world.is_main:
                trackers = closing(
                    Trackers(config, folder, resume=tracker_state, console=console, pictures=parts.reader, early=early)
                )
            with trackers as tracking:
                if tracking:  # write only now that the input and the checkpoint are valid
                    with replacing(folder / "config.yaml") as file:
                        file.write(to_yaml(config))
                    resumed = [checkpoints.resumed] if checkpoints.resumed else []
                    for text in (*resumed, summary(parts, folder), *parts.notes, *parts.engine.notes):
                        tracking.message(text)
                session = Session(parts, progress, checkpoints, tracking, given.callbacks)
                with session.saving_what_is_finished():
                    yield session
                session.say_how_it_ended()


@dataclass
class Session:
    """An open run: its parts, progress and checkpoints, and on rank 0 its trackers."""

    parts: Parts
    progress: Progress
    checkpoints: Checkpoints
    trackers: Trackers | None
    callbacks: Sequence[Callback] = ()

    def __post_init__(self) -> None:
        self._run = Run(self.parts.config, self.run_dir, self.parts.policy, self.parts.world.is_main)
        self._opened, self._first = time.monotonic(), self.progress.step
        self._mark()

    @property
    def run_dir(self) -> Path:
        return run_folder(self.parts.config)

    def goes_on(self) -> bool:
        """Whether there is another step. The first call evaluates an untrained model. Raises ``Stopped`` after a stop signal."""
        if self.progress.unlogged is not None:
            self._evaluate_log_and_save()
        if not self._is_done():
            self._tell(Callback.on_step_begin)
        if self._is_done():
            if self._run.is_stopping:
                self._save_and_tell()
            return False
        self.parts.world.check_stop()
        entitle(f"step {self.progress.step + 1}/{self.parts.config.train.steps}")
        return True

    def finish_step(self, groups: Sequence[Group], metrics: dict[str, float]) -> None:
        """Count and log a finished step, and evaluate and save when due."""
        progress = self.progress
        progress.step += 1
        progress.unlogged = metrics
        progress.recent_rewards = [*progress.recent_rewards, metrics["reward"]][-WINDOW:]
        if self.trackers:
            self.trackers.completions(progress.step, groups)
        self._mark()
        self._tell(Callback.on_step_end, metrics, groups)
        self._evaluate_log_and_save()

    def say_how_it_ended(self) -> None:
        """The last lines of a run that is done."""
        progress, train = self.progress, self.parts.config.train
        if self._run.is_stopping:
            log.warning("a callback stopped the run after step %d of %d, saved", progress.step, train.steps)
        elif progress.step < train.steps:
            text = (
                "train.target_reward=%s reached: mean reward of the last %d steps %.4g; done after step %d of %d, saved"
            )
            mean = sum(progress.recent_rewards) / WINDOW
            log.warning(text, train.target_reward, WINDOW, mean, progress.step, train.steps)
        if self.trackers:
            seconds = time.monotonic() - self._opened
            self.trackers.message(
                closing_summary(self.run_dir, self.parts.config, progress.step, progress.step - self._first, seconds)
            )

    @contextmanager
    def saving_what_is_finished(self) -> Iterator[None]:
        """If a signal or an error ends the block, abandon the unfinished step and save the last finished one."""
        progress, steps = self.progress, self.parts.config.train.steps
        try:
            yield
        except Stopped as stopped:
            self._save_last_finished()
            if self.parts.world.is_main:  # a signal reaches all ranks
                log.warning("stopped after step %d of %d, saved; --resume auto continues", progress.step, steps)
            raise SystemExit(128 + stopped.signum) from None
        except Exception as error:
            self._rescue(error)
            if explained := out_of_memory(error, self.parts, progress) or _no_room(error, self.parts.config):
                raise explained from error
            raise

    def _evaluate_log_and_save(self) -> None:
        parts, progress, done = self.parts, self.progress, self._is_done()
        config, every = parts.config, parts.config.checkpoint.every
        self._mark()
        metrics, best = progress.unlogged or {}, False
        if config.eval.every and (progress.step % config.eval.every == 0 or done):
            evaluated = evaluate_held_out(
                config, parts.world, parts.episodes, parts.rewards, parts.held_out, progress.step, pictures=parts.reader
            )
            metrics = metrics | evaluated
            best = progress.is_best(config.checkpoint.keep_best, metrics)
            self._tell(Callback.on_evaluate, evaluated)
        if self.trackers:
            self.trackers.log(progress.step, metrics)
        progress.unlogged = None
        self._mark()
        if best or self._is_done() or (every and progress.step and progress.step % every == 0):
            self._save_and_tell()
        elif progress.step and every:
            self.checkpoints.reserve()
        if parts.world.any(self.checkpoints.failed):
            self.checkpoints.wait()

    def _tell(
        self,
        event: Callable[..., None],
        metrics: Mapping[str, float] | None = None,
        groups: Sequence[Group] | None = None,
    ) -> None:
        """Tell callbacks of an event, which is a method of ``Callback``; all ranks agree on whether one stops the run."""
        run = self._run
        run.step, run.metrics = self.progress.step, metrics or {}
        run.groups = run.groups if groups is None else groups
        for callback in self.callbacks:
            getattr(callback, event.__name__)(run)
        if self.callbacks:
            run.is_stopping = self.parts.world.any(run.is_stopping)

    def _is_done(self) -> bool:
        """Whether the last step is done, ``train.target_reward`` reached (all ranks have the same rewards), or a callback stops."""
        if self._run.is_stopping:
            return True
        train, recent = self.parts.config.train, self.progress.recent_rewards
        if train.target_reward is not None and len(recent) == WINDOW and sum(recent) / WINDOW >= train.target_reward:
            return True
        return self.progress.step >= train.steps

    def _save(self) -> bool:
        return self.checkpoints.save(self.trackers.state_dict() if self.trackers else {})

    def _save_and_tell(self) -> None:
        if self._save():
            self._tell(Callback.on_save)

    def _mark(self) -> None:
        """Remember the state after a finished step or evaluation, for ``_save_last_finished``."""
        self._marked = self.parts.stream.state_dict(), rng_state()
        self.progress.has_moved = False

    def _save_last_finished(self) -> None:
        """Go back to the last ``_mark``, from an evaluation or a step that has not changed weights, save, and wait for the save."""
        stream, generators = self._marked
        self.parts.stream.load_state_dict(stream)
        set_rng_state(generators)
        self.parts.learner.optimizer.zero_grad()
        self._save()
        self.checkpoints.wait()

    def _rescue(self, error: Exception) -> None:
        """Save the last finished step after an error in the next one, unless that has changed weights or other ranks do not know of
        the error."""
        progress = self.progress
        known = self.parts.world.size == 1 or isinstance(error, NonFiniteError) or distributed.all_ranks_know(error)
        if not known or not progress.step or progress.has_moved or isinstance(error, CheckpointError):
            return
        try:
            self._save_last_finished()
        except Exception as another:  # the caller raises the first error
            log.error("step %d could not be saved: %s", progress.step, another)
        else:
            steps = self.parts.config.train.steps
            if self.parts.world.is_main:
                log.warning("failed after step %d of %d, saved; --resume auto continues", progress.step, steps)


@contextmanager
def _written_to_the_end(checkpoints: Checkpoints) -> Iterator[None]:
    """Wait for the last checkpoint at the end of the block. If another error ends the block, a failed write is only logged."""
    try:
        yield
    except BaseException:
        try:
            checkpoints.wait()
        except CheckpointError as error:
            log.error("the last checkpoint was not written: %s", error)
        raise
    checkpoints.wait()


def _built(config: Config, world: World, given: Given) -> Parts:
    """Build the parts. A stop signal ends this at once, as there is nothing to save yet."""
    try:
        with world.stop.breaking_off(), CompileAhead(config, world) as ahead:
            world.together(lambda: check_services(config) if world.is_main else None)
            return build(config, world, given, ahead)
    except Stopped as stopped:
        raise SystemExit(128 + stopped.signum) from None
    except Exception as error:
        if explained := _no_room(error, config):
            raise explained from error
        raise


def _no_room(error: Exception, config: Config) -> RuntimeError | None:
    """Explains an error of packages that keep compiled code; others of pgrpo say for themselves where there is no room."""
    return None if isinstance(error, (CheckpointError, ConfigError)) else disk_full(error, config.cache_dir)


@contextmanager
def _held_folder(config: Config, world: World, resume: bool, overwrite: bool) -> Iterator[None]:
    """Rank 0 locks the run folder; all ranks check that they see it."""
    check_world_size(config, world.size)
    agree_on_run_dir(config, world.from_main)
    with ExitStack() as stack:
        folder = run_folder(config)
        world.together(lambda: stack.enter_context(open_run_dir(folder, resume, overwrite)) if world.is_main else None)
        world.together(lambda: check_shared(folder))
        world.together(lambda: tidy(folder / "checkpoints") if world.is_main else None)
        yield
