"""Which tokens end a completion: eos, those of the generation config, stop strings that are special tokens."""

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pgrpo.config import ConfigError, MessageConfig, PromptConfig, load_config
from pgrpo.distributed.world import World
from pgrpo.grpo import sample_groups
from pgrpo.rollout.ends import check_turn_end, end_token_ids
from pgrpo.training.build import build

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
CHAT = PromptConfig(messages=[MessageConfig("user", "{q}")])


def make_tokenizer(template=CHATML, special=("<eos>", "<|im_start|>", "<|im_end|>")):
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(["<pad>", *special, *"0123456789+="])}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", chat_template=template,
        additional_special_tokens=list(special[1:]),
    )  # fmt: skip


def test_a_special_token_among_the_stop_strings_is_an_end_token():
    tokenizer = make_tokenizer()
    assert end_token_ids(tokenizer, None, []) == [1]
    assert end_token_ids(tokenizer, [1, 2], ["77", "x"]) == [1, 2]
    assert end_token_ids(tokenizer, 1, ["<|im_end|>", "77"]) == [1, 3]
    with pytest.raises(ConfigError, match=r"rollout.stop: .* would never be found.*write '<\|im_end\|>' alone"):
        end_token_ids(tokenizer, 1, ["<|im_end|>\n"])
    assert end_token_ids(tokenizer, 1, ["<|im_end|>\n"], keep_special_tokens=True) == [1]  # found in the text


def test_a_stop_string_that_is_one_token_is_an_end_token():
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["</answer>"])  # not special: text has it
    assert end_token_ids(tokenizer, 1, ["7", "+=", "</answer>"]) == [1, 11, 16]


@pytest.mark.parametrize(
    ("template", "ends", "prompt", "warned"),
    [
        (CHATML, [1], CHAT, True),
        (CHATML, [1, 3], CHAT, False),
        (CHATML, [1], PromptConfig(template="{q}"), False),
        (CHATML.replace("<|im_end|>", " <eos>"), [1], CHAT, False),
        (CHATML.replace("<|im_end|>", ""), [1], CHAT, False),  # no token ends a turn
        ("{{ raise_exception('no') }}", [1], CHAT, False),
    ],
)
def test_a_template_whose_turns_end_with_another_token_is_warned_of(caplog, template, ends, prompt, warned):
    check_turn_end(make_tokenizer(template), prompt, ends)
    assert ("chat template ends a turn with '<|im_end|>', which does not end a completion" in caplog.text) == warned


def test_a_completion_stops_at_a_stop_string_that_is_a_special_token(tiny_model, tmp_path):
    """The tiny model's <pad> is special, not its eos, and a random model samples it."""
    keys = [f"model.path={tiny_model}", f"run_dir={tmp_path / 'run'}", "eval.every=0", "rollout.prompts_per_step=8"]
    keys += ["rollout.max_completion_tokens=24", "rollout.stop=['<pad>']"]
    with build(load_config("quickstart", keys), World(0, 1, torch.device("cpu"))) as parts, parts.engine.awake(0):
        groups, _, _ = sample_groups(parts, 0)
    stopped = [episode for group in groups for episode in group.episodes if 0 in episode.token_ids]
    assert len(stopped) > 4
    for episode in stopped:
        assert episode.token_ids.index(0) == len(episode.token_ids) - 1
        assert episode.finish_reason == "stop" and "pad" not in episode.text


def test_rewards_get_special_tokens_where_they_are_asked_for(tiny_model, tmp_path):
    """<pad> is special and not an end token here; the end token is left out in any case."""
    keys = [f"model.path={tiny_model}", f"run_dir={tmp_path / 'run'}", "eval.every=0", "rollout.prompts_per_step=8"]
    texts = {}
    for keep in (False, True):
        config = load_config("quickstart", [*keys, f"rollout.keep_special_tokens={keep}", "rollout.stop=['1']"])
        with build(config, World(0, 1, torch.device("cpu"))) as parts, parts.engine.awake(0):
            groups, _, _ = sample_groups(parts, 0)
        texts[keep] = [(e.token_ids, e.text) for group in groups for e in group.episodes]
    assert [ids for ids, _ in texts[True]] == [ids for ids, _ in texts[False]]
    assert sum("<pad>" in text for _, text in texts[True]) > 4
    assert [text.replace("<pad>", "") for _, text in texts[True]] == [text for _, text in texts[False]]
    assert not any("1" in text or "<eos>" in text for _, text in texts[True])
