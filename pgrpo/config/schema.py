"""The schema. Every key of a pgrpo YAML is a field, with its description below it; those of a recipe are in ``task.py``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from omegaconf import MISSING

from pgrpo.config.fields import MOST_SECONDS, MOST_STEPS, MOST_TOKENS, number
from pgrpo.config.task import DataConfig, EnvironmentConfig, PromptConfig, RewardsConfig


@dataclass
class ModelConfig:
    path: str = MISSING
    """Model hub name, or a folder that ``from_pretrained`` loads."""
    revision: str | None = None
    """Branch, tag or commit on the hub. None takes the default branch."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision of matrix products. Trained weights and their optimizer state are always float32."""
    attention: Literal["grouped", "repeated"] = "grouped"
    """`grouped` computes each prompt once; `repeated` computes it for every completion (the same result, for comparison)."""
    attention_kernel: Literal["auto", "builtin", "flash4"] = "auto"
    """`builtin` is PyTorch's own flash attention, `flash4` the package flash-attn-4 (Hopper, Blackwell). `auto` takes the
    fastest that can run here; the log says which, and why."""
    compile: bool | None = None
    """Compile the layers (torch.compile): takes a minute at the start, and makes all steps faster. None: on a GPU only."""
    activation_checkpointing: Literal["none", "matmuls", "attention", "full", "offload", "auto"] = "auto"
    """What the backward recomputes: `none` nothing; `matmuls` everything except attention and matrix products; `attention`
    everything except attention; `full` whole layers; `offload` whole layers, whose inputs wait for it in host memory. `auto` takes
    `matmuls` in as few layers as the memory plan requires (of compiled layers without LoRA and without a state); where all are not
    enough, weights of layers no longer stay gathered during an update; then `attention` in as few as possible, then whole layers,
    then MLPs in parts, then offloads as few as possible; nothing on a CPU.
    Layers of a vision tower that is trained are recomputed whole, except with `none`, and with `auto` on a CPU."""
    mlp_chunks: int | None = number(None, least=1, most=256)
    """Compute an MLP that is recomputed (not with `none` and `matmuls`) in so many parts of its rows, so that the activations of
    one part alone exist at a time. None: 1, or with `auto` what the memory plan requires."""
    fsdp_size: int | None = number(None, least=1, most=65536)
    """Number of neighbouring ranks that one replica of the weights is sharded over (hybrid sharding); gradients are averaged over
    the replicas. On several nodes, set it to the GPUs of one node. None: all ranks."""
    sequence_parallel_size: int = number(1, least=1, most=1024)
    """Number of neighbouring ranks that compute a micro-batch together, each of them an equal part of its rows (Ulysses): for
    samples that are too long for one GPU. It must divide the number of ranks and the model's attention heads. `token_budget` is
    that of these ranks together, and `prompts_per_step` divides over the shares of data, of which each has so many ranks."""
    lora_rank: int = number(0, least=0, most=4096)
    """LoRA: train adapters of this rank beside linear layers and experts (`lora_targets`). The model's weights stay unchanged, and
    are held in `dtype`. 0 trains all weights."""
    lora_alpha: float = number(32.0, above=0, most=1e6)
    """An adapter's output is multiplied by `lora_alpha / lora_rank`."""
    lora_targets: list[str] = field(default_factory=list)
    """Names of the linear layers that get adapters, such as `q_proj`; `experts` gives each expert of a mixture some, and
    `experts.down_proj` one of its matrices. Empty: all linear layers of the decoder layers, and no experts."""
    load_vision: bool = False
    """Load the vision tower of a model that is published with one and otherwise trained as a language model, without it (Qwen3.5):
    for prompts with images. Other models with images always have theirs."""
    train_vision: bool = False
    """Train the vision tower too. It then runs once an image and micro-batch; frozen, once an image and step."""
    train_projector: bool = False
    """Train what brings the tower's features to the language model. The tower then runs once an image and micro-batch."""
    max_positions: int | None = number(None, least=1, most=2 * MOST_TOKENS)
    """The longest sample that the model can take, in tokens; a longer one is refused. None: `max_position_embeddings` of its
    config.json, or more where its RoPE scaling says so."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""


@dataclass
class RolloutConfig:
    engine: Literal["auto", "vllm", "embedded"] = "auto"
    """`vllm` runs vLLM in the trainer's processes, `embedded` samples with the policy's own transformers model. `auto` takes
    vLLM where it is installed and there is a GPU."""
    prompts_per_step: int = number(32, least=1, most=2**17)
    """Prompts in one step, over all ranks."""
    group_size: int = number(8, least=2, most=2**14)
    """Completions of each prompt."""
    max_completion_tokens: int = number(256, least=1, most=MOST_TOKENS)
    """The longest completion, in tokens."""
    temperature: float = number(1.0, above=0, most=1e3)
    """Sampling temperature. The policy's log-probs are at this temperature too."""
    top_p: float = number(1.0, above=0, most=1)
    """Sample from the smallest set of tokens with at least this total probability. 1 is off."""
    top_k: int = number(0, least=0, most=2**24)
    """Sample from the k most likely tokens. 0 is off."""
    stop: list[str] = field(default_factory=list)
    """Strings that end a completion; rewards get the text without them. One that is a single token, such as `<|im_end|>`, is an
    additional end token."""
    keep_special_tokens: bool = False
    """Rewards get the text with special tokens, for formats that are made of them. The end token is left out in any case."""
    resample_limit: int = number(0, least=0, most=1000)
    """Dynamic sampling (DAPO): groups whose rewards are all equal, or whose completions are all masked (`loss.mask_overlong`), are
    replaced by groups of fresh prompts, in at most this many rounds. After the last round they are kept. 0 is off."""
    max_concurrent: int = number(256, least=1, most=2**17)
    """The most completions that are decoded at once; bounds the memory of keys and values."""
    tensor_parallel_size: int = number(1, least=1, most=1024)
    """Number of neighbouring ranks whose GPUs share one vLLM engine; at least the ranks of `model.sequence_parallel_size` do. 1: an
    engine on every GPU, or for those ranks together."""
    gpu_memory_utilization: float | None = number(None, above=0, most=1)
    """Share of a GPU's memory for vLLM while it is awake. None: the share that the policy leaves free according to the memory plan
    (between updates if vLLM sleeps during them), minus 4 GiB for CUDA graphs, or what the samples of a step can use, if that is
    less."""
    offload_policy: Literal["auto", "always", "never"] = "auto"
    """Keep the policy's weights, and AdamW's moments unless `optim.offload` does, in pinned host memory while vLLM samples, which
    gives their GPU memory to its cache; they are copied out and back once a step. `auto` moves as little as makes room for all
    completions that are sampled at once, at their longest, and nothing where they fit anyway; `docs/rollouts.md` says where part
    of weights or moments stays."""
    sleep: Literal["auto", "always", "never"] = "auto"
    """Whether vLLM frees its GPU memory during updates. `auto`: it stays awake where weights, cache and update fit beside each
    other with nothing more recomputed and nothing of the policy moved to host memory, and sleeps elsewhere; the log says which,
    and why. `never` is refused where one group does not fit beside the update."""
    enforce_eager: bool = False
    """Run vLLM without compilation and CUDA graphs: it starts sooner and samples more slowly."""
    shared_decode: Literal["auto", "always", "never"] = "auto"
    """vLLM reads the keys and values of a group's prompt once a decode step, not once a completion. `auto` does so where it was
    measured to pay (large groups, prompts of 512 tokens or more that are not short beside completions), with vLLM 0.26, on which
    this ran on a GPU, and logs why if not; `always` tries it with later releases too, and fails where it cannot run."""
    canary_every: int = number(10, least=0, most=MOST_STEPS)
    """Steps between checks of vLLM's log-probs that detect stale weights. Needs 16 different completions in a step. 0 is off."""
    compare_experts: bool = False
    """Let the canary count, too, how often vLLM chooses other experts than the policy with the same weights
    (`canary/expert_difference`). vLLM then records its choices in every step, which makes it slower by some percent."""
    vllm_deadline_s: float = number(1800.0, above=0, most=MOST_SECONDS)
    """Maximum seconds of one vLLM call (start, push, rollout, sleep); a longer one ends the run with a message."""
    allow_untested_vllm: bool = False
    """Allow a vLLM version that pgrpo was not tested with."""


