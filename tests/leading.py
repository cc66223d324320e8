"""A run of an environment that leads the conversation, from a config: its class lives in worker processes, histories are rewritten
and branch, turns have values."""

from __future__ import annotations

import json
from pathlib import Path

from making import CALLER_TEMPLATE, save_caller

OWN = """
class Led:
    def reset(self, row, **_):
        self.said = []

    async def converse(self, conversation):
        self.said.append(await conversation.generate())
        conversation.say("abc")
        other = await conversation.fork()
        self.said.append(await conversation.generate())
        self.said.append(await other.generate())

    def get_turn_rewards(self):
        return [float(len(said.content)) for said in self.said]
"""


def save_led(folder: Path, **environment: object) -> Path:
    """Write a model, the class, rows and a config of three steps. Returns the config's path."""
    save_caller(folder / "model")
    (folder / "own.py").write_text(OWN)
    (folder / "rows.jsonl").write_text("".join(json.dumps({"row": i}) + "\n" for i in range(12)))
    template = CALLER_TEMPLATE.replace("{{ m.content }}", "{{ m.content }}{% if not loop.last %}-{% endif %}")
    config = {
        "run_dir": str(folder / "run"),
        "model": {"path": str(folder / "model"), "dtype": "float32", "lora_rank": 4},
        "prompt": {
            "messages": [{"role": "user", "content": "{row}"}],
            "chat_template_kwargs": {"chat_template": template},
        },
        "data": {"path": str(folder / "rows.jsonl"), "eval_path": str(folder / "rows.jsonl"), "max_prompt_tokens": 20},
        "environment": {"factory": f"{folder}/own.py:Led", "max_turns": 5, "max_episode_tokens": 120, **environment},
        "rollout": {"prompts_per_step": 2, "group_size": 3, "max_completion_tokens": 14},
        "loss": {"turn_advantages": "returns_to_go", "turn_discount": 0.9},
        "optim": {"lr": 1e-2},
        "train": {"steps": 3, "token_budget": 1000},
        "eval": {"every": 3, "rows": 2, "samples": 2},
        "checkpoint": {"every": 1, "keep": 9},
        "track": {"console": False, "completions": 6},
    }
    path = folder / "led.yaml"
    path.write_text(json.dumps(config))
    return path
