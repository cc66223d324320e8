"""The embedded engine on tiny random models, against the untouched transformers model, one prompt a call."""

import copy
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from pgrpo.attention.hook import ATTENTION_NAME
from pgrpo.model.policy import Policy
from pgrpo.rollout.base import sample_seeds
from pgrpo.rollout.embedded.cache import DecodeCache
from pgrpo.rollout.embedded.engine import EmbeddedEngine
from pgrpo.types import Prompt, Request, SamplingParams

EOS = 2
PROMPT_LENS = [5, 1, 9, 3, 4]
LIMIT = 9
SMALL = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": EOS,
    "initializer_range": 0.3, "head_dim": 16,
}  # fmt: skip


class Letters:
    """A tokenizer with a fixed text for each id: one letter ("a" for 3, "b" for 4, ...), nothing for special tokens."""

    def batch_decode(self, sequences, *, skip_special_tokens, clean_up_tokenization_spaces):
        assert skip_special_tokens
        return ["".join(letter(t) for t in ids if t > EOS) for ids in sequences]


def letter(token):
    return chr(ord("a") + token - 3)


class Counting:
    """A policy that notes how many rows each call computes, and how many logits it asks for."""

    def __init__(self, policy):
        self.policy = policy
        self.calls: list[tuple[int, int]] = []

    @property
    def device(self):
        return self.policy.device

    def next_logits(self, inputs, layout, rows_B, images=None):
        self.calls.append((len(inputs["input_ids"]), len(rows_B)))
        return self.policy.next_logits(inputs, layout, rows_B)

    def modules(self):
        return self.policy.modules()


class Scripted:
    """A policy that says what is written: at each position, the token after the one it is shown."""

    device = torch.device("cpu")

    def __init__(self, scripts):
        self.scripts = scripts  # one for each prompt (of one token); the same token at the same position is said by one
        self.calls: list[list[int]] = []

    def modules(self):
        return iter(())

    def next_logits(self, inputs, layout, rows_B, images=None):
        tokens, positions = inputs["input_ids"].tolist(), inputs["position_ids"].tolist()
        if not self.calls:
            following = [script[0] for script in self.scripts]
        else:
            following = []
            for token, position in zip(tokens, positions, strict=True):
                owners = [s for s in self.scripts if position < len(s) and s[position - 1] == token]
                following.append(owners[0][position] if owners else 3)
        self.calls.append(tokens)
        logits = torch.full((len(rows_B), 61), -50.0)
        logits[torch.arange(len(rows_B)), torch.tensor(following)] = 50.0
        return logits


@pytest.fixture(scope="module", params=["llama", "qwen3", "granite", "qwen3_5_text", "lfm2"])
def models(request):
    return make_models(request.param)


@pytest.fixture(scope="module")
def policy():
    return make_models("qwen3")[0]


def make_models(model_type):
    """The policy, and the same weights in the untouched model."""
    torch.manual_seed(0)
    own = {
        "granite": {"logits_scaling": 3.0, "attention_multiplier": 0.3},
        "qwen3_5_text": {
            "layer_types": ["linear_attention", "linear_attention", "full_attention"], "num_hidden_layers": 3,
            "linear_key_head_dim": 8, "linear_value_head_dim": 12, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        },
        "lfm2": {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3},
    }.get(model_type, {})  # fmt: skip
    config = transformers.AutoConfig.for_model(model_type, **(SMALL | own))
    untouched = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="sdpa").eval()
    grouped = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=ATTENTION_NAME).eval()
    grouped.load_state_dict(untouched.state_dict())
    return Policy(grouped), untouched


def prompts(lengths=PROMPT_LENS):
    generator = torch.Generator().manual_seed(3)
    return [Prompt(i, "", torch.randint(3, 61, (n,), generator=generator).tolist()) for i, n in enumerate(lengths)]


def seeds(asked, group_size):
    return [sample_seeds(7, p.index, group_size=group_size) for p in asked]


def run(policy, asked, params, group_size=3, eos=(EOS,), **settings):
    engine = EmbeddedEngine(policy, Letters(), eos, **settings)
    return completions_of(engine, asked, params, seeds(asked, group_size))