@dataclass
class LossConfig:
    preset: Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo"] | None = None
    """The settings of a paper, which replace the defaults below; keys that you set override them. See the table of presets."""
    function: str | None = None
    """A loss of your own (`file.py:function` or `module:function`), called with the inputs of `pgrpo.algorithm.loss.policy_loss`.
    Groups whose rewards are all equal are computed too. None: the loss that the keys below describe."""
    ratio: Literal["token", "sequence"] = "token"
    """Probability ratio of the loss: of each token, or the geometric mean over the sample (GSPO)."""
    objective: Literal["clip", "cispo"] = "clip"
    """`clip`: a clipped token has no gradient (PPO, GRPO). `cispo`: the clipped ratio weighs every token's gradient."""
    clip_low: float = number(0.2, above=0, most=1e6)
    """The ratio's lower clip is 1 - clip_low."""
    clip_high: float = number(0.2, above=0, most=1e6)
    """The ratio's upper clip is 1 + clip_high."""
    clip_dual: float | None = number(None, above=1, most=1e6)
    """Dual clip: a token of negative advantage has no gradient once its ratio is above this (verl's `clip_ratio_c`, TRL's
    `delta`). Must be above 1 + clip_high. None: no such bound."""
    aggregate: Literal["token", "sample", "constant"] = "token"
    """`token`: mean over all tokens (DAPO). `sample`: mean over each sample's tokens, then over samples (GRPO). `constant`: each
    sample's sum over tokens, divided by `max_completion_tokens` (Dr. GRPO)."""
    advantage_baseline: Literal["group_mean", "leave_one_out"] = "group_mean"
    """A reward is compared with the mean of its group, or with the mean of the other rewards of its group (RLOO)."""
    combine_rewards: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize"
    """`sum_then_normalize`: advantages are of the weighted sum of rewards. `normalize_then_sum`: of each reward in its group, then
    their weighted sum, divided by its standard deviation over the step, so that no reward drowns another (GDPO)."""
    scale_advantages: Literal["group", "batch", "none"] = "group"
    """Divide advantages by the standard deviation of the group's rewards, or of all rewards of the step, or not at all (Dr.
    GRPO)."""
    turn_advantages: Literal["outcome", "returns_to_go"] = "outcome"
    """Of the turns of an episode with tools or an environment: `outcome` gives all of them the episode's advantage. `returns_to_go`
    compares each turn's discounted return (`get_turn_rewards` of the environment; the rest of the reward is the last turn's) with
    the returns of the same turn in the group's other episodes."""
    turn_discount: float = number(1.0, least=0, most=1)
    """What a turn's value is worth one turn earlier."""
    mask_overlong: bool = False
    """Exclude completions that were cut at `max_completion_tokens` from the loss; they stay in every count (DAPO)."""
    kl_coef: float = number(0.0, least=0, most=1e6)
    """Weight of the KL to the reference model, which is the initial model until it is refreshed. 0 loads no reference model."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of the KL for a token: `k1` the log-ratio, `k2` half its square, `k3` never negative and unbiased (GRPO)."""
    kl_correction: bool = True
    """Weigh a token's KL by its ratio, with the gradient of both, which is then the gradient of the KL, also after the weights have
    moved from those that sampled (DeepSeek-V3.2). False: the estimator's own gradient, `k3`'s in GRPO."""
    ref_refresh_every: int = number(0, least=0, most=MOST_STEPS)
    """Steps between copies of the policy into the reference model (checkpoints then hold both). 0: never."""
    ref_offload: Literal["none", "cpu"] = "none"
    """`cpu` keeps the reference model in host memory; its layers visit the GPU one at a time. Saves 2 bytes a parameter."""
    teacher: str | None = None
    """Path of a larger model with the same vocabulary, which the policy is distilled from on its own samples. Rewards may be there
    as well, or not (`rewards.functions: []`)."""
    teacher_kl: Literal["sampled", "full"] = "sampled"
    """KL of the policy to the teacher: `sampled` adds `log p(teacher) - log p(policy)` of each sampled token to its advantage;
    `full` adds the exact KL over the vocabulary to the loss, which is less noisy and takes the teacher's logits too."""
    teacher_coef: float = number(1.0, above=0, most=1e6)
    """Weight of the KL to the teacher, beside advantages."""
    teacher_offload: Literal["none", "cpu"] = "none"
    """`cpu` keeps the teacher in host memory; its layers visit the GPU one at a time. Saves 2 bytes a parameter of it."""
    entropy_coef: float = number(0.0, least=0, most=1e6)
    """Weight of an entropy bonus."""
    rollout_correction: Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = "none"
    """Weigh tokens by the trainer's probability over the sampler's, of the token or of its whole sample: `truncate` limits the
    weight to `rollout_correction_cap` (TIS), `mask` drops weights outside of
    [floor, cap] (MIS). The difference is always logged."""
    rollout_correction_cap: float = number(2.0, least=1, most=1e6)
    """The largest weight."""
    rollout_correction_floor: float | None = number(None, least=0, most=1)
    """The smallest weight: `truncate` raises smaller ones to it, `mask` drops them. None: 0 for `truncate`, 1/cap for `mask`."""
    off_policy_threshold: float | None = number(None, above=0, most=1e6)
    """Leave a sample of negative advantage out of the objective if the sampler's log-probs are higher than the policy's by more
    than this, on average over its tokens (DeepSeek-V3.2's off-policy sequence masking). It stays in every count. None: off."""


