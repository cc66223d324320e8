"""Prove every causal language model of the installed transformers, and write the table in docs/models.md. Takes three minutes.

    python scripts/models_table.py                 # writes the table
    python scripts/models_table.py --judge         # also proves each exact one again, with other sizes, weights and longer samples
    python scripts/models_table.py llama gemma2    # makes these rows again

A type is proven on the defaults of its config class, or where these do not make a model on a published config
(tests/published_models.yaml), whose models are all proven as well. Lengths (windows, chunks) are taken as reached.
"""

from __future__ import annotations

import argparse
import re
import textwrap
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from pgrpo.admission.proof import Proof, prove
from pgrpo.admission.shrink import Small
from pgrpo.planning.dims import ModelDims

ROOT = Path(__file__).resolve().parents[1]
DOCS, PUBLISHED = ROOT / "docs" / "models.md", ROOT / "tests" / "published_models.yaml"
BEGIN, END = "<!-- table: scripts/models_table.py -->\n", "<!-- end of table -->\n"
OTHER = Small(
    heads=8, head_dim=32, value_dim=24, width=96, expert_width=24, experts=6, rank=24, vocab=97, reached=9, positions=21
)
"""Sizes of the second judge."""
NOT_DECODERS = {
    "bart", "bert", "bert-generation", "big_bird", "bigbird_pegasus", "blenderbot", "blenderbot-small", "camembert", "cpmant",
    "ctrl", "data2vec-text", "electra", "ernie", "fuyu", "git", "marian", "mbart", "megatron-bert", "modernbert-decoder", "moshi",
    "musicgen", "musicgen_melody", "mvp", "nllb-moe", "openai-gpt", "pegasus", "plbart", "prophetnet", "reformer", "rembert",
    "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "speech_to_text_2", "trocr", "whisper", "xlm", "xlm-prophetnet",
    "xlm-roberta", "xlm-roberta-xl", "xlnet", "xmod",
}  # fmt: skip
"""Encoders, decoders of encoders, and models of before 2020, which transformers lists among causal language models."""
EXACT = r"\de-1\d, \de-1\d"
"""What the table says of an exact model."""


def published() -> dict[str, tuple[PretrainedConfig, int | None]]:
    """Config and longest sample of each published model."""
    models: dict[str, dict[str, Any]] = yaml.safe_load(PUBLISHED.read_text())
    longest = {name: values.pop("max_sample", None) for name, values in models.items()}
    return {name: (AutoConfig.for_model(**values), longest[name]) for name, values in models.items()}


def types() -> list[str]:
    return sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - NOT_DECODERS)


def proof_of(config: PretrainedConfig, longest: int | None, judge: bool) -> Proof:
    """The proof, and with ``judge`` the second one if the first one finds the model exact; sizes must be known, too."""

    try:
        proof = prove(config, longest)
        if not proof.refusal:
            ModelDims.from_config(config)
            if judge and (second := prove(config, longest, OTHER, seed=7, stretch=2)).refusal:
                return second
        return proof
    except Exception as error:
        return Proof(refusal=f"{type(error).__name__}: {error}".splitlines()[0])


def result(proof: Proof) -> str:
    found = f"{proof.logprob:.0e}, {proof.gradient:.0e}" if not proof.refusal else proof.refusal
    return textwrap.shorten(found.replace("|", "/"), 340, placeholder=" ...")


def read_table() -> tuple[dict[str, str], dict[str, str]]:
    """What docs/models.md says of types and of published models."""
    table = DOCS.read_text().partition(BEGIN)[2].partition(END)[0]
    parts = re.split(r"^\d+ .*:$", table, flags=re.MULTILINE)
    exact, models, refused = (dict(re.findall(r"^\| (.+?) \| (.+) \|$", part, re.MULTILINE)[1:]) for part in parts[1:])
    return exact | refused, models


def write_table(by_type: dict[str, str], models: dict[str, str]) -> None:
    def rows(head: str, found: dict[str, str]) -> str:
        return f"\n| {head} |\n|---|---|\n" + "".join(f"| {name} | {text} |\n" for name, text in found.items())

    ordered = dict(sorted(by_type.items()))
    exact = {name: text for name, text in ordered.items() if re.fullmatch(EXACT, text)}
    refused = {name: text for name, text in ordered.items() if name not in exact}
    text = DOCS.read_text()
    DOCS.write_text(
        f"{text.partition(BEGIN)[0]}{BEGIN}"
        f"With transformers {transformers.__version__}. Differences are of log-probs (nats) and of gradients (relative).\n\n"
        f"{len(exact)} types are exact:\n{rows('type | differences', exact)}\n"
        f"{len(models)} published configs:\n{rows('model | differences', models)}\n"
        f"{len(refused)} types are refused:\n{rows('type | reason', refused)}{END}{text.partition(END)[2]}"
    )
    print(f"{len(exact)} types are exact, {len(refused)} are refused: {DOCS}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="types and published models whose rows are made again; default: all")
    parser.add_argument("--judge", action="store_true", help="prove exact ones a second time")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    known = published()
    of_type = {config.model_type: (name, config, longest) for name, (config, longest) in reversed(known.items())}
    by_type, models = read_table() if args.names else ({}, {})
    for kind in [name for name in args.names if name not in known] or ([] if args.names else types()):
        try:
            config = AutoConfig.for_model(kind)
            if getattr(config, "head_dim", 0) is None:
                config.head_dim = config.hidden_size // config.num_attention_heads
            proof = proof_of(config, None, args.judge)
        except Exception as error:
            proof = Proof(refusal=f"{type(error).__name__}: {error}".splitlines()[0])
        shown = kind
        if proof.refusal and kind in of_type:
            name, config, longest = of_type[kind]
            proof, shown = proof_of(config, longest, args.judge), f"{kind} ({name})"
        print(f"{shown}: {result(proof)}", flush=True)
        by_type = {name: text for name, text in by_type.items() if name.split()[0] != kind} | {shown: result(proof)}
    for name, (config, longest) in known.items():
        if not args.names or name in args.names:
            shown = f"{name} ({config.model_type})" + (f", samples up to {longest}" if longest else "")
            models[shown] = result(proof_of(config, longest, args.judge))
            print(f"{shown}: {models[shown]}", flush=True)
    write_table(by_type, models)


if __name__ == "__main__":
    main()
