"""vLLM's files of models with images need torchvision, whose builds for a CPU do not load beside the locked PyTorch. Where it is
missing, a stand-in is put on the path before transformers looks for it, here and for the processes that vLLM starts."""

import importlib.util
import os
import sys
from pathlib import Path

STAND_INS = str(Path(__file__).resolve().parents[1] / "stand_ins")
if importlib.util.find_spec("vllm") is not None and importlib.util.find_spec("torchvision") is None:
    sys.path.append(STAND_INS)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), STAND_INS]))