@dataclass
class OptimConfig:
    lr: float = number(1e-6, least=0, most=1e3)
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After warm-up the learning rate is constant, or decays to 0 at the last step."""
    warmup_steps: int = number(0, least=0, most=MOST_STEPS)
    """Steps of linear warm-up."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's betas."""
    eps: float = number(1e-8, above=0, most=1)
    """AdamW's epsilon."""
    weight_decay: float = number(0.0, least=0, most=1e3)
    """Decoupled weight decay, for matrices only: norms, biases and embeddings have none."""
    max_grad_norm: float = number(1.0, least=0, most=1e9)
    """Gradient norm above which gradients are scaled down. 0 is off."""
    offload: Literal["none", "cpu"] = "none"
    """`cpu` keeps AdamW's moments in host memory; they visit the GPU once an update. Saves 8 bytes a parameter."""


@dataclass
class TrainConfig:
    steps: int = number(MISSING, least=1, most=MOST_STEPS)
    """Number of steps. A step is a rollout, its rewards and its updates."""
    updates_per_step: int = number(1, least=1, most=2**17)
    """Optimizer steps in each pass over a step's completions; each takes an equal share of the prompts."""
    epochs_per_step: int = number(1, least=1, most=1000)
    """Passes over a step's completions."""
    token_budget: int = number(16384, least=1, most=2**26)
    """The most packed tokens in one micro-batch on one rank, or on the ranks of `model.sequence_parallel_size` together."""
    target_reward: float | None = number(None, least=-1e9, most=1e9)
    """Save and stop early once the mean reward of the last 10 steps is at least this."""
    max_skipped_updates: int = number(3, least=0, most=MOST_STEPS)
    """Maximum number of consecutive updates that are skipped because loss or gradients are not finite; one more stops the run."""