def completions_of(engine, asked, params, seeds):
    """The completions of each prompt."""
    found = {}
    requests = [Request(prompt.token_ids, own) for prompt, own in zip(asked, seeds, strict=True)]
    engine.sample(requests, params, found.__setitem__)
    return [found[i] for i in range(len(asked))]


def wanted_logprobs(model, prompt, token_ids, temperature=1.0):
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt.token_ids + token_ids])).logits[0, len(prompt.token_ids) - 1 : -1]
    return (logits / temperature).log_softmax(-1).gather(-1, torch.tensor(token_ids)[:, None]).squeeze(-1)


def likely_eos(policy, asked):
    """Tokens that samples of these prompts really reach, so that completions end at different lengths."""
    groups = run(policy, asked, SamplingParams(LIMIT), eos=())
    drawn = torch.tensor([t for g in groups for c in g for t in c.token_ids])
    return drawn.bincount().argsort(descending=True)[:4].tolist()


def test_greedy_completions_are_those_of_generate(models):
    policy, untouched = models
    asked = prompts()
    eos = likely_eos(policy, asked)
    groups = run(policy, asked, SamplingParams(LIMIT, temperature=0.0), group_size=2, eos=eos)
    reasons = set()
    for prompt, group in zip(asked, groups, strict=True):
        ids = torch.tensor([prompt.token_ids])
        wanted = untouched.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=LIMIT, eos_token_id=eos,
            pad_token_id=0,
        )[0, len(prompt.token_ids) :].tolist()  # fmt: skip
        for completion in group:
            assert completion.token_ids == wanted
            assert completion.finish_reason == ("stop" if wanted[-1] in eos else "length")
            reasons.add(completion.finish_reason)
    assert len({len(g[0].token_ids) for g in groups}) > 1
    assert "stop" in reasons


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_rollout_logprobs_are_those_of_the_untouched_model(models, temperature):
    policy, untouched = models
    asked = prompts()
    groups = run(policy, asked, SamplingParams(LIMIT, temperature=temperature), eos=likely_eos(policy, asked))
    assert len({len(c.token_ids) for g in groups for c in g}) >= 3
    assert any(len({tuple(c.token_ids) for c in g}) > 1 for g in groups)
    for prompt, group in zip(asked, groups, strict=True):
        for completion in group:
            wanted = wanted_logprobs(untouched, prompt, completion.token_ids, temperature)
            torch.testing.assert_close(torch.tensor(completion.rollout_logprobs), wanted, rtol=1e-5, atol=1e-5)


def three_turns(policy, asked, eos, *, goes_on, **settings):
    """Two episodes of three turns behind each prompt, with two tokens told in between: all tokens in front of each turn with its
    completion, and the rows of each round's first call."""
    counting: Any = Counting(policy)
    requests, found = [], []
    waiting = [Request(prompt.token_ids, [seed]) for prompt in asked for seed in (0, 1)]
    starts = []

    def more(wait):
        starts.append(len(counting.calls))
        new = waiting.copy()
        requests.extend(new)
        waiting.clear()
        return new

    def finished(position, completions):
        request = requests[position]
        found.append((request.token_ids, completions[0]))
        whole = request.token_ids + completions[0].token_ids
        if request.seeds[0] < 20:
            waiting.append(
                Request(
                    [*whole, 40 + request.seeds[0] % 2, 42], [request.seeds[0] + 10], continued=len(whole) * goes_on
                )
            )

    EmbeddedEngine(counting, Letters(), eos, **settings).sample((), SamplingParams(LIMIT), finished, more)
    return found, [counting.calls[i][0] for i in starts[:-1]]


@pytest.mark.parametrize("at_once", [256, 4])
def test_a_turn_costs_its_new_tokens_and_its_logprobs_are_those_of_the_untouched_model(models, at_once):
    policy, untouched = models
    asked = prompts()
    eos = likely_eos(policy, asked)
    found, rows = three_turns(policy, asked, eos, goes_on=True, max_concurrent=at_once)
    whole, whole_rows = three_turns(policy, asked, eos, goes_on=False, max_concurrent=at_once)
    assert len(found) == 3 * 2 * len(asked)
    for ids, completion in found:
        wanted = wanted_logprobs(untouched, Prompt(0, "", ids), completion.token_ids)
        torch.testing.assert_close(torch.tensor(completion.rollout_logprobs), wanted, rtol=1e-5, atol=1e-5)
    assert [(ids, completion.token_ids) for ids, completion in found] == [(ids, c.token_ids) for ids, c in whole]
    if untouched.config.model_type in ("qwen3_5_text", "lfm2"):  # whose states are not kept
        assert rows == whole_rows
    else:  # the two tokens that are told, and the last of the turn before, which no step fed
        turns = min(at_once, 2 * len(asked))
        assert rows[1:] == [3 * turns] * 2 and min(whole_rows[1:]) > 2 * rows[1]


