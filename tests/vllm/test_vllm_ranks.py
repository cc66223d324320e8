"""Whole runs of two and four ranks with vLLM: an engine a rank, or one engine that two share."""

import json
from collections import Counter

import pytest
import torch
import transformers
from making import save_caller

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]
if torch.cuda.is_available():
    pytestmark += [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")]
    DTYPE, TOLERANCE, EAGER = "bfloat16", 0.1, False
else:
    DTYPE, TOLERANCE, EAGER = "float32", 1e-3, True


@pytest.fixture(scope="module")
def model(tiny_model, tmp_path_factory):
    """The quick start's tokenizer before a model whose heads are as large as vLLM wants them."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=128, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, initializer_range=0.1, tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    (folder / "own.py").write_text(
        "def spread(completion_ids, **_):\n    return [float(ids[0] % 7) for ids in completion_ids]\n"
    )
    return folder


@pytest.mark.parametrize(
    ("ranks", "tensor_parallel_size", "fsdp_size", "together"),
    [(2, 1, "null", 1), (2, 2, "null", 1), (2, 1, 1, 1), (4, 2, 2, 1), (2, 1, "null", 2)],
)
def test_several_ranks(launch, model, tmp_path, monkeypatch, ranks, tensor_parallel_size, fsdp_size, together):
    """Ranks that compute a batch together share an engine. The engines have the policy's weights in every step: log-probs agree,
    and the canary's slope is that of the new weights."""
    if torch.cuda.is_available() and torch.cuda.device_count() < ranks:
        pytest.skip(f"there are fewer than {ranks} GPUs")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    keys = [
        f"model.path={model}",
        f"model.dtype={DTYPE}",
        f"model.fsdp_size={fsdp_size}",
        f"model.sequence_parallel_size={together}",
        f"run_dir={tmp_path / 'run'}",
    ]
    keys += ["train.steps=3", "rollout.prompts_per_step=4", "rollout.group_size=8", "optim.lr=1e-3", "eval.every=0"]
    keys += ["rollout.engine=vllm", "rollout.canary_every=1", "track.console=false", "track.completions=32"]
    keys += [
        f"rollout.enforce_eager={EAGER}",
        "model.compile=false",
        f"rollout.tensor_parallel_size={tensor_parallel_size}",
        f"rewards.functions=[{{function: {model}/own.py:spread}}]",
    ]
    done = launch(["-m", "pgrpo", "train", "--config", "quickstart", *keys], ranks)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    lines = (tmp_path / "run" / "completions.jsonl").read_text().splitlines()
    for step in (1, 2, 3):  # ranks that share an engine sample each its own prompts
        prompts = Counter(row["prompt"] for row in map(json.loads, lines) if row["step"] == step)
        assert len(prompts) == 4 and set(prompts.values()) == {8}
    for row in rows:
        assert row["sampling/sampling_logp_difference/max"] < TOLERANCE
    for row in rows[1:]:
        print({key: row[key] for key in ("canary/slope", "canary/slope_error", "canary/logp_difference")})
        assert row["canary/logp_difference"] < TOLERANCE
        assert abs(row["canary/slope"]) < 0.3


OWN_TOOL = """
import random, time

def f(n: int) -> str:
    '''Say the next number.

    Args:
        n: A number.
    '''
    time.sleep(random.choice([0, 0.01, 0.1, 0.5]))
    return str(n + 1)


def spread(completion_ids, **_):
    return [random.random() for _ in completion_ids]
"""


def test_ranks_that_share_an_engine_and_have_tools_of_random_duration(launch, tmp_path, monkeypatch):
    """Each rank calls the tools of its own episodes, and its turns join when their results are there: the engine's halves must
    still see the same requests before each step. If not, they would compute different batches: log-probs would be wrong."""
    if torch.cuda.is_available() and torch.cuda.device_count() < 2:
        pytest.skip("there are fewer than 2 GPUs")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    save_caller(tmp_path / "model", hidden_size=128, head_dim=64, kv_heads=2)
    (tmp_path / "own.py").write_text(OWN_TOOL)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"row": i}) + "\n" for i in range(12)))
    config = {
        "run_dir": str(tmp_path / "run"),
        "model": {"path": str(tmp_path / "model"), "dtype": DTYPE, "compile": False},
        "prompt": {"messages": [{"role": "user", "content": "{row}"}]},
        "data": {"path": str(tmp_path / "rows.jsonl"), "max_prompt_tokens": 20},
        "tools": [f"{tmp_path}/own.py:f"],
        "environment": {"max_turns": 4, "max_episode_tokens": 120},
        "rollout": {
            "prompts_per_step": 4, "group_size": 4, "max_completion_tokens": 14, "engine": "vllm", "tensor_parallel_size": 2,
            "enforce_eager": EAGER, "canary_every": 1,
        },
        "rewards": {"functions": [{"function": f"{tmp_path}/own.py:spread"}]},
        "optim": {"lr": 1e-3},
        "train": {"steps": 3, "token_budget": 1000},
        "track": {"console": False, "completions": 16},
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    done = launch(["-m", "pgrpo", "train", "--config", tmp_path / "config.yaml"], 2)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    lines = [json.loads(line) for line in (tmp_path / "run" / "completions.jsonl").read_text().splitlines()]
    for row in rows:
        assert row["sampling/sampling_logp_difference/max"] < TOLERANCE
        assert row["episodes/turns/mean"] > 2 and row["tools/f/call_frequency"] > 1
        prompts = Counter(line["prompt"] for line in lines if line["step"] == row["step"])
        assert len(prompts) == 4 and set(prompts.values()) == {4}