@dataclass
class EvalConfig:
    every: int = number(0, least=0, most=MOST_STEPS)
    """Steps between evaluations on the held-out split; also before the first and after the last. 0 is off."""
    rows: int = number(128, least=1, most=2**20)
    """Number of held-out rows, from the first on."""
    samples: int = number(1, least=1, most=2**14)
    """Completions of each held-out prompt, sampled as in training unless `temperature` is set. pass@k is reported for this number
    and all powers of two below it."""
    greedy: bool = True
    """Also make one greedy completion of each held-out prompt (`eval/greedy/...`)."""
    temperature: float | None = number(None, least=0, most=1e3)
    """Temperature of the samples. None takes that of the rollout; 0 makes the samples greedy, and then no additional greedy
    completion is made."""


@dataclass
class CheckpointConfig:
    every: int = number(0, least=0, most=MOST_STEPS)
    """Steps between checkpoints. 0 saves only at the end (and on Ctrl-C)."""
    keep: int = number(2, least=1, most=10**6)
    """Number of newest checkpoints that are kept."""
    keep_best: str | None = None
    """Name of a metric of evaluation, such as `eval/reward`: also save and keep the checkpoint with its highest value."""


@dataclass
class TrackConfig:
    console: bool = True
    """Live metrics and a table of completions on the terminal."""
    completions: int = number(4, least=0, most=2**17)
    """Completions logged each step in completions.jsonl, and every `console_every` steps on the console, in wandb and in
    tensorboard."""
    console_every: int = number(10, least=1, most=MOST_STEPS)
    """Steps between console reports, and between tables of completions in wandb and tensorboard."""
    wandb: bool = False
    """Log to Weights & Biases as well."""
    wandb_project: str = "pgrpo"
    """Project in Weights & Biases."""
    tensorboard: bool = False
    """Log to tensorboard as well, in the run folder."""