@pytest.mark.parametrize("at_once", [10, 4])
def test_no_more_is_kept_than_a_batch_holds_and_nothing_after_the_rollout(policy, at_once, monkeypatch):
    """Also at the end of a round, when its last turns are there beside those of the next one's prompts."""
    made, alive, copy_of = [], [], DecodeCache.front

    def count():
        return sum(keys() is not None for keys in made)

    def front(cache, row, length):
        found = copy_of(cache, row, length)
        made.append(weakref.ref(found.layers[0][0]))
        alive.append(count())
        return found

    monkeypatch.setattr(DecodeCache, "front", front)
    asked = prompts()
    found, _ = three_turns(policy, asked, likely_eos(policy, asked), goes_on=True, max_concurrent=at_once)
    assert len(found) == 3 * 2 * len(asked)
    assert max(alive) == at_once and count() == 0


def test_a_sample_does_not_depend_on_its_company(policy):
    asked = prompts()
    params = SamplingParams(LIMIT, top_p=0.9)
    eos = likely_eos(policy, asked)

    def flat(prompts, **settings):
        groups = run(policy, prompts, params, eos=eos, **settings)
        return {(p.index, i): c for p, group in zip(prompts, groups, strict=True) for i, c in enumerate(group)}

    together = flat(asked)
    others = [
        flat(asked, max_concurrent=4),  # one prompt at a time
        flat(asked[::-1]),
        flat(asked[1:2]),
        flat(asked, group_size=1),
        flat(asked, group_size=5),
    ]
    for other in others:
        for key in together.keys() & other.keys():
            assert other[key].token_ids == together[key].token_ids
            assert other[key].finish_reason == together[key].finish_reason
            got, wanted = (torch.tensor(x[key].rollout_logprobs) for x in (other, together))
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


def test_each_prompt_is_prefilled_once_and_finished_rows_leave(policy):
    asked = prompts()
    counting = Counting(policy)
    groups = run(counting, asked, SamplingParams(LIMIT), eos=likely_eos(policy, asked), group_size=4)
    lengths = [len(c.token_ids) for g in groups for c in g]
    assert counting.calls[0] == (sum(PROMPT_LENS), len(asked))
    decoded = [rows for rows, _ in counting.calls[1:]]
    assert len(decoded) == max(lengths) - 1  # the last token is never fed back
    for t, rows in enumerate(decoded, start=1):
        running = sum(n > t for n in lengths)
        assert running <= rows < running / 0.75 + 1  # those that still run, and less than a quarter that do not
    assert decoded[-1] < decoded[0]
    assert sorted(decoded, reverse=True) == decoded


def test_waves_bound_what_is_decoded_at_once(policy):
    counting = Counting(policy)
    run(counting, prompts(), SamplingParams(3), group_size=3, eos=(), max_concurrent=7)
    # Two prompts a wave: prefill, then two steps (the last token is never fed back).
    assert counting.calls == [(6, 2), (6, 6), (6, 6), (12, 2), (6, 6), (6, 6), (4, 1), (3, 3), (3, 3)]


def script(text):
    return [ord(c) - ord("a") + 3 if c != "." else EOS for c in text]


def scripted(texts, params):
    policy = Scripted([script(t) for t in texts])
    asked = [Prompt(i, "", [40 + i]) for i in range(len(texts))]
    engine = EmbeddedEngine(policy, Letters(), (EOS,))  # pyright: ignore[reportArgumentType]
    groups = completions_of(engine, asked, params, [[i] for i in range(len(texts))])
    return [g[0] for g in groups], policy


