"""What a process compiles ahead of the run is what vLLM loads when it starts."""

import ast
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import transformers
from test_vllm_engine import make_tokenizer

from pgrpo.process.caches import FOLDERS
from pgrpo.rollout.vllm.whole_files import whole_files

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]
if torch.cuda.is_available():
    pytestmark.append(pytest.mark.gpu)

CODE = """
import os, shutil, sys
from pathlib import Path
from pgrpo.config import load_config
from pgrpo.distributed.world import start
from pgrpo.process.caches import use_caches
from pgrpo.process.second import SecondProcess, ahead_codes
from pgrpo.rollout.vllm import start as vllm_start

folder, caches = sys.argv[1:]
config = load_config("quickstart.yaml", [f"model.path={folder}", f"cache_dir={caches}", "model.dtype=float32",
                     "data.max_prompt_tokens=12", "rollout.max_completion_tokens=12", "rollout.engine=vllm"])
use_caches(config.cache_dir)
vllm_start.package()
from vllm.compilation.counter import compilation_counter as counter
from vllm.model_executor.models import registry
registry._SUBPROCESS_COMMAND = ["no such command"]  # the model's file is imported here
with start() as world:
    sleeps, done = world.device.type == "cuda", Path(caches, "done")
    ahead = SecondProcess("vLLM's model", ahead_codes(caches)[1], "this fails")
    ahead.begin((config, sleeps), done)
    ahead.wait(500)
    print("compiled", done.exists(), len(list(Path(caches, "vllm", "modelinfos").iterdir())))
    shutil.rmtree(Path(caches, "vllm", "modelinfos"))
    config.seed = 7
    vllm_start.prepare(config, world)
    vllm_start.start(config, world, 0.1 if sleeps else 0.05, sleeps=sleeps)
    print("loaded", counter.num_aot_artifacts_loaded)
    sys.stdout.flush()
    os._exit(0)
"""


def test_vllms_list_of_compiled_code_is_moved_in_its_place(tmp_path):
    from vllm.compilation.backends import CompilerManager  # pyright: ignore[reportMissingImports]

    manager = CompilerManager.__new__(CompilerManager)
    manager.cache_file_path, manager.disable_cache = str(tmp_path / "vllm_compile_cache.py"), False
    manager.is_cache_updated, manager.cache = True, {(1, 0, "inductor"): "code"}
    moved: list[str] = []
    with pytest.MonkeyPatch.context() as patch, whole_files():
        replace = os.replace
        patch.setattr(os, "replace", lambda *names: moved.extend(map(str, names)) or replace(*names))
        manager.save_to_file()
    assert moved[1] == manager.cache_file_path and os.listdir(tmp_path) == ["vllm_compile_cache.py"]
    assert ast.literal_eval((tmp_path / "vllm_compile_cache.py").read_text()) == manager.cache


def test_vllm_loads_what_was_compiled_ahead_whatever_its_memory_and_seed(tmp_path):
    sizes: dict[str, Any] = {
        "vocab_size": 64, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 64,
    }  # fmt: skip
    config = transformers.Qwen3Config(**sizes)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    make_tokenizer(tmp_path / "model")
    environment = {name: value for name, value in os.environ.items() if name not in FOLDERS}
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path / "model"), str(tmp_path / "caches")],
        env=environment | {"VLLM_LOGGING_LEVEL": "ERROR"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    said = [line for line in done.stdout.splitlines() if line.startswith(("compiled", "loaded"))]
    on_gpu = torch.cuda.is_available()  # on a CPU vLLM 0.32 finds the file, and cannot load what it wrote there
    assert said == ["compiled True 1", f"loaded {int(on_gpu)}"], done.stderr[-2000:]
    assert len(list(tmp_path.glob("caches/vllm/torch_compile_cache/torch_aot_compile/*"))) == 1, "another key"
