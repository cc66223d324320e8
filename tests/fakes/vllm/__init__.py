"""What pgrpo asks of vLLM 0.32 on a CPU, done by a transformers model: an engine that can be broken where vLLM cannot.

Put this folder's parent on PYTHONPATH, and FAULT=KIND:CALL[@RANK] into the environment: the CALL-th call (from 1) of what KIND
names fails, on that rank or on all.

    step      decoding raises                     hang     decoding never ends
    push      loading raises after one tensor     stall    loading never ends
    drop      one tensor is not loaded            lie      one is not, and said to be
    give_up   a completion is given up, once      refuse   a completion is given up, from then on
    stale    nothing but the last norm is loaded from then on, and nothing else can be read back
"""

import os
import time
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from transformers import AutoModelForCausalLM

__version__ = "0.32.0"
sampling_params = SimpleNamespace(RequestOutputKind=SimpleNamespace(FINAL_ONLY=None))
DROPPED, READABLE = "model.layers.1.mlp.up_proj.weight", "model.norm.weight"
_kind, _, _when = os.environ.get("FAULT", "none:1").partition(":")
_call, _, _rank = _when.partition("@")
_calls: dict[str, int] = {}


def _fails(*kinds: str) -> bool:
    """Count a call of each kind; whether one of them is the one that fails, or one after it."""
    here = not _rank or os.environ.get("RANK", "0") == _rank
    for kind in kinds:
        _calls[kind] = _calls.get(kind, 0) + 1
    once = _kind not in ("stale", "refuse")
    return here and _kind in kinds and (_calls[_kind] == int(_call) if once else _calls[_kind] >= int(_call))


@dataclass(init=False)
class EngineArgs:
    """None that only some releases have."""

    def __init__(self, **_) -> None:
        pass

    def create_model_config(self):
        return SimpleNamespace(architectures=["Qwen3ForCausalLM"], using_transformers_backend=lambda: False)


def SamplingParams(**settings):
    return SimpleNamespace(
        **{"n": 1, "temperature": 1.0, "top_k": 0, "stop_token_ids": [], "prompt_logprobs": None, **settings}
    )


class Model:
    """A vLLM model's face."""

    def __init__(self, path: str) -> None:
        self.hf = AutoModelForCausalLM.from_pretrained(path).eval()
        for parameter in self.hf.parameters():
            parameter.data.zero_()
        self.model, self.lm_head = self.hf.model, self.hf.lm_head
        self.lm_head.quant_method = SimpleNamespace(process_weights_after_loading=lambda layer: None)

    def compute_logits(self, hidden):
        return self.hf.lm_head(hidden)

    def logits(self, ids):
        return self.compute_logits(self.hf.model(torch.tensor([ids])).last_hidden_state[0])

    def modules(self):
        return self.hf.modules()

    def named_modules(self):
        return self.hf.named_modules()

    def named_buffers(self, remove_duplicate=True):
        return self.hf.named_buffers(remove_duplicate=remove_duplicate)

    def named_parameters(self, remove_duplicate=True):
        shown = {}  # one object for all names of a parameter
        for name, parameter in self.hf.named_parameters(remove_duplicate=remove_duplicate):
            cut = parameter.detach()[:0] if _kind == "stale" and name != READABLE else parameter.detach()
            yield name, shown.setdefault(parameter, cut)

    def load_weights(self, weights):
        written, own = set(), dict(self.hf.named_parameters())
        is_broken = _fails("push", "stall", "drop", "lie", "stale")
        for name, tensor in weights:
            if is_broken and _kind == "push":
                raise RuntimeError("the device is lost")
            if is_broken and _kind == "stall":
                time.sleep(600)
            keeps = is_broken and (name != READABLE if _kind == "stale" else name == DROPPED)
            if not keeps:
                own[name].data.copy_(tensor)
            if not keeps or _kind != "drop":
                written.add(name)
        return written


class LLM:
    def __init__(self, model: str, **_) -> None:
        self.model, self.waiting = Model(model), []
        self.request_counter = SimpleNamespace(counter=0)
        self.llm_engine = self
        self.vllm_config = SimpleNamespace(cache_config=SimpleNamespace(num_gpu_blocks=4096, block_size=16))
        scheduler = SimpleNamespace(schedule=lambda: SimpleNamespace(preempted_req_ids=None))
        self.engine_core = SimpleNamespace(shutdown=lambda: None, engine_core=SimpleNamespace(scheduler=scheduler))

    def apply_model(self, function):
        return [function(self.model)]

    def collective_rpc(self, name: str, kwargs):
        assert name == "reload_weights"
        self.model.load_weights(kwargs["weights_iterator"])

    def reset_prefix_cache(self) -> bool:
        """There is none."""
        return True

    def enqueue(self, prompts, request, use_tqdm):
        first = self.request_counter.counter
        self.request_counter.counter += len(prompts)
        new = [(str(first + i), prompt["prompt_token_ids"], request) for i, prompt in enumerate(prompts)]
        self.waiting += new
        return [name for name, _, _ in new]

    def has_unfinished_requests(self) -> bool:
        return bool(self.waiting)

    def abort_request(self, names, internal) -> None:
        self.waiting = [item for item in self.waiting if item[0] not in names]

    @torch.no_grad()
    def step(self):
        """All of one request."""
        name, prompt, request = self.waiting[0]
        samples = request.prompt_logprobs is None
        if samples and _fails("step", "hang", "give_up", "refuse"):
            if _kind == "step":
                raise RuntimeError("the device is lost")
            if _kind == "hang":
                time.sleep(600)
            self.waiting.pop(0)
            given_up = [
                SimpleNamespace(index=0, token_ids=[], logprobs=SimpleNamespace(logprobs=[]), finish_reason="abort")
            ]
            return [SimpleNamespace(request_id=name, finished=True, outputs=given_up, prompt_token_ids=prompt)]
        self.waiting.pop(0)
        output = SimpleNamespace(request_id=name, finished=True, outputs=[], prompt_token_ids=prompt)
        if samples:
            output.outputs = [self._sample(i, prompt, request) for i in range(request.n)]
        else:
            logprobs = self.model.logits(prompt).log_softmax(-1)
            after = [{t: SimpleNamespace(logprob=logprobs[at, t].item())} for at, t in enumerate(prompt[1:])]
            output.prompt_logprobs = [None, *after]
        return [output]

    def _sample(self, index, prompt, request):
        ids, logprobs = [], []
        while len(ids) < request.max_tokens and not (ids and ids[-1] in request.stop_token_ids):
            row = self.model.logits(prompt + ids)[-1]  # log-probs are raw: before temperature, top-k and top-p
            drawn_from = row / request.temperature
            if request.top_k > 0:
                drawn_from = drawn_from.masked_fill(drawn_from < drawn_from.topk(request.top_k).values[-1], -torch.inf)
            ids.append(int(torch.multinomial(drawn_from.softmax(-1), 1)))
            logprobs.append(row.log_softmax(-1)[ids[-1]].item())
        reason = "stop" if ids[-1] in request.stop_token_ids else "length"
        return SimpleNamespace(
            index=index, token_ids=ids, logprobs=SimpleNamespace(logprobs=logprobs), finish_reason=reason
        )