@dataclass
class Config:
    recipe: str | None = None
    """YAML of the task, by path or by name. Keys of the config file win over its keys."""
    run_dir: str = MISSING
    """The run folder. `~` and `${now:%Y%m%d}` are replaced."""
    cache_dir: str | None = None
    """Folder for compiled code (torch.compile, Triton, tilelang, flash-attn-4, vLLM), which makes the next start shorter. None:
    `pgrpo` in `$XDG_CACHE_HOME` or `~/.cache`."""
    seed: int = number(0, least=0, most=2**62)
    """Seed of all randomness."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    tools: list[str] = field(default_factory=list)
    """Functions that the model may call: `module:function` or `path/to/file.py:function`, each with type hints and a docstring."""
    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    rewards: RewardsConfig = field(default_factory=RewardsConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    track: TrackConfig = field(default_factory=TrackConfig)
    secret_keys: frozenset[str] = field(
        default=frozenset(), repr=False, compare=False, metadata={"omegaconf_ignore": True}
    )
    """Not a key: dotted names of the values that came from `${oc.env:...}`, which `to_yaml` redacts."""

    @property
    def has_tools(self) -> bool:
        """Whether an episode may have several turns."""
        return bool(self.tools or self.environment.factory)

    @property
    def tensor_parallel_size(self) -> int:
        """Ranks that share a vLLM engine."""
        return max(self.rollout.tensor_parallel_size, self.model.sequence_parallel_size)

    @property
    def max_sampled_tokens(self) -> int:
        """The most tokens of an episode behind its prompt."""
        turn, environment = self.rollout.max_completion_tokens, self.environment
        if not self.has_tools:
            return turn
        return environment.max_episode_tokens or turn * environment.max_turns

    @property
    def sampled_limit(self) -> str:
        """What sets ``max_sampled_tokens``, for messages."""
        if self.has_tools:
            return f"environment.max_episode_tokens, or environment.max_turns turns {self.max_sampled_tokens}"
        return f"rollout.max_completion_tokens {self.rollout.max_completion_tokens}"

    @property
    def max_sample_tokens(self) -> int:
        """The most tokens of a sample, with its prompt."""
        return self.data.max_prompt_tokens + self.max_sampled_tokens