def test_a_completion_ends_at_eos_at_a_stop_string_or_at_its_limit():
    params = SamplingParams(6, stop=("xy", "q"))
    texts = ["abc.", "dexyff", "ghijkl", "mqnnnn", "uvwzxy", "."]
    got, policy = scripted(texts, params)
    by_hand = [
        ("abc.", "abc", "stop"),  # the eos token is one of the completion's, and no text
        ("dexy", "de", "stop"),  # a stop string over two tokens: its tokens stay, its text goes
        ("ghijkl", "ghijkl", "length"),
        ("mq", "m", "stop"),
        ("uvwzxy", "uvwz", "stop"),  # with the very last token allowed
        (".", "", "stop"),
    ]
    for completion, (tokens, text, reason) in zip(got, by_hand, strict=True):
        assert completion.token_ids == script(tokens)
        assert (completion.text, completion.finish_reason) == (text, reason)
        assert completion.rollout_logprobs == pytest.approx([0.0] * len(tokens), abs=1e-6)
    # Six prompts; "." has ended, but one in six may stay; after "mq" two of six are gone.
    assert [len(ids) for ids in policy.calls] == [6, 6, 4, 4, 2, 2]


def test_all_ended_at_once_stops_decoding():
    got, policy = scripted(["ab.", "cd."], SamplingParams(50))
    assert [c.text for c in got] == ["ab", "cd"]
    assert len(policy.calls) == 3


def test_stop_strings_inside_of_a_long_completion():
    got, _ = scripted(["abababababababc"], SamplingParams(15, stop=("bc", "zzzz")))
    assert (got[0].text, got[0].finish_reason) == ("abababababababc"[:13], "stop")
    assert len(got[0].token_ids) == 15


def test_the_earliest_stop_string_cuts_the_text():
    class Syllables(Letters):
        def batch_decode(self, sequences, *, skip_special_tokens, clean_up_tokenization_spaces):
            return ["".join(letter(t) * 2 if t == 3 else "pqr" for t in ids) for ids in sequences]

    policy = Scripted([[3, 4, 3]])
    engine = EmbeddedEngine(policy, Syllables(), (EOS,))  # pyright: ignore[reportArgumentType]
    groups = completions_of(engine, [Prompt(0, "", [40])], SamplingParams(5, stop=("r", "q")), [[0]])
    assert groups[0][0].text == "aap"
    assert groups[0][0].token_ids == [3, 4]


def test_a_rank_that_is_done_goes_on_until_all_are(policy):
    asked = prompts()
    params = SamplingParams(LIMIT)
    eos = likely_eos(policy, asked)
    alone = run(policy, asked, params, eos=eos)
    counting = Counting(policy)
    waiting = run(counting, asked, params, eos=eos, any_rank=lambda flag: flag or len(counting.calls) < LIMIT)
    assert len(counting.calls) == LIMIT
    assert min(rows for rows, _ in counting.calls) >= 1
    for a, b in zip(alone, waiting, strict=True):
        for x, y in zip(a, b, strict=True):
            assert replace(x, rollout_logprobs=[]) == replace(y, rollout_logprobs=[])
            assert x.rollout_logprobs == pytest.approx(y.rollout_logprobs, abs=1e-5)


def test_a_request_is_handed_over_when_its_last_completion_ends_with_the_numbers_of_one_batch(policy):
    asked, params = prompts(), SamplingParams(LIMIT)
    eos = likely_eos(policy, asked)
    counting, order, found = Counting(policy), [], {}
    engine = EmbeddedEngine(counting, Letters(), eos)  # pyright: ignore[reportArgumentType]
    requests = [Request(prompt.token_ids, own) for prompt, own in zip(asked, seeds(asked, group_size=2), strict=True)]

    def finished(position, completions):
        order.append((len(counting.calls), position))
        found[position] = completions

    engine.sample(requests, params, finished)
    # Each call of the policy gives all running completions a token.
    assert order == sorted((max(len(c.token_ids) for c in found[i]), i) for i in range(len(asked)))
    assert len({calls for calls, _ in order}) > 1
    whole = run(policy, asked, params, eos=(), group_size=2)  # here all end together
    for i, completions in enumerate(whole):
        for completion, early in zip(completions, found[i], strict=True):
            count = len(early.token_ids)
            assert early.token_ids == completion.token_ids[:count]
            assert count == LIMIT or early.token_ids[-1] in eos
            wanted = torch.tensor(completion.rollout_logprobs[:count])
            torch.testing.assert_close(torch.tensor(early.rollout_logprobs), wanted, rtol=0, atol=1e-5)
