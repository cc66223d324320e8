"""Tokens a second of multi-turn rollouts with a tool that takes time, and with one that does not.

Each episode has four turns of the same length: the end token ends none, and every turn is read as a call of the tool, whatever
the model wrote. Prints one JSON line a wait.

    python benchmarks/tools_rollout.py --model PATH [--episodes 512] [--turn 128] [--slots 256] [--waits 0 0.5 0]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from dataclasses import replace
from functools import partial
from typing import Any

from pgrpo.config import load_config
from pgrpo.config.sampling import sampling_params
from pgrpo.distributed.world import start
from pgrpo.environments.chat import Chat
from pgrpo.environments.episodes import ToolLoop
from pgrpo.environments.parsing import Call, Reply
from pgrpo.environments.tools import tool_of
from pgrpo.rollout.base import sample_seeds
from pgrpo.rollout.embedded.engine import EmbeddedEngine
from pgrpo.rollout.vllm import start as vllm_start
from pgrpo.training.build import build
from pgrpo.training.caller import Given

TEMPLATE = """\
{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>{"name": "{{ c.function.name }}", "arguments": \
{{ c.function.arguments|tojson }}}</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
SECONDS = 0.0


async def wait(number: int = 0) -> str:
    """Wait.

    Args:
        number: Not used.
    """
    await asyncio.sleep(SECONDS)
    return "done"


def end_no_turn(engine: Any) -> None:
    """Let the engine sample on behind an end token."""
    engine.eos_token_ids = []
    if not isinstance(engine, EmbeddedEngine):
        package = vllm_start.package()
        package.SamplingParams = partial(package.SamplingParams, ignore_eos=True)


def main() -> None:
    global SECONDS
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--episodes", type=int, default=512)
    parser.add_argument("--turn", type=int, default=128, help="tokens of a turn")
    parser.add_argument("--slots", type=int, default=256, help="rollout.max_concurrent")
    parser.add_argument("--waits", type=float, nargs="+", default=[0.0, 0.5, 0.0], help="seconds of a call")
    parser.add_argument("--key", action="append", default=[], help="further key=value")
    args = parser.parse_args()
    config = load_config(
        {
            "run_dir": "runs/tools_rollout",
            "model": {"path": args.model},
            "data": {"max_prompt_tokens": 128},
            "prompt": {
                "messages": [{"role": "user", "content": "Count to {n}."}],
                "chat_template_kwargs": {"chat_template": TEMPLATE},
            },
            "environment": {"max_turns": 4, "max_episode_tokens": 5 * args.turn + 200},
            "rollout": {
                "prompts_per_step": args.episodes // 8, "group_size": 8, "max_completion_tokens": args.turn,
                "max_concurrent": args.slots,
            },
            "train": {"steps": 1},
        },
        args.key,
        rewards_from_python=True, data_from_python=True, tools_from_python=True,
    )  # fmt: skip
    rows = [{"n": i} for i in range(args.episodes // 8)]
    given = Given(rewards=[lambda completions: [0.0] * len(completions)], dataset=rows, tools=[wait])
    with start() as world, build(config, world, given) as parts:
        loop: Any = parts.episodes
        assert isinstance(loop, ToolLoop)
        tool = tool_of(wait, "tools[0]")
        Chat.parse = lambda *_: Reply("", "", [Call(tool.name)])  # pyright: ignore
        prompts = parts.stream.take(len(rows))
        # A turn that the limit cuts ends its episode: take the limit's token for the end of the turn.
        engine_sample = loop.engine.sample

        def sample(requests, params, on_finished, more):
            def finished(position, completions):
                on_finished(position, [replace(completion, finish_reason="stop") for completion in completions])

            engine_sample(requests, params, finished, more)

        loop.engine.sample = sample  # pyright: ignore[reportAttributeAccessIssue]
        end_no_turn(parts.engine)
        with parts.engine.awake(0):
            for seconds in args.waits:
                SECONDS = seconds
                seeds = [sample_seeds(0, i, group_size=8) for i in range(len(prompts))]
                began = time.perf_counter()
                groups = loop.generate(prompts, sampling_params(config), seeds, len(prompts), lambda *_: None)
                loop.check(groups)
                took = time.perf_counter() - began
                episodes = [episode for group in groups for episode in group.episodes]
                sampled = sum(episode.sampled_tokens for episode in episodes)
                turns = sum(episode.counts["turns"] for episode in episodes) / len(episodes)
                print(
                    json.dumps(
                        {
                            "wait_s": seconds, "episodes": len(episodes), "turns": turns, "sampled_tokens": sampled,
                            "seconds": round(took, 2), "tokens_per_s": round(sampled / took),
                        }
                    ),
                    flush=True,
                )  # fmt: skip
                loop.release(groups)


if __name__ == "__main__":
    main()
